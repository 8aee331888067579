"""Scales chosen by what rounding costs the output: for every space the search of `vrscope.rescale.search`.

A relative of AWQ (arXiv 2306.00978), with five differences: the objective is the predicted damage of the whole model,
from gradients, not the error of one layer's output; exponents and signs are searched for one by one; several formats
count at once; what does not hold on held-out text is not taken; and in the end single scales are moved once more by
what the model with all weights rounded shows (`vrscope.rescale.refine`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.spaces import Space
from vrscope.errors import PlanError
from vrscope.quant.formats import FORMATS, Format, get_format
from vrscope.rescale.readers import Reader, may_turn, readers_of
from vrscope.rescale.refine import Chosen, Refinement, refine
from vrscope.rescale.search import AWQ, NONE, ON_GRID, START, Found, Scales, base_damage, predicted, search

if TYPE_CHECKING:
    from vrscope.rescale.methods import Situation

Exponents = Mapping[str, NDArray[np.float64]]
STAGE = "searching scales"


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a method chose.

    Attributes
    ----------
    exponents
        Space name to log2 of the scales, shape `(size,)`.
    negative
        Space name to which scales are negative, bool of shape `(size,)`; of spaces where none is, nothing.
    gains
        For each space and format what the scales are predicted to gain: rows of the table "gains".
    """

    exponents: Exponents
    negative: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    gains: tuple[Mapping[str, Any], ...] = ()


def searchable(names: Sequence[str]) -> tuple[Format, ...]:
    """Return formats by name, if a search can be made for them.

    Raises
    ------
    UnknownNameError
        If there is no such format.
    PlanError
        If there is none at all, or one has a scale that a single column cannot be told apart in.
    """
    entries = tuple(get_format(name) for name in dict.fromkeys(names))
    known = [entry.name for entry in FORMATS if entry.levels is not None]
    for entry in entries:
        if entry.levels is None:
            message = f"target: format {entry.name!r} cannot be searched for. Choose among {', '.join(known)}."
            raise PlanError(message)
    if not entries:
        message = f"target: expected at least one format, found none. Choose among {', '.join(known)}."
        raise PlanError(message)
    return entries


def choose(situation: Situation, given: Mapping[str, Exponents]) -> Choice:
    """Return the scales of every space that linear weights read, from the best of all starts.

    Parameters
    ----------
    situation
        With checkpoint and calibration.
    given
        What other methods choose: name to log2 scales by space.

    Raises
    ------
    PlanError
        If the situation has no calibration.
    """
    checkpoint, calibration = situation.checkpoint, situation.calibration
    if checkpoint is None or calibration is None:
        message = "awq: expected a calibration on text, found none. Give a text, or use a method without: wisca, cle."
        raise PlanError(message)
    entries = searchable(situation.options.target)
    limit = situation.options.limit
    spaces = [space for space in situation.spaces if space.limit is None]

    def readers(space: Space) -> list[Reader]:
        return readers_of(space, situation.binding, checkpoint, calibration)

    def base(space: Space) -> NDArray[np.float64] | None:
        found = readers(space)
        return base_damage(found, entries) if found else None

    def look(space: Space) -> Found | None:
        starts = {name: values[space.name] for name, values in given.items() if space.name in values}
        own = readers(space)
        signed = may_turn(space, situation.binding, entries)
        return search(own, formats, space.size, starts, limit, signed) if own else None

    # The formats count alike: each by its share of its own damage in the whole model.
    totals = np.sum([part for part in situation.executor.map(base, spaces) if part is not None], axis=0)
    if not np.ndim(totals):
        return Choice({})
    formats = [(entry, 1 / total if total > 0 else 0.0) for entry, total in zip(entries, totals, strict=True)]
    results: dict[str, Found] = {}
    for number, (space, result) in enumerate(zip(spaces, situation.executor.map(look, spaces), strict=True), 1):
        situation.progress(STAGE, number, len(spaces), "spaces")
        if result is not None:
            results[space.name] = result
    searched = [space for space in spaces if space.name in results]
    chosen: Chosen = {name: Scales(found.exponents, found.negative) for name, found in results.items()}
    if situation.options.rounds and calibration.trial is not None:
        task = Refinement(
            situation.binding, checkpoint, calibration, searched, formats, limit, situation.executor, situation.progress
        )
        refined = refine(task, chosen, situation.options.rounds)

        def again(space: Space) -> Found:
            before, after = chosen[space.name], refined[space.name]
            moved = int(np.count_nonzero((before.exponents != after.exponents) | (before.negative != after.negative)))
            return results[space.name].moved(after, predicted(readers(space), entries, after), moved)

        results = dict(zip(results, situation.executor.map(again, searched), strict=True))
    gains = [row for space in searched for row in _gains(space, results[space.name])]
    return Choice(
        {name: found.exponents.astype(np.float64) for name, found in results.items()},
        {name: found.negative for name, found in results.items() if found.negative.any()},
        tuple(gains),
    )


def _gains(space: Space, found: Found) -> list[Mapping[str, Any]]:
    reason = {
        NONE: "Nothing that was tried lowers the damage on held-out text.",
        START: f"The scales of {found.method} do best on held-out text.",
        ON_GRID: "A power of the importance of the channels does best on held-out text.",
    }.get(
        found.method if found.method == NONE else found.stage,
        ("A grid" if found.method == AWQ else f"The scales of {found.method}")
        + ", then moves of single scales, do best on held-out text.",
    )
    if found.refined:
        count = "1 scale was" if found.refined == 1 else f"{found.refined} scales were"
        reason = f"{reason} Then {count} moved by what the rounded model showed."
    shared = {"space": space.name, "rule": space.rule, "layer": space.layer, "method": found.method}
    return [
        {
            **shared,
            "format": name,
            "stage": found.stage,
            "damage_before": float(found.before[name]),
            "damage_after": float(found.after[name]),
            "reason": reason,
        }
        for name in found.before
    ]
