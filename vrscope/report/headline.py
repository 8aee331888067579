"""The top of the page: which model, whether it is still the same function, the verdict, and the sizes behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vrscope.report.columns import flags, frame_of, numbers, texts
from vrscope.report.text import is_missing, number, size, visible
from vrscope.tables import Report

_BADGES = {
    "bit-equal": ("good", "Bit-equal", "The rescaled checkpoint computes the same function, bit for bit."),
    "equal up to rounding": (
        "note",
        "Equal up to rounding",
        "The rescaled checkpoint computes the same function except for the rounding of stored weights.",
    ),
    "equal up to eps": (
        "note",
        "Equal up to eps",
        "The rescaled checkpoint computes the same function except for the eps that its norms add, because inputs of "
        "norms were scaled too.",
    ),
    "not equivalent": (
        "bad",
        "NOT EQUIVALENT",
        "The rescaled checkpoint computes a different function. What stands under its name below belongs to another "
        "model, not to a repaired version of the original.",
    ),
}
_LEVELS = {"good": "Good", "note": "Note", "bad": "Bad"}


@dataclass(frozen=True, slots=True)
class Badge:
    """Whether the rescaled checkpoint is still the same function: a level, a short name and a sentence."""

    level: str
    name: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence of the verdict with its level, as a word and as a class."""

    level: str
    word: str
    text: str


@dataclass(frozen=True, slots=True)
class Headline:
    """Everything above the first section."""

    model: str
    details: tuple[str, ...]
    badge: Badge | None
    verdict: tuple[Finding, ...]
    facts: tuple[tuple[str, str], ...]


def headline(report: Report) -> Headline:
    """Return the top of the page for a report."""
    known = report.provenance
    details = ["joined results" if report.kind == "merged" else f"vrscope {visible(report.kind)}"]
    if known.get("family"):
        details.append(f"family {visible(known['family'])}")
    method = _method(known.get("settings"))
    if method:
        details.append(method)
    if known.get("date"):
        details.append(visible(known["date"]).split("T")[0])
    verdict = tuple(_finding(item) for item in report.verdict)
    return Headline(_title(visible(known.get("model"))), tuple(details), badge(report), verdict, tuple(_facts(report)))


def badge(report: Report) -> Badge | None:
    """Return how the report states equivalence, or None if it says nothing about it."""
    stated = report.provenance.get("equivalent")
    if stated is None or stated == "":
        return None
    entry = _BADGES.get(str(stated).strip().lower())
    if entry is None:
        return Badge("note", visible(stated), "")
    level, name, sentence = entry
    settings = report.provenance.get("settings")
    if level == "bad" and isinstance(settings, Mapping) and settings.get("raw"):
        sentence = f"Raw TVR shifts means and zeroes biases. {sentence}"
    return Badge(level, name, sentence)


def checkpoint_names(report: Report, keys: list[str]) -> dict[str, str]:
    """Return the distinct checkpoints of a table in order, each with the name the page gives it."""
    names = dict.fromkeys(keys)
    stated = badge(report)
    suffix = " (NOT EQUIVALENT)" if stated is not None and stated.level == "bad" else ""
    return {
        key: (key or "this checkpoint") + (suffix if place else "")
        for place, key in enumerate(names)
    }  # fmt: skip


def _title(model: str) -> str:
    """Return a hub id whole, and of a path its last part; the whole path is in the provenance."""
    if model.startswith(("/", ".", "~", "\\")) or model[1:2] == ":":
        return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model
    return model or "Unnamed model"


def _finding(item: Mapping[str, str]) -> Finding:
    level = str(item.get("level", "note"))
    level = level if level in _LEVELS else "note"
    return Finding(level, _LEVELS[level], visible(item.get("text", "")))


def _method(settings: Any) -> str:
    if not isinstance(settings, Mapping) or not settings.get("method"):
        return ""
    words = [f"method {visible(settings['method'])}{' --raw' if settings.get('raw') else ''}"]
    words += [f"{key} {visible(settings[key])}" for key in ("granularity", "norm", "scales") if settings.get(key)]
    return ", ".join(words)


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = []
    tensors = frame_of(report, "tensors")
    if tensors is not None:
        first = texts(tensors, "checkpoint")
        mine = np.array([name == first[0] for name in first])
        facts.append(("tensors", number(int(mine.sum()))))
        for column, name, say in (("count", "parameters", _millions), ("size_bytes", "stored size", size)):
            values = numbers(tensors, column)[mine]
            if np.isfinite(values).any():
                facts.append((name, say(float(np.nansum(values)))))
    spaces = frame_of(report, "spaces")
    if spaces is not None:
        facts.append(("spaces changed", _of(flags(spaces, "changed"))))
    reach = frame_of(report, "reach")
    if reach is not None:
        facts.append(("formats this plan can change", _of(flags(reach, "can_change"))))
    if not is_missing(report.provenance.get("tokens")):
        facts.append(("tokens measured", number(report.provenance["tokens"])))
    return facts


def _of(values: list[bool | None]) -> str:
    return f"{sum(value is True for value in values)} of {len(values)}"


def _millions(count: float) -> str:
    for factor, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= factor:
            return f"{number(count / factor, 4)} {unit}"
    return number(count)
