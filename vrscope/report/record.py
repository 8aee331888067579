"""Sections to look things up in: the plan's spaces, the proof, and where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vrscope.report.blocks import Block, Cell, Head, Section, Table, Text
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.text import MISSING, number, visible
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = frozenset(
    {
        "damage", "weight_error", "tensors", "depth_law", "histograms", "spaces", "matrices", "unreachable", "reach",
        "proof", "activations", "residual", "outlier_dimensions", "experts", "approximate",
        "sensitivity", "correlation", "additivity", "recipe", "recipe_summary", "gains", "exponents", "layer_error",
    }
)  # fmt: skip
_KNOWN = (
    "model", "family", "checkpoints", "other", "equivalent", "command", "date", "seconds", "vrscope", "versions",
    "settings", "text", "tokens", "window", "device", "dtype", "machine", "cores", "quantization", "notes",
)  # fmt: skip


def spaces(report: Report) -> Section | None:
    """Return what the plan chose for each space."""
    frame = frame_of(report, "spaces")
    if frame is None:
        return None
    changed, scales = flags(frame, "changed"), numbers(frame, "changed")
    columns = (
        "layer",
        "size",
        "negative",
        "exponent_min",
        "exponent_max",
        "exponent_mean_abs",
        "imbalance_before",
        "imbalance_after",
    )
    data = {name: numbers(frame, name) for name in columns}
    shown = [name for name in columns if np.isfinite(data[name]).any()]
    heads = [head(report, "spaces", name, numeric=False) for name in ("space", "rule")]
    heads.append(head(report, "spaces", "changed", label="scales changed"))
    heads += [head(report, "spaces", name) for name in shown]
    heads.append(head(report, "spaces", "note", numeric=False))
    rows = []
    for k, (space, rule, note) in enumerate(zip(*(texts(frame, c) for c in ("space", "rule", "note")), strict=True)):
        cells = [Cell(space, "name"), Cell(rule), Cell(number(scales[k]), "num" if scales[k] else "num muted")]
        cells += [Cell(number(data[name][k]), "num") for name in shown]
        rows.append((*cells, Cell(note, "words")))
    lead = (
        "A space is a vector of activations; the plan multiplies what writes it by powers of two, some of them "
        "negative, and divides what reads it by the same. Imbalance is the ratio of the norms on its two sides: 1 is "
        "balanced."
    )
    done = f"{sum(c is True for c in changed)} of {number(len(changed))} spaces changed"
    table = Table("Spaces of the plan", tuple(heads), tuple(rows), fold=f"Show all: {done}")
    return Section("plan", "The plan, space by space", lead, (*_rules(frame, changed), table))


def approximate(report: Report) -> Section | None:
    """Return the bound of every space whose scale a norm undoes only up to its eps."""
    frame = frame_of(report, "approximate")
    if frame is None:
        return None
    columns = ("size", "changed", "exponent_min", "exponent_max", "eps", "mean_square", "bound")
    data = [numbers(frame, name) for name in columns]
    heads = [head(report, "approximate", name, numeric=False) for name in ("space", "rule")]
    heads += [head(report, "approximate", name) for name in columns]
    rows = [
        (Cell(space, "name"), Cell(rule), *(Cell(number(column[k]), "num") for column in data))
        for k, (space, rule) in enumerate(zip(texts(frame, "space"), texts(frame, "rule"), strict=True))
    ]
    lead = (
        "The plan also scales inputs of norms, which undo a scale s except for the eps they add: the output changes by "
        "at most eps/2 |1/(s²m) − 1/m| of itself. The mean square m of the input is estimated from the weights, with "
        "channels taken for independent; what the outputs of the whole model do is in the proof."
    )
    return Section("approximate", "Equal up to eps", lead, (Table("Bounds", tuple(heads), tuple(rows), titled=False),))


def _rules(frame: pd.DataFrame, changed: list[bool | None]) -> tuple[Block, ...]:
    """Sum the spaces up by rule: how many changed, the range of exponents, and the median imbalance."""
    low, high, before, after = (
        numbers(frame, c) for c in ("exponent_min", "exponent_max", "imbalance_before", "imbalance_after")
    )
    negative, size = (numbers(frame, c) for c in ("negative", "size"))
    groups: dict[str, list[int]] = {}
    for k, rule in enumerate(texts(frame, "rule")):
        groups.setdefault(rule, []).append(k)
    heads = (
        Head("rule"),
        Head("spaces changed", numeric=True),
        Head("exponents", "powers of two", "Smallest and largest exponent chosen.", numeric=True),
        Head("negative", "", "Share of the scales that also turn the sign.", numeric=True),
        Head("imbalance before", "factor", "Median norm ratio of the two sides.", numeric=True),
        Head("imbalance after", "factor", "Median norm ratio of the two sides.", numeric=True),
    )
    rows = []
    for rule, at in groups.items():
        moved = f"{sum(changed[k] is True for k in at)} of {number(len(at))}"
        ends = [_pick(np.min, low[at]), _pick(np.max, high[at])]
        reach = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        middle = [Cell(_pick(np.median, side[at]), "num") for side in (before, after)]
        turned = f"{100 * np.nansum(negative[at]) / max(np.nansum(size[at]), 1):.0f} %"
        rows.append((Cell(rule or MISSING, "strong"), *(Cell(text, "num") for text in (moved, reach, turned)), *middle))
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
        "How the rescaled checkpoint was compared with the original: from the weights alone, and where asked by "
        "running both models."
    )
    return Section("proof", "Proof of equivalence", lead, (Table("Checks", heads, tuple(rows), titled=False),))


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
    blocks: list[Block] = [Table("Provenance", (Head("what"), Head("value")), rows, titled=False)]
    more = [
        f"{visible(name)} ({number(len(frame))} rows)" for name, frame in report.tables.items() if name not in _SHOWN
    ]
    if more:
        blocks.append(Text(f"Also in results.json and as CSV, but not on this page: {', '.join(more)}."))
    return Section("provenance", "Provenance", lead, tuple(blocks))


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
