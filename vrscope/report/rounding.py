"""The section on the rounding error of single weights, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vrscope.report.blocks import Cell, Head, Section, Table
from vrscope.report.columns import frame_of, numbers, texts
from vrscope.report.headline import checkpoint_names
from vrscope.report.text import MISSING, number
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd


def weight_error(report: Report) -> Section | None:
    """Return the rounding error of single weights: per role and format, and the ten worst tensors."""
    frame = frame_of(report, "weight_error")
    if frame is None or not np.isfinite(numbers(frame, "sqnr_db")).any():
        return None
    names = checkpoint_names(report, texts(frame, "checkpoint"))
    lead = (
        "Signal to quantization noise of each linear weight by itself, in decibels: higher is better, and 6 dB are one "
        "bit. It says how well the weight is rounded, not how much the model suffers. Scaling rows against each other "
        "also changes how much each row counts in it, so a figure can move although no weight is rounded differently."
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
        (
            Cell(role or MISSING, "name"),
            *(_arrow([cells.get((role, name, key), []) for key in names]) for name in columns),
        )
        for role in known
    )
    return Table(f"Median SQNR over layers, dB: {arrow}", heads, rows)


def _arrow(groups: list[list[float]]) -> Cell:
    """Write the medians of one cell before and after, once if they do not differ."""
    middles = [float(np.median(group)) if group else float("nan") for group in groups]
    words = [MISSING if np.isnan(x) else f"{x:.1f}".replace("-", "−") for x in middles]
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
