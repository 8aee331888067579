"""The figures on gains: predicted damage before and after by rule and by layer, and output errors over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vrscope.report.figures import DepthLine, log_axis
from vrscope.report.svg import INK, MUTED, SERIES, canvas, drawing, to_svg
from vrscope.report.text import number, shorten

Floats = NDArray[np.float64]
_WIDTH = 300


def rule_bars(rules: Sequence[str], sides: tuple[Floats, Floats], axis: str, name: str) -> str:
    """Return horizontal bars of damage before and after, a pair per rule."""
    label = f"{axis}, before and after: " + "; ".join(
        f"{rule} {number(before, 3)} and {number(after, 3)}" for rule, before, after in zip(rules, *sides, strict=True)
    )
    shown = [shorten(rule, 12) for rule in rules]
    height = 36 * len(rules) + 6
    total = height + 40
    left = 14 + 6.6 * max(map(len, shown))
    with drawing():
        figure = canvas(_WIDTH, total)
        axes = figure.add_axes((left / _WIDTH, 38 / total, (_WIDTH - 6 - left) / _WIDTH, height / total))
        for k, values in enumerate(sides):
            places = np.arange(len(rules)) + (k - 0.5) * 0.4
            axes.barh(places, values, height=0.34, color=SERIES[k], linewidth=0)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    number(value, 3), (max(value, 0), place), xytext=(5, 0), textcoords="offset points", va="center",
                    color=INK, fontsize=10,
                )  # fmt: skip
        axes.set_ylim(len(rules) - 0.5, -0.5)
        axes.set_xlim(0, 1.45 * float(max(map(np.max, sides))) or 1)
        axes.set_yticks(range(len(rules)), shown, color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=4)
        axes.spines["left"].set_color(MUTED)
        axes.set_xlabel(axis)
        return to_svg(figure, label, name)


def layer_bars(layers: Floats, sides: tuple[Floats, Floats], unit: str, name: str) -> str:
    """Return damage over layers: the damage after as narrow bars upon those of the damage before."""
    worst = [int(np.argmax(values)) for values in sides]
    label = f"Predicted damage over {len(layers)} layers, {unit}: " + "; ".join(
        f"{when} it is largest in layer {int(layers[k])} with {number(values[k], 3)} of {number(values.sum(), 3)}"
        for when, k, values in zip(("before", "after"), worst, sides, strict=True)
    )
    with drawing():
        figure = canvas(_WIDTH, 190)
        axes = figure.add_axes((56 / _WIDTH, 38 / 190, 238 / _WIDTH, 144 / 190))
        for k, (values, width) in enumerate(zip(sides, (0.86, 0.46), strict=True)):
            axes.bar(layers, values, width=width, color=SERIES[k], linewidth=0)
        axes.set_xlim(layers.min() - 0.8, layers.max() + 0.8)
        axes.set_ylim(0, 1.05 * float(max(map(np.max, sides))) or 1)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer, numbered as in the tensor names")
        axes.set_ylabel(unit)
        axes.locator_params(axis="x", nbins=8, integer=True)
        axes.locator_params(axis="y", nbins=5)
        return to_svg(figure, label, name)


def error_panel(lines: Mapping[str, DepthLine | None], limits: tuple[float, float], name: str) -> str:
    """Return relative output errors over layers on a log axis, one line per checkpoint in the colours of series.

    A checkpoint without a line keeps its colour.
    """
    drawn = [(key, SERIES[min(k, len(SERIES) - 1)], line) for k, (key, line) in enumerate(lines.items()) if line]
    label = "Relative output error over layers, median: " + "; ".join(
        f"{key} {number(np.median(line.middle), 3)}" for key, _, line in drawn
    )
    with drawing():
        figure = canvas(_WIDTH, 186)
        axes = figure.add_axes((56 / _WIDTH, 38 / 186, 238 / _WIDTH, 140 / 186))
        for _, colour, line in drawn:
            if np.any(line.high > line.low):
                axes.fill_between(line.layers, line.low, line.high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(line.layers, line.middle, color=colour, linewidth=1.3, marker="o", markersize=3.2)
        ends = [edge for _, _, line in drawn for edge in (line.layers.min(), line.layers.max())]
        margin = max(0.5, (max(ends) - min(ends)) * 0.03)
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
        log_axis(axes, limits)
        axes.set_xlabel("layer, numbered as in the tensor names")
        axes.set_ylabel("relative error")
        axes.locator_params(axis="x", nbins=8, integer=True)
        return to_svg(figure, label, name)
