"""Sections on quantization: damage of the whole model, what the plan cannot change, and error of single weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vrscope.report import figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Head, Section, Swatch, Table, Text
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.headline import checkpoint_names
from vrscope.report.text import MISSING, change, is_missing, number, plus_minus
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_LISTED = 60  # names written out before "and N more"
_CAUSAL = ("kl", "perplexity", "perplexity_ratio", "top1", "kl_p50", "kl_p90", "kl_p99", "kl_max")
_ENCODER = ("relative_error", "cosine")


def damage(report: Report) -> Section | None:
    """Return the damage of each format before and after, as bars and as a table."""
    frame = frame_of(report, "damage")
    if frame is None:
        return None
    causal = bool(np.isfinite(numbers(frame, "kl")).any())
    measure = "kl" if causal else "relative_error"
    names = checkpoint_names(report, texts(frame, "checkpoint"))
    if causal:
        axis = "mean KL divergence from the unquantized original, nats per token"
        lead = (
            "How far the model's predictions move away from those of the unquantized original when its linear layers "
            "are quantized. Lower is better; 0 means nothing was lost."
        )
    else:
        axis = "relative error of the last hidden state"
        lead = (
            "This model has no causal head, so damage is how far its last hidden state moves away from that of the "
            "unquantized original. Lower error and a cosine closer to 1 are better."
        )
    blocks: list[Block] = []
    chart = _chart(frame, names, measure, axis)
    if chart is not None:
        blocks.append(chart)
    blocks.append(_damage_table(report, frame, names, _CAUSAL if causal else _ENCODER))
    return Section("damage", "Damage by format", lead, tuple(blocks))


def _chart(frame: pd.DataFrame, names: dict[str, str], measure: str, axis: str) -> Figures | None:
    keys, formats = texts(frame, "checkpoint"), texts(frame, "format")
    values, sems = numbers(frame, measure), numbers(frame, f"{measure}_sem")
    where = {(key, name): k for k, (key, name) in enumerate(zip(keys, formats, strict=True))}
    rows = [
        name
        for name in dict.fromkeys(formats)
        if any(values[where[key, name]] > 0 for key in names if (key, name) in where)
    ]
    if not rows:
        return None
    bars = []
    for key, name in names.items():
        at = [where.get((key, row), -1) for row in rows]
        picked = [(values[k], sems[k]) if k >= 0 else (np.nan, np.nan) for k in at]
        bars.append(figures.Bars(name, *(np.array(part) for part in zip(*picked, strict=True))))
    worst = np.nanmax(np.array([series.values for series in bars]), axis=0)
    groups = _groups(worst)
    labels = ["not quantized" if row == "none" else row for row in rows]
    drawn = figures.damage_bars(groups, labels, bars, axis)
    legend = tuple(Swatch(f"--series-{min(k, 4)}", "box", series.name) for k, series in enumerate(bars))
    scales = " The panels have scales of their own." if len(groups) > 1 else ""
    label = f"{axis}, for {', '.join(labels)}; the numbers are in the table below."
    return Figures((Figure(drawn, "", label),), legend, note=f"Error bars: one standard error of the mean.{scales}")


def _groups(worst: np.ndarray) -> list[list[int]]:
    """Split the rows in two where the largest jump is, if one scale would leave the smaller bars unreadable."""
    order = np.sort(worst)
    if len(order) < 2 or order[-1] < 12 * order[0]:
        return [list(range(len(worst)))]
    jump = int(np.argmax(order[1:] / order[:-1]))
    large = worst > order[jump]
    return [np.flatnonzero(large).tolist(), np.flatnonzero(~large).tolist()]


def _damage_table(report: Report, frame: pd.DataFrame, names: dict[str, str], columns: tuple[str, ...]) -> Table:
    shown = [c for c in columns if c == columns[0] or np.isfinite(numbers(frame, c)).any()]
    keys, formats = texts(frame, "checkpoint"), texts(frame, "format")
    order = sorted(range(len(keys)), key=lambda k: (list(dict.fromkeys(formats)).index(formats[k])))
    data = {c: (numbers(frame, c), numbers(frame, f"{c}_sem")) for c in shown}
    several, first = len(names) > 1, next(iter(names))
    heads = [Head("format"), *([Head("checkpoint")] if several else [])]
    for c in shown:
        heads.append(head(report, "damage", c))
        if c == shown[0] and several:
            heads.append(Head("change", "", "Relative change against the first checkpoint.", numeric=True))
    base = {formats[k]: k for k in reversed(order) if keys[k] == first}
    places = {key: place for place, key in enumerate(names)}
    rows, seen = [], set()
    for k in order:
        cells = []
        if formats[k] not in seen:
            seen.add(formats[k])
            label = "not quantized" if formats[k] == "none" else formats[k] or MISSING
            cells.append(Cell(label, "name", span=formats.count(formats[k])))
        if several:
            cells.append(Cell(names[keys[k]], swatch=f"--series-{min(places[keys[k]], 4)}"))
        for c in shown:
            value, sem = data[c]
            cells.append(Cell(plus_minus(value[k], sem[k]), "num"))
            if c == shown[0] and several:
                cells.append(_changed(base.get(formats[k]), k, value, sem))
        rows.append(tuple(cells))
    note = "± is one standard error. A change smaller than one standard error is marked as such."
    return Table("Damage per format", tuple(heads), tuple(rows), note)


def _changed(base: int | None, row: int, values: np.ndarray, sems: np.ndarray) -> Cell:
    """Say how far a row moved from the first checkpoint's; coloured only if by more than its standard error."""
    if base is None or base == row:
        return Cell("", "num")
    words = change(values[base], values[row])
    if words in {MISSING, "unchanged"}:
        return Cell(words, "num muted")
    error = max((float(s) for s in (sems[base], sems[row]) if not is_missing(s)), default=0.0)
    if abs(values[row] - values[base]) < error:
        return Cell(words, "num muted", note="< 1 SEM")
    return Cell(words, "num good" if values[row] < values[base] else "num bad")


