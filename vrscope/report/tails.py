"""Sections on the tails of the weights: maps of kurtosis and outliers, and histograms of the worst tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.report import figures
from vrscope.report.blocks import Figure, Figures, Section, Swatch
from vrscope.report.columns import frame_of, kind_order, numbers, texts
from vrscope.report.svg import COLD, HEAT, VARIABLES
from vrscope.report.text import MISSING, number, tick

if TYPE_CHECKING:
    import pandas as pd

    from vrscope.tables import Report

_HISTOGRAMS = 12
Floats = NDArray[np.float64]


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
    maps: list[tuple[str, str, Floats, tuple[float, ...]]] = [
        ("kurtosis", "Excess kurtosis (normal = 0)", numbers(frame, "kurtosis_excess"), _KURTOSIS_EDGES)
    ]
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
        "Where the tails are: a few weights far from the rest stretch the quantization scale of their block for all "
        "the others. Darker cells (brighter on a dark page) have heavier tails; point at a cell for its number."
    )
    return Section("tails", "Kurtosis and outliers by layer and role", lead, tuple(blocks), payload)


def _map(
    frame: pd.DataFrame, values: Floats, name: str, title: str, edges: tuple[float, ...]
) -> tuple[Figures, dict[str, object]]:
    roles, kinds, layers = texts(frame, "role"), texts(frame, "kind"), numbers(frame, "layer")
    first = texts(frame, "checkpoint")
    used = [k for k in range(len(roles)) if np.isfinite(layers[k]) and first[k] == first[0]]
    rank = {roles[k]: kind_order(kinds[k]) for k in reversed(used)}
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
    words = [tick(edge) for edge in edges]
    first = "0" if edges[0] == _SHARE_EDGES[0] else f"< {words[0]}"
    words[0] = "0" if first == "0" else words[0]
    return [first, *(f"{a} to {b}" for a, b in pairwise(words)), f"> {words[-1]}"]


def histograms(report: Report) -> Section | None:
    """Return histograms of the worst tensors, each beside the normal curve of the same std."""
    frame, tensors = frame_of(report, "histograms"), frame_of(report, "tensors")
    if frame is None or not {"edges", "counts"} <= set(frame.columns):
        return None
    about = (
        {} if tensors is None else dict(zip(texts(tensors, "tensor"), numbers(tensors, "kurtosis_excess"), strict=True))
    )
    items: list[Figure] = []
    outside = (numbers(frame, "below_count"), numbers(frame, "above_count"))
    for name, bounds, found, low, high in zip(
        texts(frame, "tensor"), frame["edges"], frame["counts"], *outside, strict=True
    ):
        edges, counts = _bins(bounds), _bins(found)
        if len(counts) < 1 or len(edges) != len(counts) + 1 or counts.sum() <= 0 or np.any(np.diff(edges) <= 0):
            continue
        rest = int(np.nansum([low, high]))
        words = [f"excess kurtosis {number(about[name], 3)}"] if name in about else []
        words += [f"{number(rest)} weights beyond the axis"] if rest else []
        detail = "; ".join(words)
        label = (
            f"Histogram of {number(counts.sum())} weights from {edges[0]:.1f} to {edges[-1]:.1f} standard deviations"
        )
        svg = figures.histogram_panel(
            edges, counts, counts.sum() + rest, f"histogram-{len(items)}", f"{label}. {detail}"
        )
        items.append(Figure(svg, name, label, detail))
        if len(items) == _HISTOGRAMS:
            break
    if not items:
        return None
    lead = (
        "The tensors with the heaviest tails, each in standard deviations from its own mean, counts on a log axis. "
        "Bars outside the dashed curve are weights that a normal distribution would not have."
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
