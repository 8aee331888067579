"""The section on what quantization costs the whole model, per format, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.report import figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Head, Section, Swatch, Table, Text
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.headline import checkpoint_names
from vrscope.report.removed import removed
from vrscope.report.text import MISSING, change, is_missing, number, plus_minus, visible
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_CAUSAL = ("kl", "perplexity_ratio", "perplexity", "top1")
_ENCODER = ("relative_error", "cosine")
_TAIL = ("kl_p50", "kl_p90", "kl_p99", "kl_max")
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of the damage table, sorted by format: their checkpoint, format, and the page's names for both."""

    frame: pd.DataFrame
    keys: list[str]
    formats: list[str]
    checkpoints: dict[str, str]

    def labels(self) -> dict[str, str]:
        """Return the distinct formats in order, each with the name the page gives it."""
        return {name: "not quantized" if name == "none" else name or MISSING for name in dict.fromkeys(self.formats)}

    def place(self, row: int) -> int:
        """Return which checkpoint a row belongs to, counted from 0."""
        return list(self.checkpoints).index(self.keys[row])


def damage(report: Report) -> Section | None:
    """Return the damage of each format before and after, as bars and as a table."""
    found = frame_of(report, "damage")
    if found is None:
        return None
    order = {name: k for k, name in enumerate(dict.fromkeys(texts(found, "format")))}
    frame = found.iloc[np.argsort([order[name] for name in texts(found, "format")], kind="stable")]
    keys = texts(frame, "checkpoint")
    rows = _Rows(frame, keys, texts(frame, "format"), checkpoint_names(report, texts(found, "checkpoint")))
    causal = bool(np.isfinite(numbers(frame, "kl")).any())
    measure, axis, lead = _causal_words() if causal else _encoder_words()
    chart = _chart(rows, measure, axis)
    blocks: list[Block] = [] if chart is None else [chart]
    caption = f"Damage per format{_measured_on(report, frame)}"
    note = (
        "± is one standard error, tokens taken as independent; of a change, in points of its percentage. A change "
        "counts as noise below two standard errors of the difference, which is paired: both checkpoints are measured "
        "on the same tokens."
    )
    blocks.append(_table(report, rows, _CAUSAL if causal else _ENCODER, Table(caption, (), (), note)))
    if any(np.isfinite(numbers(frame, c)).any() for c in _TAIL):
        fold = "How KL spreads over tokens"
        blocks.append(_table(report, rows, _TAIL, Table(fold, (), (), fold=fold)))
    blocks += [Text(note) for note in _notes(report)]
    return Section("damage", "Damage by format", lead, tuple(blocks))


def _causal_words() -> tuple[str, str, str]:
    lead = (
        "How far the model's predictions move away from those of the unquantized original when its linear layers are "
        "quantized. Lower is better; 0 means nothing was lost."
    )
    return "kl", "mean KL divergence from the unquantized original, nats per token", lead


def _encoder_words() -> tuple[str, str, str]:
    lead = (
        "This model has no causal head, so damage is how far its last hidden state moves away from that of the "
        "unquantized original. A lower error and a cosine closer to 1 are better."
    )
    return "relative_error", "relative error of the last hidden state", lead


def _measured_on(report: Report, frame: pd.DataFrame) -> str:
    tokens = numbers(frame, "tokens")
    tokens = tokens[np.isfinite(tokens)]
    text = visible(report.provenance.get("text"))
    words = [f"{number(tokens.max())} tokens"] if len(tokens) else []
    return f", measured on {' of '.join([*words, text] if text else words)}" if words else ""


def _notes(report: Report) -> list[str]:
    """Return what the measuring had to remark."""
    notes = report.provenance.get("notes")
    return [visible(note) for note in notes] if isinstance(notes, list | tuple) else []


