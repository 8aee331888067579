"""The relative error of each layer's output before and after: a panel per role, a line per checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.report import gain_figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Head, Swatch, Table
from vrscope.report.columns import frame_of, numbers, texts
from vrscope.report.figures import DepthLine
from vrscope.report.headline import checkpoint_names
from vrscope.report.text import MISSING, change, number
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
_FORMATS, _PANELS = 3, 16


@dataclass(frozen=True, slots=True)
class _Rows:
    """The usable rows: a layer and a positive error each."""

    roles: list[str]
    formats: list[str]
    checkpoints: list[str]
    layers: Floats
    errors: Floats


def output_error(report: Report, formats: list[str]) -> list[Block]:
    """Return the panels of each of the first formats, and a table of medians; nothing if the table is absent.

    Parameters
    ----------
    formats
        The formats that the scales were chosen for; they come first.
    """
    frame = frame_of(report, "layer_error")
    rows = None if frame is None else _read(frame)
    if rows is None or not rows.roles:
        return []
    found = dict.fromkeys(rows.formats)
    order = [name for name in formats if name in found] + [name for name in found if name not in formats]
    names = checkpoint_names(report, rows.checkpoints)
    blocks: list[Block] = [_panels(rows, name, names, k, len(order)) for k, name in enumerate(order[:_FORMATS])]
    return [*blocks, _table(rows, order, names)]


def _read(frame: pd.DataFrame) -> _Rows:
    layers, errors = numbers(frame, "layer"), numbers(frame, "relative_output_error")
    kept = np.flatnonzero(np.isfinite(layers) & (errors > 0))
    words = [texts(frame, name) for name in ("role", "format", "checkpoint")]
    role, name, key = ([column[k] for k in kept] for column in words)
    return _Rows(role, name, key, layers[kept], errors[kept])


def _panels(rows: _Rows, name: str, names: dict[str, str], place: int, formats: int) -> Figures:
    mine = [k for k, found in enumerate(rows.formats) if found == name]
    values = rows.errors[mine]
    middle, reach = np.sqrt(values.min() * values.max()), max(1.6, 1.25 * np.sqrt(values.max() / values.min()))
    limits = (float(middle / reach), float(middle * reach))
    items = []
    roles = list(dict.fromkeys(rows.roles[k] for k in mine))
    for k, role in enumerate(roles[:_PANELS]):
        at = [i for i in mine if rows.roles[i] == role]
        lines = {shown: _line(rows, [i for i in at if rows.checkpoints[i] == key]) for key, shown in names.items()}
        svg = gain_figures.error_panel(lines, limits, f"error-{place}-{k}")
        medians = [float(np.median(line.middle)) if line else np.nan for line in lines.values()]
        words = change(medians[0], medians[1]) if len(medians) > 1 else ""
        items.append(
            Figure(svg, role or MISSING, "", f"median over layers {words}" if words not in {"", MISSING} else "")
        )
    legend = tuple(Swatch(f"--series-{min(k, 4)}", "line", shown) for k, shown in enumerate(names.values()))
    note = (
        "Error over signal of a weight's output, that weight alone quantized, on held-out text. Panels share a scale."
    )
    if len(roles) > _PANELS:
        note += f" {_PANELS} of {number(len(roles))} roles are drawn."
    if place == _FORMATS - 1 and formats > _FORMATS:
        note += f" {_FORMATS} of {number(formats)} formats are drawn; the table has them all."
    title = f"Output error of each layer with {name or MISSING}"
    return Figures(tuple(items), legend, small=True, note=note, title=title)


def _line(rows: _Rows, at: list[int]) -> DepthLine | None:
    """Return the errors of some rows over layers: their median, and the range of several weights in one layer."""
    if not at:
        return None
    layers = np.unique(rows.layers[at])
    groups = [rows.errors[at][rows.layers[at] == layer] for layer in layers]
    middle, low, high = (np.array([f(found) for found in groups]) for f in (np.median, np.min, np.max))
    return DepthLine(layers, middle, low, high)


def _table(rows: _Rows, formats: list[str], names: dict[str, str]) -> Table:
    groups: dict[tuple[str, str], dict[str, list[int]]] = {}
    for k, triple in enumerate(zip(rows.formats, rows.roles, rows.checkpoints, strict=True)):
        groups.setdefault(triple[:2], {}).setdefault(triple[2], []).append(k)
    heads = [Head("role"), Head("format")]
    heads += [
        Head(shown, "", "Median over layers of the relative output error.", numeric=True) for shown in names.values()
    ]
    heads += [Head("change", "", "Of the second median against the first.", numeric=True)] if len(names) > 1 else []
    filled = []
    for (name, role), found in sorted(groups.items(), key=lambda item: formats.index(item[0][0])):
        medians = [float(np.median(rows.errors[found[key]])) if key in found else np.nan for key in names]
        cells = [Cell(role or MISSING, "name"), Cell(name or MISSING), *(Cell(number(m), "num") for m in medians)]
        if len(names) > 1:
            look = "good" if medians[1] < medians[0] else "bad" if medians[1] > medians[0] else "muted"
            cells.append(Cell(change(*medians[:2]), f"num {look}"))
        filled.append(tuple(cells))
    fold = f"Show the medians of {number(len(groups))} roles and formats"
    return Table("Relative output error, median over layers", tuple(heads), tuple(filled), fold=fold)
