"""What is worth keeping of the sums behind a plan, gathered from one group of tied tensors after the other.

The sums take 32 bytes per channel of every tensor, which grows with the checkpoint. What tables say of them is a few
numbers per tensor and space. So tensors come in groups, those that a space ties together; a group is profiled, its
scales are chosen, and what they make of it is noted before the sums are dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.binding import Binding
from vrscope.arch.roles import LINEAR
from vrscope.arch.spaces import Space
from vrscope.checkpoint.source import Checkpoint
from vrscope.executors import Executor
from vrscope.progress import Progress, silent
from vrscope.rescale.bounds import mean_squares
from vrscope.rescale.plan import RescalePlan
from vrscope.rescale.profile import (
    Dims,
    Profile,
    balanced,
    profile_parts,
    rescaled_profile,
    side_sizes,
    wanted_slices,
)
from vrscope.rescale.scaling import TensorScale, tensor_scales


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tensors that can be looked at without the others.

    Attributes
    ----------
    binding
        The binding with the spaces that tie them, and no others.
    wanted
        The tensors, each with the dimensions its slices keep.
    """

    binding: Binding
    wanted: Mapping[str, tuple[Dims, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What tables say of the weights of a checkpoint.

    Attributes
    ----------
    means, stds
        Mean and population standard deviation of every linear weight inside the layers.
    imbalances
        Of every balanced space, the Frobenius norms of the two sides of a scale, larger over smaller, as the geometric
        mean over scales; NaN where a side has none.
    mean_squares
        Of every approximate space, the estimated mean square of the input of its norms, shape `(size,)`; only of
        weights as they are.
    """

    means: dict[str, float] = field(default_factory=dict)
    stds: dict[str, float] = field(default_factory=dict)
    imbalances: dict[str, float] = field(default_factory=dict)
    mean_squares: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, group: Group, profile: Profile) -> None:
        """Note what a profile says of a group, the original's or a plan's."""
        for name in group.wanted:
            role = group.binding.roles[name]
            if role.kind == LINEAR and role.layer is not None:
                self.means[name], self.stds[name] = profile.mean(name), profile.std(name)
        for space in group.binding.spaces:
            if balanced(space):
                self.imbalances[space.name] = _imbalance(space, profile)

    def estimate(self, group: Group, profile: Profile) -> None:
        """Note what the original's profile says of the inputs of norms."""
        for space in group.binding.spaces:
            if space.limit is not None:
                self.mean_squares[space.name] = mean_squares(space, group.binding, profile)


class Surveys(NamedTuple):
    """Weights as they are and as a plan leaves them; the latter empty if nobody asked."""

    before: Survey
    after: Survey


def groups_of(binding: Binding, ties: Callable[[Space], bool]) -> list[Group]:
    """Return the tensors that are looked at in groups, which only spaces that `ties` accepts hold together."""
    wanted = wanted_slices(binding)
    parent = {name: name for name in wanted}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    tied = [space for space in binding.spaces if ties(space)]
    for space in tied:
        first = root(space.terms[0].tensor)
        inputs = [name for names in space.limit.inputs.values() for name in names] if space.limit else []
        for name in (*(term.tensor for term in space.terms), *inputs):
            parent[root(name)] = first
    members: dict[str, dict[str, tuple[Dims, ...]]] = defaultdict(dict)
    for name, dims in wanted.items():
        members[root(name)][name] = dims
    spaces: dict[str, list[Space]] = defaultdict(list)
    for space in tied:
        spaces[root(space.terms[0].tensor)].append(space)
    return [Group(replace(binding, spaces=tuple(spaces[name])), part) for name, part in members.items()]


def profiled(
    checkpoint: Checkpoint,
    groups: list[Group],
    executor: Executor,
    progress: Progress,
    scales: Mapping[str, TensorScale] | None = None,
) -> Iterator[tuple[Group, Profile]]:
    """Yield every group with its profile, in one pass over the weights; with `scales`, as these would leave them."""
    parts = (group.wanted for group in groups)
    yield from zip(groups, profile_parts(checkpoint, parts, executor, progress, scales), strict=True)


def survey_weights(
    checkpoint: Checkpoint,
    binding: Binding,
    executor: Executor,
    progress: Progress,
    scales: Mapping[str, TensorScale] | None = None,
) -> Survey:
    """Return the survey of a checkpoint; with `scales`, as these would leave it.

    Raises
    ------
    CheckpointError
        If weights are NaN or infinite.
    """
    survey = Survey()
    for group, profile in profiled(checkpoint, groups_of(binding, balanced), executor, progress, scales):
        survey.add(group, profile)
    return survey


def survey_plan(
    checkpoint: Checkpoint, binding: Binding, plan: RescalePlan, executor: Executor, progress: Progress
) -> Surveys:
    """Return the surveys of a checkpoint before and after a plan.

    Raises
    ------
    CheckpointError
        If weights are NaN or infinite.
    PlanError
        If the plan does not fit the checkpoint, or pushes a weight out of the normal range of its stored type.
    """
    found, scales = Surveys(Survey(), Survey()), tensor_scales(binding, plan)
    groups = groups_of(binding, lambda space: balanced(space) or space.limit is not None)
    for group, profile in profiled(checkpoint, groups, executor, progress):
        found.before.add(group, profile)
        found.before.estimate(group, profile)
        again = progress if len(groups) == 1 else silent  # it tells of a pass over everything, not of one group
        found.after.add(group, rescaled_profile(checkpoint, group.binding, profile, scales, executor, again))
    return found


def _imbalance(space: Space, profile: Profile) -> float:
    writers, readers = side_sizes(space, profile, "frobenius")
    used = (writers > 0) & (readers > 0)
    return float(np.exp(np.abs(np.log(writers[used] / readers[used])).mean())) if used.any() else float("nan")
