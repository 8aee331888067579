"""The figures on fragility: ranked bars, the cumulative curve, correlations with intervals; plain numbers to SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vrscope.report.svg import INK, LINE, MUTED, SERIES, YARDSTICK, canvas, drawing, to_svg
from vrscope.report.text import number, plus_minus, shorten

Floats = NDArray[np.float64]
_WIDTH = 720


@dataclass(frozen=True, slots=True)
class Interval:
    """One correlation: its name, value, the ends of its interval, and whether it points the way expected of it."""

    name: str
    value: float
    low: float
    high: float
    wrong: bool


def ranked_bars(names: Sequence[str], values: Floats, sems: Floats, unit: str) -> str:
    """Return horizontal bars with standard errors, the first on top."""
    label = f"{unit}, largest first: " + "; ".join(
        f"{name} {plus_minus(value, sem)}" for name, value, sem in zip(names, values, sems, strict=True)
    )
    shown = [shorten(name, 44) for name in names]
    height = 20 * len(names) + 8
    total = height + 46
    with drawing():
        figure = canvas(_WIDTH, total)
        left = 16 + 6.4 * max(map(len, shown))
        axes = figure.add_axes((left / _WIDTH, 46 / total, (_WIDTH - 16 - left) / _WIDTH, height / total))
        places = np.arange(len(names))
        axes.barh(places, values, height=0.7, color=SERIES[0], linewidth=0)
        errors = np.nan_to_num(sems)
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        for place, value, sem in zip(places, values, errors, strict=True):
            axes.annotate(
                plus_minus(value, sem), (value + sem, place), xytext=(6, 0), textcoords="offset points", va="center",
                color=INK, fontsize=10.5,
            )  # fmt: skip
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1.3 * float((values + errors).max()) or 1)
        axes.set_yticks(places, shown, color=INK)
        axes.tick_params(axis="y", length=0, labelsize=10.5)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=6)
        axes.spines["left"].set_color(MUTED)
        axes.set_xlabel(unit)
        return to_svg(figure, label, "fragile")


def cumulative_curve(size_share: Floats, damage_share: Floats) -> str:
    """Return the share of all damage against the share of bytes, units in order of damage, with the even line."""
    half = int(np.argmax(damage_share >= 0.5))
    label = (
        f"Share of the summed damage over the share of bytes: half of it lies in {100 * size_share[half]:.1f} percent "
        "of the bytes"
    )
    with drawing():
        figure = canvas(420, 260)
        axes = figure.add_axes((60 / 420, 46 / 260, 344 / 420, 204 / 260))
        axes.plot([0, 100], [0, 100], color=YARDSTICK, linewidth=1.4, linestyle=(0, (1, 2.2)))
        axes.plot(100 * np.append(0, size_share), 100 * np.append(0, damage_share), color=SERIES[0], linewidth=1.8)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 102)
        axes.set_xlabel("bytes of the units so far, %")
        axes.set_ylabel("summed damage, %")
        return to_svg(figure, label, "cumulative")


def correlation_intervals(rows: Sequence[Interval]) -> str:
    """Return a dot and an interval for every statistic, on one axis from -1 to 1."""
    label = "Spearman correlation with damage: " + "; ".join(
        f"{row.name} {number(row.value, 2)} ({number(row.low, 2)} to {number(row.high, 2)})" for row in rows
    )
    shown = [shorten(row.name, 34) for row in rows]
    height = 19 * len(rows) + 8
    total = height + 46
    with drawing():
        figure = canvas(_WIDTH, total)
        left = 16 + 6.4 * max(map(len, shown))
        axes = figure.add_axes((left / _WIDTH, 46 / total, (_WIDTH - 24 - left) / _WIDTH, height / total))
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(rows):
            colour = SERIES[1] if row.wrong else SERIES[0]
            if not row.low <= 0 <= row.high:
                axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2)
                axes.plot(row.value, place, color=colour, marker="o", markersize=5)
            else:
                axes.plot([row.low, row.high], [place, place], color=MUTED, linewidth=1.4)
                axes.plot(row.value, place, color=MUTED, marker="o", markersize=4)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-1, 1)
        axes.set_yticks(range(len(rows)), shown, color=INK)
        axes.tick_params(axis="y", length=0, labelsize=10.5)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_color(LINE)
        axes.set_xlabel("Spearman's rho with the damage of the tensor alone; 95 % intervals")
        return to_svg(figure, label, "correlation")
