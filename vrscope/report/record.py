"""Sections to look things up in: every tensor, the plan's spaces, the proof, and where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vrscope.report.blocks import Block, Cell, Explorer, Head, Section, Table
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.text import MISSING, number, visible
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_TEXT_COLUMNS = frozenset({"checkpoint", "tensor", "role", "kind", "dtype", "shape"})
_ESSENTIAL = frozenset(
    {
        "checkpoint", "tensor", "layer", "kind", "shape", "std", "kurtosis_excess", "absmax", "outlier_share_6sigma",
        "row_absmax_spread", "column_absmax_spread", "tvr_ratio",
    }
)  # fmt: skip
_COUNTS_THAT_WARN = frozenset({"nan_count", "inf_count"})
_KNOWN = (
    "model", "family", "equivalent", "command", "date", "seconds", "vrscope", "versions", "settings", "text", "tokens",
    "window", "device", "dtype", "machine", "cores",
)  # fmt: skip


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
    table = Explorer("tensors", "All tensors", tuple(heads), len(frame))
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


def spaces(report: Report) -> Section | None:
    """Return what the plan chose for each space."""
    frame = frame_of(report, "spaces")
    if frame is None:
        return None
    changed = flags(frame, "changed")
    columns = ("layer", "size", "exponent_min", "exponent_max", "exponent_mean_abs", "imbalance_before", "imbalance_after")
    data = {name: numbers(frame, name) for name in columns}
    shown = [name for name in columns if np.isfinite(data[name]).any()]
    heads = [head(report, "spaces", name, numeric=False) for name in ("space", "rule", "changed")]
    heads += [head(report, "spaces", name) for name in shown]
    heads.append(head(report, "spaces", "note", numeric=False))
    rows = []
    for k, (space, rule, note) in enumerate(zip(*(texts(frame, c) for c in ("space", "rule", "note")), strict=True)):
        said, look = ("yes", "good") if changed[k] else (MISSING, "muted") if changed[k] is None else ("no", "muted")
        cells = [Cell(space, "name"), Cell(rule), Cell(said, look)]
        cells += [Cell(number(data[name][k]), "num") for name in shown]
        rows.append((*cells, Cell(note, "words")))
    lead = (
        "A space is a vector of activations; the plan multiplies what writes it by powers of two and divides what reads "
        "it by the same. Imbalance is the ratio of the norms on its two sides: 1 is balanced."
    )
    done = f"{sum(c is True for c in changed)} of {number(len(changed))} spaces changed"
    table = Table("Spaces of the plan", tuple(heads), tuple(rows), fold=f"Show all: {done}")
    return Section("plan", "The plan, space by space", lead, (*_rules(frame, changed), table))


def _rules(frame: pd.DataFrame, changed: list[bool | None]) -> tuple[Block, ...]:
    """Sum the spaces up by rule: how many changed, the range of exponents, and the median imbalance."""
    low, high, before, after = (
        numbers(frame, c) for c in ("exponent_min", "exponent_max", "imbalance_before", "imbalance_after")
    )
    groups: dict[str, list[int]] = {}
    for k, rule in enumerate(texts(frame, "rule")):
        groups.setdefault(rule, []).append(k)
    heads = (
        Head("rule"),
        Head("spaces changed", numeric=True),
        Head("exponents", "powers of two", "Smallest and largest exponent chosen.", numeric=True),
        Head("imbalance before", "factor", "Median norm ratio of the two sides.", numeric=True),
        Head("imbalance after", "factor", "Median norm ratio of the two sides.", numeric=True),
    )
    rows = []
    for rule, at in groups.items():
        moved = f"{sum(changed[k] is True for k in at)} of {number(len(at))}"
        ends = [_pick(np.min, low[at]), _pick(np.max, high[at])]
        reach = MISSING if MISSING in ends else f"{ends[0]} to {ends[1]}"
        middle = [Cell(_pick(np.median, side[at]), "num") for side in (before, after)]
        rows.append((Cell(rule or MISSING, "strong"), Cell(moved, "num"), Cell(reach, "num"), *middle))
    return (Table("Spaces by rule", heads, tuple(rows)),)


def _pick(reduce: Any, values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    return number(reduce(values)) if len(values) else MISSING


def proof(report: Report) -> Section | None:
    """Return the checks that were made on the rescaled checkpoint."""
    frame = frame_of(report, "proof")
    if frame is None:
        return None
    rows = []
    for check, result, detail in zip(*(texts(frame, c) for c in ("check", "result", "detail")), strict=True):
        word, look = _result(result)
        rows.append((Cell(check, "words"), Cell(word, f"strong {look}"), Cell(detail, "words")))
    heads = tuple(head(report, "proof", name, numeric=False) for name in ("check", "result", "detail"))
    lead = (
        "How the rescaled checkpoint was compared with the original: from the weights alone, and where asked by running "
        "both models."
    )
    return Section("proof", "Proof of equivalence", lead, (Table("Checks", heads, tuple(rows)),))


def _result(text: str) -> tuple[str, str]:
    """Return how a result reads, and its colour where the word is known."""
    word = {"true": "passed", "false": "failed"}.get(text.lower(), text)
    good = {"passed", "pass", "ok", "yes", "bit-equal", "equal"}
    bad = {"failed", "fail", "no", "not equivalent", "different"}
    return word or MISSING, "good" if word.lower() in good else "bad" if word.lower() in bad else ""


def provenance(report: Report) -> Section | None:
    """Return versions, settings, text and machine, known keys first."""
    known = report.provenance
    keys = [k for k in _KNOWN if k in known] + [k for k in known if k not in _KNOWN]
    rows = tuple(
        (Cell(visible(key).replace("_", " "), "strong"), Cell(_value(key, known[key]), "value"))
        for key in keys
        if known[key] not in (None, "", {}, [])
    )
    if not rows:
        return None
    lead = "Everything needed to repeat these figures."
    return Section("provenance", "Provenance", lead, (Table("Provenance", (Head("what"), Head("value")), rows),))


def _value(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{visible(name)}: {_value(str(name), item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(key, item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return MISSING
    return number(value) if isinstance(value, int | float) else visible(value)