def _chart(rows: _Rows, measure: str, axis: str) -> Figures | None:
    values, sems = numbers(rows.frame, measure), numbers(rows.frame, f"{measure}_sem")
    where = {pair: k for k, pair in enumerate(zip(rows.keys, rows.formats, strict=True))}
    at = [[where.get((key, name), -1) for name in rows.labels()] for key in rows.checkpoints]
    values, sems = np.append(values, np.nan)[at], np.append(sems, np.nan)[at]  # -1: this pair was not measured
    shown = np.flatnonzero((np.nan_to_num(values) > 0).any(axis=0))
    if not len(shown):
        return None
    names = [list(rows.labels().values())[k] for k in shown]
    bars = [
        figures.Bars(name, values[k, shown], sems[k, shown]) for k, name in enumerate(rows.checkpoints.values())
    ]  # fmt: skip
    groups = _groups(np.nan_to_num(values[:, shown]).max(axis=0))
    svg = figures.damage_bars(groups, names, bars, axis)
    legend = tuple(Swatch(f"--series-{min(k, 4)}", "box", series.name) for k, series in enumerate(bars))
    scales = " The panels have scales of their own." if len(groups) > 1 else ""
    note = f"Error bars: one standard error of the mean.{scales}"
    return Figures((Figure(svg, "", axis),), legend, note=note)


def _groups(worst: Floats) -> list[list[int]]:
    """Split the rows in two where the largest jump is, if one scale would leave the smaller bars unreadable."""
    order = np.sort(worst)
    if len(order) < 2 or order[-1] < 12 * order[0]:
        return [list(range(len(worst)))]
    jump = int(np.argmax(order[1:] / order[:-1]))
    large = worst > order[jump]
    return [np.flatnonzero(large).tolist(), np.flatnonzero(~large).tolist()]


def _table(report: Report, rows: _Rows, columns: tuple[str, ...], empty: Table) -> Table:
    """Fill a table with one row per format and checkpoint; the first column comes with its relative change."""
    shown = [c for c in columns if c == columns[0] or np.isfinite(numbers(rows.frame, c)).any()]
    several = len(rows.checkpoints) > 1
    heads = [Head("format"), *([Head("checkpoint")] if several else [])]
    for c in shown:
        heads.append(head(report, "damage", c))
        if c == shown[0] and several:
            heads.append(Head("change", "", "Relative change against the first checkpoint.", numeric=True))
    labels, blind = rows.labels(), _out_of_reach(report)
    data = {c: (numbers(rows.frame, c), numbers(rows.frame, f"{c}_sem")) for c in shown}
    filled: list[tuple[Cell, ...]] = []
    for k, name in enumerate(rows.formats):
        cells = []
        if k == rows.formats.index(name):
            cells.append(Cell(labels[name], "name", span=rows.formats.count(name)))
        if several:
            place = rows.place(k)
            cells.append(Cell(rows.checkpoints[rows.keys[k]], swatch=f"--series-{min(place, 4)}"))
        for c in shown:
            value, sem = data[c]
            cells.append(Cell(plus_minus(value[k], sem[k]), "num"))
            if c == shown[0] and several:
                cells.append(_changed(rows, k, (value, sem), name in blind))
        filled.append(tuple(cells))
    return Table(empty.caption, tuple(heads), tuple(filled), empty.note, empty.fold)


def _changed(rows: _Rows, row: int, measured: tuple[Floats, Floats], blind: bool) -> Cell:
    """Say how far a row moved from the first checkpoint's; with colour and error if that is more than noise."""
    values, sems = measured
    first = next(iter(rows.checkpoints))
    pairs = list(zip(rows.keys, rows.formats, strict=True))
    base = pairs.index((first, rows.formats[row])) if (first, rows.formats[row]) in pairs else row
    if base == row:
        return Cell("", "num")
    words = change(values[base], values[row])
    if words in {MISSING, "unchanged"}:
        return Cell(words, "num muted", note="out of reach" if blind and words == "unchanged" else "")
    moved, error = (numbers(rows.frame, name)[row] for name in ("change", "change_sem"))
    if is_missing(moved):
        return Cell(words, "num")
    if abs(moved) < 2 * (0.0 if is_missing(error) else error):
        return Cell(words, "num muted", note="within noise")
    first_row, own_row = ({"value": values[k], "value_sem": sems[k]} for k in (base, row))
    share = removed(first_row, own_row | {"change": moved, "change_sem": error}, "value")
    margin = share.margin if share is not None and "%" in words else ""
    return Cell(words, "num good" if values[row] < values[base] else "num bad", note=margin)


def _out_of_reach(report: Report) -> set[str]:
    """Return the formats that the plan cannot change."""
    frame = frame_of(report, "reach")
    if frame is None:
        return set()
    return {name for name, can in zip(texts(frame, "format"), flags(frame, "can_change"), strict=True) if can is False}