def limits(report: Report) -> Section | None:
    """Return what the plan could not change: formats that are blind to it, and spaces that cannot be scaled."""
    reach, unreachable = frame_of(report, "reach"), frame_of(report, "unreachable")
    blocks: list[Block] = []
    if reach is not None:
        blocks.append(_reach_table(report, reach))
    if unreachable is not None:
        blocks.append(_unreachable_table(report, unreachable))
    elif "unreachable" in report.tables:
        blocks.append(Text("Every space of this model can be scaled."))
    if reach is None and unreachable is None:
        return None
    lead = (
        "Rounding with a scale that follows the data cannot see a factor that is constant over one block of that scale: "
        "the scale absorbs it and every rounding error stays where it was. Such a format has exactly the same damage "
        "before and after."
    )
    return Section("limits", "What this plan could not change", lead, tuple(blocks))


def _reach_table(report: Report, frame: pd.DataFrame) -> Table:
    totals = numbers(frame, "tensors_total")
    touched = numbers(frame, "tensors_changed")
    heads = (
        head(report, "reach", "format", numeric=False),
        Head("can this plan change it?", "", "Whether any scale block of the format sees the plan's factors."),
        Head("tensors that can move", "", "Tensors whose rounding the plan can change, of all quantized.", numeric=True),
        head(report, "reach", "reason", numeric=False, label="why"),
    )
    rows = []
    for k, (name, can, reason) in enumerate(
        zip(texts(frame, "format"), flags(frame, "can_change"), texts(frame, "reason"), strict=True)
    ):
        words, look = ("yes", "good") if can else (MISSING, "muted") if can is None else ("no", "bad")
        moved = MISSING if is_missing(touched[k]) else f"{number(touched[k])} of {number(totals[k])}"
        rows.append((Cell(name, "name"), Cell(words, f"strong {look}"), Cell(moved, "num"), Cell(reason, "words")))
    return Table("What each format can see of this plan", heads, tuple(rows))


def _unreachable_table(report: Report, frame: pd.DataFrame) -> Table:
    groups: dict[str, list[str]] = {}
    for space, reason in zip(texts(frame, "space"), texts(frame, "reason"), strict=True):
        groups.setdefault(reason or "no reason given", []).append(space)
    heads = (
        Head("spaces", "", "How many spaces share the reason.", numeric=True),
        head(report, "unreachable", "reason", numeric=False, label="why they cannot be scaled"),
        head(report, "unreachable", "space", numeric=False, label="which"),
    )
    rows = tuple(
        (Cell(number(len(spaces)), "num"), Cell(reason, "words"), Cell(_list(spaces), "name wide"))
        for reason, spaces in sorted(groups.items(), key=lambda item: -len(item[1]))
    )
    return Table("Spaces that no plan can scale", heads, rows)


