"""The section with every tensor: its rows travel as data, and the page's script sorts and searches them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vrscope.report.blocks import Block, Cell, Explorer, Head, Section, Table
from vrscope.report.columns import frame_of, head, numbers, texts
from vrscope.report.text import MISSING
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_TEXT_COLUMNS = frozenset({"checkpoint", "tensor", "role", "kind", "dtype", "shape"})
_ESSENTIAL = frozenset(
    {
        "checkpoint", "tensor", "layer", "kind", "shape", "std", "kurtosis_excess", "absmax", "outlier_share_6sigma",
        "column_absmax_spread", "tvr_ratio",
    }
)  # fmt: skip
_COUNTS_THAT_WARN = frozenset({"nan_count", "inf_count"})


def tensors(report: Report) -> Section | None:
    """Return the sortable, searchable table of all tensors, its rows as data for the page's script."""
    frame = frame_of(report, "tensors")
    if frame is None:
        return None
    heads, data = [], []
    for name in frame.columns:
        values = _texts_as_data(frame, name) if name in _TEXT_COLUMNS else _numbers_as_data(frame, str(name))
        if values is None:
            continue
        column = head(report, "tensors", str(name), numeric="text" not in values)
        essential = name in _ESSENTIAL
        heads.append(Head(column.label, column.unit, column.meaning, column.numeric, column.name, essential))
        data.append(values | {"extra": not essential})
    names = [h.name for h in heads]
    search = [k for k, name in enumerate(names) if name in {"tensor", "role", "kind"}]
    payload = {"tensors": {"columns": data, "count": len(frame), "search": search}}
    lead = (
        "Every tensor of the checkpoint with its statistics. Click a column head to sort, point at it for its meaning, "
        "type to search by name, role or kind."
    )
    longest = max(map(len, texts(frame, "tensor")))
    table = Explorer("tensors", "All tensors", tuple(heads), len(frame), longest)
    meanings = _meanings("What the columns mean", heads)
    return Section("tensors", "All tensors", lead, (table, *meanings), payload)


def _texts_as_data(frame: pd.DataFrame, name: str) -> dict[str, Any] | None:
    """Pack a text column: each distinct text once, and for every row which one it is."""
    values = texts(frame, name)
    if not any(values) and name != "tensor":
        return None
    places = {text: k for k, text in enumerate(dict.fromkeys(values))}
    return {"text": list(places), "rows": [places[text] for text in values], "name": name == "tensor"}


def _numbers_as_data(frame: pd.DataFrame, name: str) -> dict[str, Any] | None:
    """Pack a numeric column to five significant digits, null where there is no number."""
    values = numbers(frame, name)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    whole = bool(np.all(finite == np.round(finite)))
    packed: list[float | int | None]
    if whole:
        packed = [None if np.isnan(x) else int(x) for x in values]
    else:
        packed = [None if np.isnan(x) else float(f"{x:.5g}") for x in values]
    return {"rows": packed, "whole": whole, "warn": name in _COUNTS_THAT_WARN}


def _meanings(fold: str, heads: list[Head]) -> tuple[Block, ...]:
    known = [h for h in heads if h.meaning]
    if not known:
        return ()
    rows = tuple((Cell(h.label, "strong"), Cell(h.unit or MISSING), Cell(h.meaning, "words")) for h in known)
    return (Table(fold, (Head("column"), Head("unit"), Head("meaning")), rows, fold=fold),)
