"""The section on where the gain comes from: spaces, rules, layers and methods, exponents chosen, and output errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.report import figures, gain_figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Head, Section, Swatch, Table
from vrscope.report.columns import frame_of, head, numbers, texts
from vrscope.report.gain_rows import GainRows, gain_unit, read_gains
from vrscope.report.output_error import output_error
from vrscope.report.removed import removed
from vrscope.report.svg import HEAT, VARIABLES
from vrscope.report.text import MISSING, change, number
from vrscope.tables import Report

Floats = NDArray[np.float64]
_FORMATS, _RULES, _TOP, _FURTHEST = 6, 8, 10, 12
_SHARES = (1e-12, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75)
_CLASSES = ("none", "up to 1 %", "1 to 3 %", "3 to 10 %", "10 to 25 %", "25 to 50 %", "50 to 75 %", "above 75 %")
_SIDES = (Swatch("--series-0", "box", "original"), Swatch("--series-1", "box", "with the scales chosen"))


def gains(report: Report) -> Section | None:
    """Return which spaces earned the gain, from which method, with which exponents, and what it does to each layer."""
    rows = read_gains(report)
    exponents, maps = _exponents(report)
    if rows is None:
        return None
    unit = gain_unit(report)
    blocks: list[Block] = [_totals(report, rows, unit), *_charts(rows, unit), _top(report, rows, unit)]
    blocks += [_methods(rows), *exponents, *output_error(report, rows.names())]
    lead = (
        "Predicted damage splits the cost of a format over the spaces: for everything that reads a space, half the "
        "importance of each rounding error times its square. It is computed on calibration text that was held out from "
        "choosing the scales, so it foretells the measured damage and does not replace it."
    )
    return Section("gains", "Where the gain comes from", lead, tuple(blocks), maps)


def _totals(report: Report, rows: GainRows, unit: str) -> Table:
    """Set the predicted damage of each format beside the share that was measured to be gone."""
    measured = _measured(report)
    heads = [Head("format"), Head("predicted before", unit, "Sum over all spaces.", numeric=True)]
    heads += [Head("predicted after", unit, "Sum over all spaces.", numeric=True)]
    heads += [Head("predicted to go", "share", "Of the predicted damage.", numeric=True)]
    if measured:
        meaning = "Of the damage of the whole model, ± one standard error, paired over tokens."
        heads.append(Head("measured to be gone", "share", meaning, numeric=True))
    filled = []
    for name in rows.names():
        before, after = rows.sums(rows.of(name))
        cells = [Cell(name or MISSING, "name"), Cell(number(before), "num"), Cell(number(after), "num")]
        cells.append(Cell(_share(before - after, before), "num"))
        if measured:
            cells.append(measured.get(name, Cell(MISSING, "num")))
        filled.append(tuple(cells))
    return Table("Predicted and measured", tuple(heads), tuple(filled))


def _measured(report: Report) -> dict[str, Cell]:
    """Return for every format by what share the damage of the second checkpoint is lower than that of the first."""
    frame = frame_of(report, "damage")
    if frame is None:
        return {}
    keys, formats = texts(frame, "checkpoint"), texts(frame, "format")
    names = list(dict.fromkeys(keys))
    measure = "kl" if np.isfinite(numbers(frame, "kl")).any() else "relative_error"
    columns = {name: numbers(frame, name) for name in (measure, f"{measure}_sem", "change", "change_sem")}
    where = {pair: k for k, pair in enumerate(zip(keys, formats, strict=True))}
    found = {}
    for name in dict.fromkeys(formats) if len(names) > 1 else ():
        pair = [where.get((key, name)) for key in names[:2]]
        first, other = ({c: v[k] for c, v in columns.items()} if k is not None else {} for k in pair)
        share = removed(first, other, measure)
        if share is not None:
            sign = "−" if share.share < 0 else ""
            look = "muted" if not share.clear else "good" if share.share > 0 else "bad"
            note = "" if share.clear else "within noise"
            found[name] = Cell(f"{sign}{share.percent}", f"num {look}", note=note)
    return found


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %".replace("-", "−") if whole > 0 else MISSING


def _charts(rows: GainRows, unit: str) -> list[Block]:
    """Return predicted damage by rule and by layer, a panel per format."""
    axis = f"predicted damage, {unit}"
    by_rule, by_layer = [], []
    for k, name in enumerate(rows.names()[:_FORMATS]):
        at = rows.of(name)
        rules = _grouped([rows.rules[i] or MISSING for i in at])
        sums = {rule: rows.sums([at[i] for i in places]) for rule, places in rules.items()}
        kept = sorted((rule for rule in sums if max(sums[rule]) > 0), key=lambda rule: -sums[rule][0])[:_RULES]
        if not kept:
            continue
        sides = _sides([sums[rule] for rule in kept])
        words = f"{_share(float(sides[0].sum() - sides[1].sum()), float(sides[0].sum()))} predicted to go"
        by_rule.append(Figure(gain_figures.rule_bars(kept, sides, axis, f"rule-{k}"), name or MISSING, "", words))
        layers = _grouped([int(rows.layers[i]) for i in at if np.isfinite(rows.layers[i])])
        if len(layers) > 1:
            inside = [i for i in at if np.isfinite(rows.layers[i])]
            order = sorted(layers)
            sides = _sides([rows.sums([inside[i] for i in layers[layer]]) for layer in order])
            svg = gain_figures.layer_bars(np.array(order, np.float64), sides, unit, f"layer-{k}")
            by_layer.append(Figure(svg, name or MISSING, ""))
    note = "Panels have scales of their own. Sums over spaces."
    if len(rows.names()) > _FORMATS:
        note += f" {_FORMATS} of {number(len(rows.names()))} formats are drawn."
    titles = ("Predicted damage by what ties the scales", "Predicted damage by layer")
    return [
        Figures(tuple(items), _SIDES, small=True, note=note, title=title)
        for items, title in zip((by_rule, by_layer), titles, strict=True)
        if items
    ]


def _grouped(keys: Sequence[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for k, key in enumerate(keys):
        groups.setdefault(key, []).append(k)
    return groups


def _sides(sums: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    before, after = np.array(sums, np.float64).reshape(-1, 2).T
    return before, after


def _top(report: Report, rows: GainRows, unit: str) -> Table:
    """Return the spaces that earned most, over all formats together."""
    gained = np.nan_to_num(rows.before - rows.after)
    groups = _grouped(rows.spaces)
    earned = {space: float(gained[at].sum()) for space, at in groups.items()}
    total = sum(earned.values())
    best = [space for space in sorted(earned, key=lambda s: -earned[s]) if earned[space] > 0][:_TOP]
    names = rows.names()
    heads = [head(report, "gains", name, numeric=False) for name in ("space", "rule")]
    heads.append(head(report, "gains", "method", numeric=False, label="scales from"))
    heads += [Head(name or MISSING, unit, "Predicted damage before and after.", numeric=True) for name in names]
    heads.append(Head("share of the gain", "", "Of what all spaces gain in all formats together.", numeric=True))
    heads.append(head(report, "gains", "reason", numeric=False, label="why"))
    filled = []
    for space in best:
        at = groups[space]
        by_format = {rows.formats[k]: k for k in at}
        cells = [Cell(space, "name"), Cell(rows.rules[at[0]]), Cell(_origin(rows, at[0]))]
        for name in names:
            k = by_format.get(name)
            words = MISSING if k is None else f"{number(rows.before[k], 3)} → {number(rows.after[k], 3)}"
            moved = "" if k is None else change(rows.before[k], rows.after[k])
            cells.append(Cell(words, "num", note=moved if "%" in moved else ""))
        cells += [Cell(_share(earned[space], total), "num"), Cell(rows.reasons[at[0]], "words")]
        filled.append(tuple(cells))
    caption = (
        f"The {len(best)} spaces that earned most, of {number(len(groups))}" if best else "No space gains anything"
    )
    return Table(caption, tuple(heads) if best else (Head("space"),), tuple(filled))


def _origin(rows: GainRows, row: int) -> str:
    stage = rows.stages[row]
    return f"{rows.methods[row] or MISSING}, {stage}" if stage else rows.methods[row] or MISSING


def _methods(rows: GainRows) -> Table:
    """Return how many spaces got their scales from which method, how they were found, and what that earned."""
    gained = np.nan_to_num(rows.before - rows.after)
    heads = (
        Head("scales from"),
        Head("spaces", "", "Spaces for which this method was best.", numeric=True),
        Head("by rule"),
        Head("found by"),
        Head("share of the gain", "", "Of what all spaces gain in all formats together.", numeric=True),
    )
    groups = _grouped(rows.methods)
    filled = []
    for method, at in sorted(groups.items(), key=lambda item: -len({rows.spaces[k] for k in item[1]})):
        first = {rows.spaces[k]: k for k in reversed(at)}
        counts = [_counted([column[k] for k in sorted(first.values())]) for column in (rows.rules, rows.stages)]
        words = "left alone" if method == "none" else method or MISSING
        share = _share(float(gained[at].sum()), float(gained.sum()))
        cells = (Cell(words, "strong"), Cell(number(len(first)), "num"), *(Cell(c or MISSING) for c in counts))
        filled.append((*cells, Cell(share, "num")))
    return Table("Spaces by the method that won", heads, tuple(filled))


def _counted(values: Sequence[str]) -> str:
    """Return "norm fold 40, v.o 20"; empty values are not counted."""
    return ", ".join(f"{value} {number(len(at))}" for value, at in _grouped(values).items() if value)


def _exponents(report: Report) -> tuple[list[Block], dict[str, Any]]:
    """Return a map of layer by exponent for each rule, and what the script tells of its cells."""
    frame = frame_of(report, "exponents")
    if frame is None:
        return [], {}
    rules, layers = texts(frame, "rule"), numbers(frame, "layer")
    values, counts = numbers(frame, "exponent"), numbers(frame, "count")
    used = [k for k in range(len(rules)) if np.isfinite([layers[k], values[k]]).all() and counts[k] > 0]
    blocks: list[Block] = []
    maps: dict[str, Any] = {}
    for place, (rule, at) in enumerate(list(_grouped([rules[k] for k in used]).items())[:_RULES]):
        rows = [used[k] for k in at]
        far = np.clip(np.rint(values[rows]), -_FURTHEST, _FURTHEST).astype(int)
        if not far.any():
            continue  # a rule whose scales are all 1 has nothing to show
        name = f"exponents-{place}"
        block, maps[name] = _exponent_map(rule or MISSING, (far, layers[rows], counts[rows]), name)
        blocks.append(block)
    if blocks:
        blocks.append(_exponent_table(rules, values, counts))
    return blocks, maps


def _exponent_map(rule: str, data: tuple[NDArray[np.int64], Floats, Floats], name: str) -> tuple[Figures, Any]:
    exponents, layers, counts = data
    rows, columns = list(range(exponents.max(), exponents.min() - 1, -1)), sorted({int(x) for x in layers})
    grid = np.zeros((len(rows), len(columns)))
    at = {layer: k for k, layer in enumerate(columns)}
    for exponent, layer, count in zip(exponents, layers, counts, strict=True):
        grid[rows[0] - exponent, at[int(layer)]] += count
    grid = grid / grid.sum(axis=0)
    labels = [f"k = {number(k)}" if k <= 0 else f"k = +{number(k)}" for k in rows]
    moved = 1 - float(counts[exponents == 0].sum() / counts.sum())
    title = f"Exponents chosen, {rule}: share of the scales 2ᵏ in each layer"
    label = f"{title}. {100 * moved:.1f} percent of {number(counts.sum())} scales are not 1."
    heat = figures.Heat(tuple(labels), tuple(columns), grid, _SHARES, HEAT[: len(_SHARES) + 1])
    svg, box = figures.heat_map(heat, name, label)
    hover = {
        "title": "share of scales",
        "box": [round(x, 2) for x in box],
        "rows": labels,
        "columns": columns,
        "values": [[float(f"{x:.4g}") for x in row] for row in grid],
    }
    legend = tuple(Swatch(VARIABLES[c], "box", words) for c, words in zip(heat.colours, _CLASSES, strict=True))
    note = f"{100 * moved:.1f} % of {number(counts.sum())} scales are not 1."
    return Figures((Figure(svg, title, label, hover=name),), legend, note=note), hover


def _exponent_table(rules: list[str], values: Floats, counts: Floats) -> Table:
    """Count every exponent over all layers, also of spaces outside them."""
    groups = _grouped(rules)
    found = sorted({int(k) for k in np.clip(np.rint(values[np.isfinite(values)]), -_FURTHEST, _FURTHEST)}, reverse=True)
    heads = [Head("exponent", "log2", f"Those beyond ±{_FURTHEST} count as ±{_FURTHEST}.", numeric=True)]
    heads += [Head(rule or MISSING, "scales", "", numeric=True) for rule in groups]
    near = np.clip(np.rint(values), -_FURTHEST, _FURTHEST)
    rows = tuple(
        (
            Cell(number(k), "num"),
            *(Cell(number(np.nansum(counts[at][near[at] == k])), "num") for at in groups.values()),
        )
        for k in found
    )
    return Table("Scales by exponent", tuple(heads), rows, fold="Show how often each exponent occurs")
