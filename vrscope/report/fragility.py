"""The sections on fragility: which units suffer most alone, which statistics foretell it, and what a recipe keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vrscope.report import fragility_figures as figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Head, Section, Swatch, Table
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.text import MISSING, number, plus_minus, size, visible
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_BARS = 20
_INTERVALS = 24
_LOOKS = {"predicts": "strong good", "wrong way": "strong bad", "none": "muted"}


def _measure(frame: pd.DataFrame) -> tuple[str, str]:
    """Return the column of the damage and how an axis names it."""
    if np.isfinite(numbers(frame, "kl")).any():
        return "kl", "mean KL from the original with this unit alone quantized, nats per token"
    return "relative_error", "relative error of the last hidden state with this unit alone quantized"


def sensitivity(report: Report) -> Section | None:
    """Return the units ranked by the damage of quantizing each alone, and how the damage is spread over bytes."""
    frame = frame_of(report, "sensitivity")
    if frame is None:
        return None
    measure, axis = _measure(frame)
    values, sems = numbers(frame, measure), numbers(frame, f"{measure}_sem")
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    names = texts(frame, "unit")
    top = [k for k in order[:_BARS] if np.isfinite(values[k])]
    blocks: list[Block] = []
    if top:
        svg = figures.ranked_bars([names[k] for k in top], values[top], sems[top], axis)
        title = f"The {len(top)} most fragile of {len(frame)} units" if len(top) < len(frame) else ""
        note = "Error bars: one standard error of the mean over tokens, which are taken as independent."
        blocks.append(Figures((Figure(svg, title, axis),), note=note))
    shares = [numbers(frame, name)[order] for name in ("cumulative_size_share", "cumulative_share")]
    if len(frame) > 1 and all(np.isfinite(share).all() for share in shares) and shares[1][-1] > 0:
        svg = figures.cumulative_curve(*shares)
        legend = (
            Swatch("--series-0", "line", "units, most fragile first"),
            Swatch("--yardstick", "dash", "if every byte were as fragile"),
        )
        said = "Share of the summed damage over share of bytes"
        blocks.append(Figures((Figure(svg, said, said),), legend))
    blocks += [_ranking(report, frame, measure, order), *_additivity(report)]
    facts = report.provenance.get("sensitivity")  # of a recipe, whose own text is another
    facts = facts if isinstance(facts, Mapping) else report.provenance
    tokens, text = facts.get("tokens"), visible(facts.get("text"))
    sample = f" Measured on {number(tokens)} tokens of {text}." if tokens and text else ""
    lead = (
        f"Each unit was quantized by itself while all the rest stayed as it is. What it costs the model is its "
        f"fragility: lower is better.{sample}"
    )
    return Section("sensitivity", "Fragile tensors", lead, tuple(blocks))


def _ranking(report: Report, frame: pd.DataFrame, measure: str, order: np.ndarray) -> Table:
    columns = ("tensors", "share", "cumulative_share", "cumulative_size_share")
    heads = [head(report, "sensitivity", "rank"), head(report, "sensitivity", "unit", numeric=False)]
    heads += [head(report, "sensitivity", "layer"), head(report, "sensitivity", "size_bytes")]
    heads += [head(report, "sensitivity", measure), *(head(report, "sensitivity", name) for name in columns)]
    layers, sizes = numbers(frame, "layer"), numbers(frame, "size_bytes")
    values, sems = numbers(frame, measure), numbers(frame, f"{measure}_sem")
    data = [numbers(frame, name) for name in columns]
    names = texts(frame, "unit")
    rows = []
    for place, k in enumerate(order, 1):
        cells = [Cell(number(place), "num"), Cell(names[k], "name"), Cell(number(layers[k]), "num")]
        cells += [Cell(size(sizes[k]) if np.isfinite(sizes[k]) else MISSING, "num")]
        cells += [Cell(plus_minus(values[k], sems[k]), "num"), Cell(number(data[0][k]), "num")]
        cells += [Cell(f"{100 * column[k]:.2f} %" if np.isfinite(column[k]) else MISSING, "num") for column in data[1:]]
        rows.append(tuple(cells))
    return Table("All units by damage", tuple(heads), tuple(rows), fold=f"Show all {len(frame)} units")


def _additivity(report: Report) -> tuple[Block, ...]:
    frame = frame_of(report, "additivity")
    if frame is None:
        return ()
    measure, _ = _measure(frame)
    values, sems = numbers(frame, measure), numbers(frame, f"{measure}_sem")
    heads = (head(report, "additivity", "what", numeric=False), head(report, "additivity", measure))
    rows = tuple(
        (Cell(what, "strong"), Cell(plus_minus(values[k], sems[k]), "num"))
        for k, what in enumerate(texts(frame, "what"))
    )
    return (Table("Do single damages add up?", heads, rows),)


def correlation(report: Report) -> Section | None:
    """Return the rank correlation of every statistic with the damage, as intervals and as a table."""
    frame = frame_of(report, "correlation")
    if frame is None or not np.isfinite(numbers(frame, "rho")).any():
        return None
    rho, low, high = (numbers(frame, name) for name in ("rho", "rho_low", "rho_high"))
    names, outcomes = texts(frame, "statistic"), texts(frame, "outcome")
    order = [k for k in np.argsort(-np.abs(np.nan_to_num(rho)), kind="stable") if np.isfinite(rho[k])]
    shown = [
        figures.Interval(names[k], float(rho[k]), float(low[k]), float(high[k]), outcomes[k] == "wrong way")
        for k in order[:_INTERVALS]
    ]
    legend = (
        Swatch("--series-0", "line", "interval without 0"),
        Swatch("--series-1", "line", "points the wrong way"),
        Swatch("--muted", "line", "interval holds 0"),
    )
    axis = "Rank correlation of each statistic with the damage"
    more = f" The strongest {_INTERVALS} of {len(order)} are drawn." if len(order) > _INTERVALS else ""
    note = (
        "Intervals: Fisher's z with the standard error of Bonett and Wright, tensors taken as independent. With many "
        f"statistics some correlate by chance: p (Holm) is corrected for their number.{more}"
    )
    chart = Figures((Figure(figures.correlation_intervals(shown), "", axis),), legend, note=note)
    lead = (
        "Which numbers that cost nothing foretell which tensors are fragile on this model, over all tensors and within "
        "roles. A statistic that says nothing here is no reason to spare a tensor."
    )
    return Section("correlation", "What foretells fragility", lead, (chart, _correlations(report, frame, order)))


def _correlations(report: Report, frame: pd.DataFrame, order: list[int]) -> Table:
    numeric = ("n", "rho", "rho_low", "rho_high", "rho_within_role", "p_value", "p_holm")
    words = ("expected", "same_ranking")
    heads = [head(report, "correlation", "statistic", numeric=False)]
    heads += [head(report, "correlation", "outcome", numeric=False)]
    heads += [head(report, "correlation", name) for name in numeric]
    heads += [head(report, "correlation", name, numeric=False) for name in words]
    data = {name: numbers(frame, name) for name in numeric}
    said = {name: texts(frame, name) for name in ("statistic", "outcome", *words)}
    rows = []
    for k in order:
        outcome = said["outcome"][k]
        cells = [Cell(said["statistic"][k], "name"), Cell(outcome, _LOOKS.get(outcome, ""))]
        cells += [Cell(number(data[name][k], 2), "num") for name in numeric]
        cells += [Cell(said[name][k], "words") for name in words]
        rows.append(tuple(cells))
    return Table("Correlations", tuple(heads), tuple(rows), fold=f"Show all {len(order)} statistics")


def recipe(report: Report) -> Section | None:
    """Return what a recipe costs, foreseen and measured, and which weights it keeps."""
    frame, chosen = frame_of(report, "recipe_summary"), frame_of(report, "recipe")
    if frame is None:
        return None
    measured = np.isfinite(numbers(frame, "measured")).any()
    columns = ["kept", "bits_per_weight", "model_bytes", "predicted"]
    heads = [head(report, "recipe_summary", "what", numeric=False)]
    heads += [
        head(report, "recipe_summary", name) for name in [*columns, *(["measured", "change"] if measured else [])]
    ]
    data = {h.name: (numbers(frame, h.name), numbers(frame, f"{h.name}_sem")) for h in heads[1:]}
    rows = []
    for k, what in enumerate(texts(frame, "what")):
        cells = [Cell(what, "strong")]
        for name, (values, sems) in data.items():
            text = (
                size(values[k]) if name == "model_bytes" and np.isfinite(values[k]) else plus_minus(values[k], sems[k])
            )
            cells.append(Cell(text, "num"))
        rows.append(tuple(cells))
    note = "Predicted: single damages added up, which is an assumption." + (
        " Measured: these very models on text, ± one standard error; the change is paired over tokens."
        if measured
        else ""
    )
    blocks: list[Block] = [Table("The recipe beside its extremes", tuple(heads), tuple(rows), note)]
    blocks += [] if chosen is None else [_kept(report, chosen)]
    files = ", ".join(visible(name) for name in _texts_of(report, "files"))
    written = f" Written for other tools: {files}." if files else ""
    lead = f"Which weights stay in higher precision, so that each byte spent avoids most damage.{written}"
    return Section("recipe", "Mixed-precision recipe", lead, tuple(blocks))


def _kept(report: Report, frame: pd.DataFrame) -> Table:
    kept = [k for k, flag in enumerate(flags(frame, "kept")) if flag]
    names = ("tensor", "format", "damage")
    heads = tuple(head(report, "recipe", name, numeric=name == "damage") for name in names)
    tensors, formats, damages = texts(frame, "tensor"), texts(frame, "format"), numbers(frame, "damage")
    rows = tuple((Cell(tensors[k], "name"), Cell(formats[k]), Cell(number(damages[k]), "num")) for k in kept)
    if not rows:
        return Table("No weight is kept in higher precision", (Head("tensor"),), (), titled=True)
    return Table("Kept in higher precision", heads, rows, fold=f"Show the {len(rows)} weights kept")


def _texts_of(report: Report, key: str) -> list[str]:
    values = report.provenance.get(key)
    return [str(value) for value in values] if isinstance(values, list | tuple) and report.kind == "recipe" else []
