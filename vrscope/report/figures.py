"""The figures of the page, each a function from plain numbers to an SVG string."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.report.svg import INK, LAW, LINE, MUTED, SERIES, TARGET, YARDSTICK, canvas, drawing, to_svg
from vrscope.report.text import number, plus_minus, shorten, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bars:
    """Values with standard errors for one checkpoint: one of each per row, NaN where not measured."""

    name: str
    values: Floats
    sems: Floats


@dataclass(frozen=True, slots=True)
class DepthLine:
    """Std of one role in one checkpoint: layers counted from 1, and median, smallest and largest std in each."""

    layers: Floats
    middle: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, slots=True)
class Law:
    """The fitted law `sigma_1 * l**-p`."""

    sigma_1: float
    p: float


@dataclass(frozen=True, slots=True)
class Heat:
    """A map of cells: `values` of shape `(roles, layers)`, class borders, and one colour per class."""

    roles: tuple[str, ...]
    layers: tuple[int, ...]
    values: Floats
    edges: tuple[float, ...]
    colours: tuple[str, ...]


def damage_bars(groups: Sequence[Sequence[int]], rows: Sequence[str], bars: Sequence[Bars], unit: str) -> str:
    """Return horizontal grouped bars with error bars; each group of rows has a panel and a scale of its own."""
    step = 18 * len(bars) + 16
    heights = [len(group) * step + 8 for group in groups]
    total = sum(heights) + 46 * len(groups)
    label = f"{unit}: " + "; ".join(
        f"{row} " + ", ".join(f"{b.name} {plus_minus(b.values[k], b.sems[k])}" for b in bars)
        for k, row in enumerate(rows)
    )
    with drawing():
        figure = canvas(720, total)
        left = 16 + 6.8 * max(len(shorten(row, 18)) for row in rows)
        top = total
        for group, height in zip(groups, heights, strict=True):
            top -= height
            axes = figure.add_axes((left / 720, top / total, (704 - left) / 720, height / total))
            _bar_panel(axes, group, rows, bars)
            axes.set_xlabel(unit)
            top -= 46
        return to_svg(figure, label, "damage")


def _bar_panel(axes: Axes, group: Sequence[int], rows: Sequence[str], bars: Sequence[Bars]) -> None:
    width = 0.8 / len(bars)
    largest = 0.0
    for k, series in enumerate(bars):
        colour = SERIES[min(k, len(SERIES) - 1)]
        for place, row in enumerate(group):
            value, sem = float(series.values[row]), float(series.sems[row])
            if math.isnan(value):
                continue
            sem = 0.0 if math.isnan(sem) else sem
            y = place + (k - (len(bars) - 1) / 2) * width
            axes.barh(y, value, height=width * 0.82, color=colour, linewidth=0)
            axes.errorbar(value, y, xerr=sem, color=INK, linewidth=1, capsize=2.5)
            axes.annotate(
                plus_minus(value, sem),
                (max(value + sem, 0), y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=11.5,
            )
            largest = max(largest, value + sem)
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * largest or 1)
    axes.set_yticks(range(len(group)), [shorten(rows[row], 18) for row in group], color=INK)
    axes.tick_params(axis="y", length=0, labelsize=12)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=6)
    axes.spines["left"].set_color(MUTED)


def depth_panel(
    name: str, lines: Sequence[DepthLine | None], law: Law | None, target: DepthLine | None, limits: tuple[float, float]
) -> str:
    """Return the std of one role over depth on a log axis, with fitted law, LIR yardstick and TVR target."""
    drawn = [(colour, line) for colour, line in zip(SERIES, lines, strict=False) if line is not None]
    last = max(float(line.layers.max()) for _, line in drawn)
    ends = [f"{number(line.middle[0], 3)} to {number(line.middle[-1], 3)}" for _, line in drawn]
    label = f"Standard deviation over {int(last)} layers, first to last: {'; after the plan '.join(ends)}"
    with drawing():
        figure = canvas(300, 186)
        axes = figure.add_axes((52 / 300, 38 / 186, 236 / 300, 140 / 186))
        if target is not None:
            axes.plot(target.layers, target.middle, color=TARGET, linewidth=1.6)
        if law is not None and last > 1:
            depth = np.linspace(1, last, 60)
            axes.plot(depth, law.sigma_1 * depth**-0.5, color=YARDSTICK, linewidth=1.4, linestyle=(0, (1, 2.2)))
            axes.plot(depth, law.sigma_1 * depth**-law.p, color=LAW, linewidth=1.6, linestyle=(0, (5, 3)))
        for colour, line in drawn:
            if np.any(line.high > line.low):
                axes.fill_between(line.layers, line.low, line.high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(line.layers, line.middle, color=colour, linewidth=1.2, marker="o", markersize=3.2)
        margin = max(1.0, last * 0.03)
        axes.set_xlim(1 - margin / 2, last + margin / 2)
        log_axis(axes, limits)
        axes.set_xlabel("layer, counted from 1")
        axes.set_ylabel("std of weights")
        axes.locator_params(axis="x", nbins=6, integer=True)
        return to_svg(figure, label, name)


def magnitude_lines(layers: Floats, lines: Sequence[Floats], label: str) -> str:
    """Return magnitudes over layers on a log axis: the median last, in ink, the others in the colours of series."""
    shown = np.concatenate([line[line > 0] for line in lines])
    low, high = float(shown.min()), float(shown.max())
    with drawing():
        figure = canvas(720, 300)
        axes = figure.add_axes((64 / 720, 42 / 300, 640 / 720, 246 / 300))
        colours = (*SERIES[: len(lines) - 1], INK)
        for colour, line in reversed(list(zip(colours, lines, strict=True))):
            axes.plot(layers, np.where(line > 0, line, np.nan), color=colour, linewidth=1.4, marker="o", markersize=3.4)
        margin = max(0.5, (layers.max() - layers.min()) * 0.02)
        axes.set_xlim(layers.min() - margin, layers.max() + margin)
        log_axis(axes, (low / 1.6, high * 1.6))
        axes.set_xlabel("layer that the hidden state enters, as in the tensor names; the last point leaves the model")
        axes.set_ylabel("magnitude")
        axes.locator_params(axis="x", nbins=16, integer=True)
        return to_svg(figure, label, "magnitudes")


def log_axis(axes: Axes, limits: tuple[float, float]) -> None:
    """Make the y axis of a drawing logarithmic between `limits`, with round ticks."""
    from matplotlib import ticker

    low, high = limits
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.2 else (1,)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=8))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _tick(value: float, _position: int) -> str:
    return tick(float(f"{value:.6g}"))


def heat_map(heat: Heat, name: str, label: str) -> tuple[str, tuple[float, float, float, float]]:
    """Return the map, and the box of its cells in the drawing: x, y, width, height, for the script that names cells."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    rows, columns = heat.values.shape
    tall = 20 if rows <= 24 else 13
    left, width, height = 16 + 6.4 * min(32, max(map(len, heat.roles))), 1000.0, rows * tall
    total = height + 46
    classes = np.digitize(heat.values, heat.edges)
    gap = (0.7 * columns / (width - left), 0.7 / tall) if columns <= 80 else (0.0, 0.0)
    with drawing():
        figure = canvas(width, total)
        axes = figure.add_axes((left / width, 42 / total, (width - left - 8) / width, height / total))
        for k, colour in enumerate(heat.colours):
            cells = np.argwhere((classes == k) & np.isfinite(heat.values))
            if len(cells):
                outline = Outline.make_compound_path(*(_cell(int(c), int(r), gap) for r, c in cells))
                axes.add_patch(PathPatch(outline, facecolor=colour, linewidth=0))
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        axes.grid(visible=False)
        ticks = [k for k in range(columns) if k % max(1, math.ceil(columns / 30)) == 0]
        axes.set_xticks([k + 0.5 for k in ticks], [str(heat.layers[k]) for k in ticks])
        axes.set_yticks([k + 0.5 for k in range(rows)], [shorten(r, 32) for r in heat.roles], color=INK)
        axes.tick_params(length=0, labelsize=12 if tall == 20 else 10)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("layer, numbered as in the tensor names")
        return to_svg(figure, label, name), (left, 4.0, width - left - 8, height)


