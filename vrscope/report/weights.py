"""Sections on the weights themselves: std over depth, kurtosis and outliers, histograms, and every tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.report import figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Section, Swatch, Table
from vrscope.report.columns import frame_of, head, numbers, texts
from vrscope.report.headline import checkpoint_names
from vrscope.report.svg import COLD, HEAT, VARIABLES
from vrscope.report.text import MISSING, number, plus_minus

if TYPE_CHECKING:
    import pandas as pd

    from vrscope.tables import Report

_PANELS = 24  # roles drawn; the law table lists all
_HISTOGRAMS = 12
_ORDER = ("linear", "head", "embed", "conv", "norm", "bias")
Floats = NDArray[np.float64]


def depth(report: Report) -> Section | None:
    """Return std over layers, one panel per role, with the fitted depth law and the TVR target."""
    frame, laws = frame_of(report, "tensors"), frame_of(report, "depth_law")
    blocks: list[Block] = []
    panels = None if frame is None else _depth_panels(report, frame, laws)
    if panels is not None:
        blocks.append(panels)
    if laws is not None:
        blocks.append(_law_table(report, laws))
    if not blocks:
        return None
    lead = (
        "How wide the weights of each role are, layer by layer. LIR (layer index rescaling) starts layer l at σ/√l, which "
        "is p = 0.5 in the fitted law std = σ₁·l⁻ᵖ; weights that keep their width over depth have p = 0."
    )
    return Section("depth", "Standard deviation by layer and role", lead, tuple(blocks))


def _depth_panels(report: Report, frame: pd.DataFrame, laws: pd.DataFrame | None) -> Figures | None:
    lines = _depth_lines(frame)
    kinds = dict(zip(texts(frame, "role"), texts(frame, "kind"), strict=True))
    fitted, sems = _laws(laws)
    keys = checkpoint_names(report, texts(frame, "checkpoint"))
    roles = list(dict.fromkeys(role for role, _, _ in lines))
    roles = [role for role in roles if role in fitted or not fitted]
    roles.sort(key=lambda role: _rank(kinds[role]))
    if not roles:
        return None
    items, targeted = [], False
    for k, role in enumerate(roles[:_PANELS]):
        mine = [lines[role, key, "std"] for key in keys if (role, key, "std") in lines]
        target = next((lines[role, key, "target"] for key in keys if (role, key, "target") in lines), None)
        if kinds[role] not in {"linear", "", "other"}:
            target = None  # the rule is for matrices
        targeted = targeted or target is not None
        alike = [line for (r, _, what), line in lines.items() if kinds[r] == kinds[role] and what == "std"]
        shared = [*alike, *([target] if target is not None else [])]
        svg = figures.depth_panel(f"depth-{k}", mine, fitted.get(role), target, _limits(shared))
        law = fitted.get(role)
        detail = "" if law is None else f"p = {plus_minus(law.p, sems[role])}"
        items.append(Figure(svg, role or MISSING, "", detail))
    legend = [Swatch(f"--series-{k}", "line", f"std, {name}") for k, name in enumerate(keys.values()) if k < 5]
    if fitted:
        legend.append(Swatch("--law", "dash", "fitted law σ₁·l⁻ᵖ"))
        legend.append(Swatch("--yardstick", "dot", "LIR yardstick σ₁/√l"))
    if targeted:
        legend.append(Swatch("--target", "line", "TVR target"))
    note = "Panels of one kind share their scale. Where a layer has several tensors of a role, the line is their median."
    if len(roles) > _PANELS:
        note += f" {_PANELS} of {number(len(roles))} roles are drawn; the table below has them all."
    return Figures(tuple(items), tuple(legend), small=True, note=note)


def _depth_lines(frame: pd.DataFrame) -> dict[tuple[str, str, str], figures.DepthLine]:
    """Collect (role, checkpoint, "std" or "target") to a line over layers counted from 1; zero std cannot be drawn."""
    layers, std, ratio = (numbers(frame, c) for c in ("layer", "std", "tvr_ratio"))
    groups: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for k, (role, key) in enumerate(zip(texts(frame, "role"), texts(frame, "checkpoint"), strict=True)):
        if np.isnan(layers[k]) or not std[k] > 0:
            continue
        layer = int(layers[k]) + 1
        groups.setdefault((role, key, "std"), {}).setdefault(layer, []).append(float(std[k]))
        if ratio[k] > 0:
            groups.setdefault((role, key, "target"), {}).setdefault(layer, []).append(float(std[k] / ratio[k]))
    return {
        name: figures.DepthLine(
            np.array(sorted(found), dtype=np.float64),
            *(np.array([f(found[layer]) for layer in sorted(found)]) for f in (np.median, np.min, np.max)),
        )
        for name, found in groups.items()
    }


def _limits(lines: list[figures.DepthLine]) -> tuple[float, float]:
    """Return axis limits over all lines, at least a factor of 4 apart."""
    low = min(float(line.low.min()) for line in lines)
    high = max(float(line.high.max()) for line in lines)
    middle, reach = np.sqrt(low * high), max(2.0, 1.25 * np.sqrt(high / low))
    return float(middle / reach), float(middle * reach)


def _laws(frame: pd.DataFrame | None) -> tuple[dict[str, figures.Law], dict[str, float]]:
    if frame is None:
        return {}, {}
    sigma, p, sem = (numbers(frame, c) for c in ("sigma_1", "exponent_p", "exponent_sem"))
    roles = texts(frame, "role")
    good = [k for k in range(len(roles)) if sigma[k] > 0 and np.isfinite(p[k])]
    laws = {roles[k]: figures.Law(float(sigma[k]), float(p[k])) for k in good}
    return laws, {roles[k]: float(sem[k]) for k in good}


def _law_table(report: Report, frame: pd.DataFrame) -> Table:
    p, sem, sigma, square, layers = (
        numbers(frame, c) for c in ("exponent_p", "exponent_sem", "sigma_1", "r_squared", "layers")
    )
    heads = (
        head(report, "depth_law", "role", numeric=False),
        head(report, "depth_law", "layers"),
        head(report, "depth_law", "exponent_p"),
        head(report, "depth_law", "sigma_1"),
        head(report, "depth_law", "r_squared"),
    )
    rows = tuple(
        (
            Cell(role or MISSING, "name"),
            Cell(number(layers[k]), "num"),
            Cell(plus_minus(p[k], sem[k]), "num"),
            Cell(number(sigma[k]), "num"),
            Cell(number(square[k], 3), "num"),
        )
        for k, role in enumerate(texts(frame, "role"))
    )
    return Table("Fitted depth law per role (LIR: p = 0.5; flat: p = 0)", heads, rows)


_KURTOSIS_EDGES = (-1.0, -0.3, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_SHARE_EDGES = (1e-12, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_PEAK_EDGES = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 48.0)


def tails(report: Report) -> Section | None:
    """Return two maps of layer by role: excess kurtosis, and outliers."""
    frame = frame_of(report, "tensors")
    if frame is None or not np.isfinite(numbers(frame, "layer")).any():
        return None
    share = numbers(frame, "outlier_share_6sigma")
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = numbers(frame, "absmax") / numbers(frame, "std")
    peak = np.where(np.isfinite(peak), peak, np.nan)
    maps = [("kurtosis", "Excess kurtosis (normal = 0)", numbers(frame, "kurtosis_excess"), _KURTOSIS_EDGES)]
    if np.isfinite(share).any():
        maps.append(("outliers", "Share of weights beyond 6 standard deviations", share, _SHARE_EDGES))
    else:
        maps.append(("outliers", "Largest |weight| over std", peak, _PEAK_EDGES))
    blocks, payload = [], {}
    for name, title, values, edges in maps:
        if np.isfinite(values).any():
            block, hover = _map(frame, values, name, title, edges)
            blocks.append(block)
            payload[name] = hover
    if not blocks:
        return None
    lead = (
        "Where the tails are: a few weights far from the rest stretch the quantization scale of their block for all the "
        "others. Darker cells (brighter on a dark page) have heavier tails; point at a cell for its number."
    )
    return Section("tails", "Kurtosis and outliers by layer and role", lead, tuple(blocks), payload)


def _map(
    frame: pd.DataFrame, values: Floats, name: str, title: str, edges: tuple[float, ...]
) -> tuple[Figures, dict[str, object]]:
    roles, kinds, layers = texts(frame, "role"), texts(frame, "kind"), numbers(frame, "layer")
    first = texts(frame, "checkpoint")
    used = [k for k in range(len(roles)) if np.isfinite(layers[k]) and first[k] == first[0]]
    rank = {roles[k]: _rank(kinds[k]) for k in reversed(used)}
    rows = sorted(dict.fromkeys(roles[k] for k in used), key=lambda role: rank[role])
    columns = sorted({int(layers[k]) for k in used})
    at_row, at_column = ({x: k for k, x in enumerate(found)} for found in (rows, columns))
    grid = np.full((len(rows), len(columns)), np.nan)
    for k in used:
        place = (at_row[roles[k]], at_column[int(layers[k])])
        if np.isnan(grid[place]) or abs(values[k]) > abs(grid[place]):
            grid[place] = values[k]
    cold = COLD[::-1] if edges[0] < 0 else ()
    colours = (*cold, *HEAT)[: len(edges) + 1]
    worst = np.unravel_index(int(np.nanargmax(np.where(np.isnan(grid), -np.inf, np.abs(grid)))), grid.shape)
    peak = f"largest {number(grid[worst])} in layer {columns[worst[1]]}, {rows[worst[0]]}"
    heat = figures.Heat(tuple(r or MISSING for r in rows), tuple(columns), grid, edges, colours)
    label = f"{title} for {len(rows)} roles in {len(columns)} layers; {peak}."
    svg, box = figures.heat_map(heat, f"heat-{name}", label)
    hover: dict[str, object] = {
        "title": title,
        "box": [round(x, 2) for x in box],
        "rows": rows,
        "columns": columns,
        "values": [[None if np.isnan(x) else float(f"{x:.4g}") for x in row] for row in grid],
    }
    legend = tuple(
        Swatch(VARIABLES[colour], "box", words) for colour, words in zip(colours, _classes(edges), strict=True)
    )
    note = f"{peak[0].upper()}{peak[1:]}. Where a cell stands for several tensors, it shows the largest."
    return Figures((Figure(svg, title, label, hover=name),), legend, note=note), hover


def _classes(edges: tuple[float, ...]) -> list[str]:
    words = [number(edge, 3).replace("1.0×", "").replace("1×", "") for edge in edges]
    first = "0" if edges[0] == _SHARE_EDGES[0] else f"< {words[0]}"
    words[0] = "0" if first == "0" else words[0]
    return [first, *(f"{a} to {b}" for a, b in zip(words, words[1:], strict=False)), f"> {words[-1]}"]


def histograms(report: Report) -> Section | None:
    """Return histograms of the worst tensors, each beside the normal curve of the same std."""
    frame, tensors = frame_of(report, "histograms"), frame_of(report, "tensors")
    if frame is None or not {"edges", "counts"} <= set(frame.columns):
        return None
    about = {} if tensors is None else dict(zip(texts(tensors, "tensor"), numbers(tensors, "kurtosis_excess"), strict=True))
    items = []
    for name, left, high in zip(texts(frame, "tensor"), frame["edges"], frame["counts"], strict=True):
        edges, counts = _bins(left), _bins(high)
        if len(counts) < 1 or len(edges) != len(counts) + 1 or counts.sum() <= 0 or np.any(np.diff(edges) <= 0):
            continue
        detail = f"excess kurtosis {number(about[name], 3)}" if name in about else ""
        label = f"Histogram of {number(counts.sum())} weights from {edges[0]:.1f} to {edges[-1]:.1f} standard deviations"
        svg = figures.histogram_panel(edges, counts, f"histogram-{len(items)}", f"{label}. {detail}")
        items.append(Figure(svg, name, label, detail))
        if len(items) == _HISTOGRAMS:
            break
    if not items:
        return None
    lead = (
        "The tensors with the heaviest tails, in units of their own std, counts on a log axis. Bars outside the dashed "
        "curve are weights that a normal distribution would not have."
    )
    legend = (Swatch("--series-0", "box", "weights"), Swatch("--law", "dash", "normal curve of the same std"))
    return Section("histograms", "Histograms of the worst tensors", lead, (Figures(tuple(items), legend, small=True),))


def _bins(value: object) -> Floats:
    """Return a list of bin edges or counts as an array, empty if it is not a list of finite numbers."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(0)
    return found if found.ndim == 1 and np.isfinite(found).all() else np.empty(0)


def _rank(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


