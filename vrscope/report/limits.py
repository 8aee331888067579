"""The section on what the plan could not change: formats that are blind to it, and spaces that no plan can scale."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vrscope.report.blocks import Block, Cell, Head, Section, Table, Text
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.headline import badge
from vrscope.report.text import MISSING, is_missing, number
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_LISTED = 40  # patterns written out before "and N more"


def limits(report: Report) -> Section | None:
    """Return what the plan could not change: formats that are blind to it, and spaces that cannot be scaled."""
    reach, unreachable = frame_of(report, "reach"), frame_of(report, "unreachable")
    blocks: list[Block] = []
    if reach is not None:
        blocks.append(_reach_table(report, reach))
    if unreachable is not None:
        blocks.append(_unreachable_table(report, unreachable))
    elif "unreachable" in report.tables:
        blocks.append(Text("Every space of this model can be scaled."))
    if not blocks:
        return None
    stated = badge(report)
    if stated is not None and stated.level == "bad":
        lead = "This plan changes the weights themselves and not only their scales, so every format is affected."
        return Section("limits", "What this plan could not change", lead, tuple(blocks))
    lead = (
        "Rounding with a scale that follows the data cannot see a factor that is constant over one block of that "
        "scale: the scale absorbs it and every rounding error stays where it was. The quantized model puts out exactly "
        "the same before and after."
    )
    return Section("limits", "What this plan could not change", lead, tuple(blocks))


def _reach_table(report: Report, frame: pd.DataFrame) -> Table:
    totals = numbers(frame, "tensors_total")
    touched = numbers(frame, "tensors_changed")
    heads = (
        head(report, "reach", "format", numeric=False),
        Head("can this plan change it?", "", "Whether any scale block of the format sees the plan's factors."),
        Head(
            "tensors that can move", "", "Tensors whose rounding the plan can change, of all quantized.", numeric=True
        ),
        head(report, "reach", "reason", numeric=False, label="why"),
    )
    rows = []
    for k, (name, can, reason) in enumerate(
        zip(texts(frame, "format"), flags(frame, "can_change"), texts(frame, "reason"), strict=True)
    ):
        words, look = ("yes", "good") if can else (MISSING, "muted") if can is None else ("no", "bad")
        moved = MISSING if is_missing(touched[k]) else f"{number(touched[k])} of {number(totals[k])}"
        rows.append((Cell(name, "name"), Cell(words, f"strong {look}"), Cell(moved, "num"), Cell(reason, "words")))
    return Table("What each format can see of this plan", heads, tuple(rows))


def _unreachable_table(report: Report, frame: pd.DataFrame) -> Table:
    groups: dict[str, list[str]] = {}
    for space, reason in zip(texts(frame, "space"), texts(frame, "reason"), strict=True):
        groups.setdefault(reason or "no reason given", []).append(space)
    heads = (
        Head("spaces", "", "How many spaces share the reason.", numeric=True),
        head(report, "unreachable", "reason", numeric=False, label="why they cannot be scaled"),
        head(report, "unreachable", "space", numeric=False, label="which"),
    )
    rows = tuple(
        (Cell(number(len(spaces)), "num"), Cell(reason, "words"), Cell(_list(spaces), "name wide"))
        for reason, spaces in sorted(groups.items(), key=lambda item: -len(item[1]))
    )
    return Table("Spaces that no plan can scale", heads, rows)


def _list(names: list[str]) -> str:
    """Name the spaces, those that differ only in their numbers once: "layers.*.residual (30)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    words = [f"{pattern} ({number(len(same))})" if len(same) > 1 else same[0] for pattern, same in groups.items()]
    more = f" and {number(len(words) - _LISTED)} more" if len(words) > _LISTED else ""
    return ", ".join(words[:_LISTED]) + more