def _list(names: list[str]) -> str:
    more = f" and {number(len(names) - _LISTED)} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def weight_error(report: Report) -> Section | None:
    """Return the rounding error of single weights: per role and format, and the ten worst tensors."""
    frame = frame_of(report, "weight_error")
    if frame is None or not np.isfinite(numbers(frame, "sqnr_db")).any():
        return None
    names = checkpoint_names(report, texts(frame, "checkpoint"))
    lead = (
        "Signal to quantization noise of each linear weight by itself, in decibels: higher is better, and 6 dB are one "
        "bit. It says how well the weight is rounded, not how much the model suffers."
    )
    arrow = " → ".join(names.values())
    blocks = (_by_role(frame, names, arrow), _worst(frame, names, arrow))
    return Section("weight-error", "Weight error by format", lead, blocks)


def _by_role(frame: pd.DataFrame, names: dict[str, str], arrow: str) -> Table:
    keys, roles, formats = texts(frame, "checkpoint"), texts(frame, "role"), texts(frame, "format")
    sqnr = numbers(frame, "sqnr_db")
    cells: dict[tuple[str, str, str], list[float]] = {}
    for key, role, name, value in zip(keys, roles, formats, sqnr, strict=True):
        if not np.isnan(value):
            cells.setdefault((role, name, key), []).append(float(value))
    columns, known = list(dict.fromkeys(formats)), list(dict.fromkeys(roles))
    heads = (Head("role"), *(Head(name, "dB", f"Median SQNR of {name} over layers.", numeric=True) for name in columns))
    rows = tuple(
        (Cell(role or MISSING, "name"), *(_arrow([cells.get((role, name, key), []) for key in names]) for name in columns))
        for role in known
    )
    return Table(f"Median SQNR over layers, dB: {arrow}", heads, rows)


def _arrow(groups: list[list[float]], say: Callable[[float], str] = lambda x: f"{x:.1f}") -> Cell:
    """Write the medians of one cell before and after, once if they do not differ."""
    middles = [float(np.median(group)) if group else float("nan") for group in groups]
    words = [MISSING if np.isnan(x) else say(x).replace("-", "−") for x in middles]
    if len(set(words)) == 1:
        return Cell(words[0], "num muted" if len(words) > 1 else "num")
    better = middles[-1] - middles[0]
    look = "good" if better > 0 else "bad" if better < 0 else ""
    return Cell(" → ".join(words), f"num {look}".strip())


def _worst(frame: pd.DataFrame, names: dict[str, str], arrow: str) -> Table:
    keys, tensors, formats = texts(frame, "checkpoint"), texts(frame, "tensor"), texts(frame, "format")
    sqnr, relative = numbers(frame, "sqnr_db"), numbers(frame, "relative_error")
    at = {key: k for k, key in enumerate(zip(keys, tensors, formats, strict=True))}
    first = next(iter(names))
    lowest: dict[str, int] = {}
    for k in np.argsort(np.where(np.isnan(sqnr), np.inf, sqnr), kind="stable"):
        if keys[k] == first and not np.isnan(sqnr[k]):
            lowest.setdefault(tensors[k], int(k))
    heads = (
        Head("tensor"),
        Head("format", "", "The format that rounds this tensor worst."),
        Head("SQNR", "dB", "Signal to quantization noise ratio.", numeric=True),
        Head("relative error", "", "Frobenius norm of the error over that of the weight.", numeric=True),
    )
    rows = []
    for k in list(lowest.values())[:10]:
        mine = [at.get((key, tensors[k], formats[k]), -1) for key in names]
        pair = [[sqnr[j]] if j >= 0 and not np.isnan(sqnr[j]) else [] for j in mine]
        errors = [number(relative[j]) if j >= 0 else MISSING for j in mine]
        text = errors[0] if len(set(errors)) == 1 else " → ".join(errors)
        rows.append((Cell(tensors[k], "name"), Cell(formats[k], "name"), _arrow(pair), Cell(text, "num")))
    return Table(f"The ten worst tensors, each in its worst format: {arrow}", heads, tuple(rows))
