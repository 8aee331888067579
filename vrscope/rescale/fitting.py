"""Whether a plan is for the checkpoint at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vrscope.arch.binding import Binding
from vrscope.arch.spaces import Space
from vrscope.errors import PlanError
from vrscope.rescale.plan import RescalePlan


def check_plan(plan: RescalePlan, binding: Binding, fingerprint: str, name: str) -> None:
    """Refuse a plan that was made for another checkpoint.

    Raises
    ------
    PlanError
        If family or fingerprint differ, or what it calls approximate is not what this checkpoint's is.
    """
    if plan.family != binding.family:
        message = f"plan: made for family {plan.family!r}, but {name} is {binding.family!r}. Make a plan for it."
        raise PlanError(message)
    if plan.source and plan.source != fingerprint:
        which = ", which is what it makes; did you mean --invert?" if plan.result == fingerprint else "."
        message = (
            f"plan: made for checkpoint {plan.source[:12]}, but {name} is {fingerprint[:12]}{which} "
            "Make a plan for this checkpoint with `vrscope plan`."
        )
        raise PlanError(message)
    for space in binding.spaces:
        if space.name in plan.spaces:
            _check_limit(plan, space)


def _check_limit(plan: RescalePlan, space: Space) -> None:
    """Refuse a plan that calls an approximate space exact, or shrinks a norm's input without having said so."""
    eps = None if space.limit is None else space.limit.eps
    if plan.approximate.get(space.name) != eps:
        message = (
            f"plan: {space.name!r} is {_limited(eps)} here, but the plan says it is "
            f"{_limited(plan.approximate.get(space.name))}. Make the plan again."
        )
        raise PlanError(message)
    if eps is not None and not _may_shrink(plan.settings) and bool(np.any(plan.spaces[space.name] < plan.neutral)):
        message = (
            f"plan: {space.name!r} shrinks the input of a norm, whose eps then counts for more. Plan with "
            "--allow-shrink to accept that."
        )
        raise PlanError(message)


def _limited(eps: float | None) -> str:
    return "exact" if eps is None else f"limited by eps = {eps:g}"


def _may_shrink(settings: Mapping[str, Any]) -> bool:
    """Whether a plan was asked to shrink, or undoes one that grew; of two plans in one, whether either may."""
    both = [settings[name] for name in ("first", "second") if isinstance(settings.get(name), Mapping)]
    return bool(settings.get("allow_shrink") or settings.get("inverted")) or any(_may_shrink(each) for each in both)