def _cell(column: int, row: int, gap: tuple[float, float]) -> Any:
    from matplotlib.path import Path as Outline

    x0, y0, x1, y1 = column + gap[0], row + gap[1], column + 1 - gap[0], row + 1 - gap[1]
    return Outline([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], closed=True)


def histogram_panel(edges: Floats, counts: Floats, total: float, name: str, label: str) -> str:
    """Return a histogram over `(weight - mean) / std`, counts on a log axis, with a normal curve of `total` weights."""
    from matplotlib import ticker

    with drawing():
        figure = canvas(300, 180)
        axes = figure.add_axes((50 / 300, 38 / 180, 240 / 300, 136 / 180))
        axes.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=SERIES[0], linewidth=0)
        mass = np.diff([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
        expected = total * mass
        shown = expected >= 0.5
        centres = (edges[1:] + edges[:-1]) / 2
        axes.plot(centres[shown], expected[shown], color=LAW, linewidth=1.5, linestyle=(0, (5, 3)))
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tick))
        log_axis(axes, (0.5, max(10.0, 2 * float(counts.max()), 2 * float(expected.max(initial=0)))))
        axes.set_xlabel("(weight − mean) / std")
        axes.set_ylabel("count")
        axes.axvline(0, color=LINE, linewidth=0.8, zorder=0)
        return to_svg(figure, label, name)
