"""The section on what the plan could not change: what remains, formats that are blind to it, and rigid spaces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vrscope.report.blocks import Block, Cell, Head, Points, Section, Table, Text
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.gain_rows import GainRows, gain_unit, read_gains
from vrscope.report.headline import badge
from vrscope.report.text import MISSING, is_missing, number
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_LISTED = 40  # patterns written out before "and N more"
_NAMED = 3  # of these, in a point of the short list
_OWNERS = 5


def limits(report: Report) -> Section | None:
    """Return what the plan could not change: formats that are blind to it, and spaces that cannot be scaled.

    With predicted damage per space it opens with a short list, of what remains of that damage as well.
    """
    reach, unreachable = frame_of(report, "reach"), frame_of(report, "unreachable")
    blocks: list[Block] = []
    if reach is not None:
        blocks.append(_reach_table(report, reach))
    if unreachable is not None:
        blocks.append(_unreachable_table(report))
    elif "unreachable" in report.tables:
        blocks.append(Text("Every space of this model can be scaled."))
    rows = read_gains(report)
    if rows is not None:
        return _story(report, rows, blocks)
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


def _story(report: Report, rows: GainRows, details: Sequence[Block]) -> Section:
    """Return the short list of what is left, the spaces that own most of it, and the tables behind it folded away."""
    unit = gain_unit(report)
    points = [*_remains(rows, unit), *_blind(report), *_rigid(report)]
    folded = [_folded(block) if isinstance(block, Table) else block for block in details]
    lead = (
        "Scales move precision between the two sides of a space; they add none. What a format costs beyond that needs "
        "more bits in the right places, another format, or training."
    )
    owners = [table for table in [_owners(rows, unit)] if table.rows]
    return Section("limits", "What no scale can fix here", lead, (Points(tuple(points)), *owners, *folded))


def _folded(table: Table) -> Table:
    return replace(table, fold=f"Show: {table.caption[0].lower()}{table.caption[1:]}")


def _remains(rows: GainRows, unit: str) -> list[tuple[str, str]]:
    points = []
    for name in rows.names():
        before, after = rows.sums(rows.of(name))
        if before > 0:
            share = f"{100 * after / before:.1f} % of the predicted damage remains"
            points.append((f"{name or MISSING}:", f"{share}, {number(after, 3)} of {number(before, 3)} {unit}."))
    return points


def _blind(report: Report) -> list[tuple[str, str]]:
    """Name the formats that cannot feel the plan, those with the same reason together."""
    frame = frame_of(report, "reach")
    if frame is None:
        return []
    groups: dict[str, list[str]] = {}
    for name, can, reason in zip(
        *(texts(frame, "format"), flags(frame, "can_change"), texts(frame, "reason")), strict=True
    ):
        if can is False:
            groups.setdefault(reason, []).append(name)
    return [
        (
            f"{', '.join(names)}:",
            f"this plan cannot change {'it' if len(names) == 1 else 'them'}. {_sentence(reason)}".strip(),
        )
        for reason, names in groups.items()
    ]


def _rigid(report: Report) -> list[tuple[str, str]]:
    """Count the spaces that cannot be scaled, those with the same reason together."""
    return [
        (
            f"{number(len(spaces))} {'space' if len(spaces) == 1 else 'spaces'} without an exact scale:",
            f"{_list(spaces, _NAMED)}. {_sentence(reason)}",
        )
        for reason, spaces in _reasons(report)
    ]


def _reasons(report: Report) -> list[tuple[str, list[str]]]:
    """Return the reasons why spaces cannot be scaled, each with its spaces; the most frequent first."""
    frame = frame_of(report, "unreachable")
    groups: dict[str, list[str]] = {}
    if frame is not None:
        for space, reason in zip(texts(frame, "space"), texts(frame, "reason"), strict=True):
            groups.setdefault(reason or "no reason given", []).append(space)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _owners(rows: GainRows, unit: str) -> Table:
    """Return the spaces with the largest predicted damage left in each format."""
    heads = (
        Head("format"),
        Head("space"),
        Head("rule"),
        Head("predicted before", unit, "With the original weights.", numeric=True),
        Head("predicted after", unit, "With the scales chosen.", numeric=True),
        Head("of what remains", "share", "Of the predicted damage left in this format.", numeric=True),
    )
    filled = []
    for name in rows.names():
        at = [k for k in rows.of(name) if rows.after[k] > 0]
        worst = sorted(at, key=lambda k: -rows.after[k])[:_OWNERS]
        left = sum(rows.after[k] for k in at)
        for place, k in enumerate(worst):
            cells = [Cell(name or MISSING, "name", span=len(worst))] if place == 0 else []
            cells += [Cell(rows.spaces[k], "name"), Cell(rows.rules[k])]
            cells += [Cell(number(side[k], 3), "num") for side in (rows.before, rows.after)]
            filled.append((*cells, Cell(f"{100 * rows.after[k] / left:.1f} %", "num")))
    return Table(f"The {_OWNERS} largest owners of what remains", heads, tuple(filled))


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


def _unreachable_table(report: Report) -> Table:
    heads = (
        Head("spaces", "", "How many spaces share the reason.", numeric=True),
        head(report, "unreachable", "reason", numeric=False, label="why they cannot be scaled"),
        head(report, "unreachable", "space", numeric=False, label="which"),
    )
    rows = tuple(
        (Cell(number(len(spaces)), "num"), Cell(reason, "words"), Cell(_list(spaces), "name wide"))
        for reason, spaces in _reasons(report)
    )
    return Table("Spaces that no plan can scale", heads, rows)


def _list(names: list[str], listed: int = _LISTED) -> str:
    """Name the spaces, those that differ only in their numbers once: "layers.*.residual (30)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    words = [f"{pattern} ({number(len(same))})" if len(same) > 1 else same[0] for pattern, same in groups.items()]
    more = f" and {number(len(words) - listed)} more" if len(words) > listed else ""
    return ", ".join(words[:listed]) + more
