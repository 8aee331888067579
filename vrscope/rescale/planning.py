"""From a method to a plan: choose, round to powers of two, clamp, and leave out what the stored type cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from vrscope.activations.importance import Calibration
from vrscope.arch.binding import Binding
from vrscope.arch.spaces import by_tensor
from vrscope.checkpoint.source import Checkpoint, RowBlock, TensorInfo
from vrscope.errors import PlanError
from vrscope.executors import Executor
from vrscope.progress import Progress, silent
from vrscope.rescale.awq import Choice
from vrscope.rescale.methods import METHODS, Method, MethodOptions, Situation, get_method, reach_of, target_std
from vrscope.rescale.plan import EXPONENT, POW2, RescalePlan
from vrscope.rescale.profile import Profile, balanced, rescaled_profile, wanted_slices
from vrscope.rescale.scaling import TensorScale, out_of_range, tensor_scales, window_of
from vrscope.rescale.survey import Group, Survey, Surveys, groups_of, profiled, survey_weights

RAW_THRESHOLD = 1.2  # std / target above which the reference rescales


def make_plan(
    checkpoint: Checkpoint,
    binding: Binding,
    method: str,
    options: MethodOptions,
    executor: Executor,
    progress: Progress,
    calibration: Calibration | None = None,
    described: bool = False,
) -> tuple[RescalePlan, Surveys]:
    """Return the plan a method makes for a checkpoint, and what the weights it was made from are like.

    With powers of two, channels whose weights would leave the normal range of their stored type keep the scale 1; the
    settings count them as `left_out`. `calibration` is for the methods that calibrate. Weights as the plan leaves them
    are surveyed only if it is to be `described`.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    PlanError
        If approximate spaces or free scales are asked for from a method that does not use them.
    CheckpointError
        If weights are NaN or infinite.
    """
    entry = get_method(method)
    require_approximate(entry, options)
    if options.scales != POW2 and "scales" not in entry.uses:
        users = ", ".join(method.name for method in METHODS if "scales" in method.uses)
        message = (
            f"scales: method {entry.name!r} searches for powers of two, found {options.scales!r}. "
            f"Leave scales out, or use {users}."
        )
        raise PlanError(message)
    settings = {name: value for name, value in asdict(options).items() if name in entry.uses}
    if "target" in settings:
        settings["target"] = list(settings["target"])
    if not options.approximate:
        settings = {name: value for name, value in settings.items() if name not in {"approximate", "allow_shrink"}}
    if calibration is not None:
        tokens = calibration.tokens + (
            calibration.held_out_tokens if calibration.held_out is not calibration.importance else 0
        )
        settings |= {"calibration_text": calibration.text, "calibration_tokens": tokens}
    plan = RescalePlan(binding.family, method, settings, POW2, {}, checkpoint.fingerprint())
    if options.raw and "raw" in entry.uses:
        before = survey_weights(checkpoint, binding, executor, progress)
        affine, zeroed = _raw_tvr(checkpoint, binding, before, options)
        plan, after = replace(plan, affine=affine, zeroed=zeroed), Survey()
        if described:
            scales = tensor_scales(binding, plan)
            after = survey_weights(checkpoint, binding, executor, progress, scales)
        return plan, Surveys(before, after)
    plan = replace(plan, scales=options.scales)
    surveys, parts, left_out = Surveys(Survey(), Survey()), [], 0
    groups = _groups(binding, entry)
    again = progress if len(groups) == 1 else silent  # it tells of a pass over everything, not of one group
    for group, profile in profiled(checkpoint, groups, executor, progress):
        situation = Situation(group.binding, profile, options, checkpoint, calibration, executor, progress)
        part, skipped = _plan_group(situation, entry, plan)
        parts.append(part)
        left_out += skipped
        surveys.before.add(group, profile)
        surveys.before.estimate(group, profile)
        if described:
            scales = tensor_scales(group.binding, part)
            surveys.after.add(group, rescaled_profile(checkpoint, group.binding, profile, scales, executor, again))
    if left_out:
        settings["left_out"] = left_out
    return _joined(plan, parts, binding), surveys


def _groups(binding: Binding, method: Method) -> list[Group]:
    """Return the groups of tensors that a method can choose scales for one after the other."""
    apart = method.apart
    if apart is None:
        return [Group(binding, wanted_slices(binding))]
    return groups_of(binding, lambda space: apart(space) or balanced(space))


def _plan_group(situation: Situation, method: Method, empty: RescalePlan) -> tuple[RescalePlan, int]:
    """Return an empty plan filled with the scales of a situation's spaces, and how many were set to 1 again."""
    assert situation.checkpoint is not None
    reach = {space.name: reach_of(space, situation.options) for space in situation.spaces}
    choice = method.choose(situation)
    choice = choice if isinstance(choice, Choice) else Choice(choice)
    chosen = {name: np.clip(values, *reach[name]) for name, values in choice.exponents.items()}
    limited = {space.name: space.limit.eps for space in situation.spaces if space.limit and space.name in chosen}
    plan = replace(empty, approximate=limited, gains=choice.gains, negative=choice.negative)
    if plan.scales != POW2:
        return replace(plan, spaces={name: np.exp2(values) for name, values in chosen.items()}), 0
    whole = {name: np.rint(values).astype(EXPONENT) for name, values in chosen.items()}
    return _within_range(situation.checkpoint, situation.binding, replace(plan, spaces=whole), situation.profile)


def _joined(empty: RescalePlan, parts: list[RescalePlan], binding: Binding) -> RescalePlan:
    """Return one plan with the scales of plans for different spaces, in the order of the binding."""
    spaces = {name: values for part in parts for name, values in part.spaces.items()}
    return replace(
        empty,
        spaces={space.name: spaces[space.name] for space in binding.spaces if space.name in spaces},
        negative={name: values for part in parts for name, values in part.negative.items()},
        approximate={name: eps for part in parts for name, eps in part.approximate.items()},
        gains=tuple(row for part in parts for row in part.gains),
    )


def require_approximate(method: Method, options: MethodOptions) -> None:
    """Refuse approximate spaces where the method would not scale one.

    Raises
    ------
    PlanError
        If it would not, or shrinking is allowed where nothing can be shrunk.
    """
    if options.approximate and "approximate" not in method.uses:
        users = " or ".join(entry.name for entry in METHODS if "approximate" in entry.uses)
        message = (
            f"approximate: method {method.name!r} balances the two sides of a space, and an approximate one is set by "
            f"neither. Use it with {users}."
        )
        raise PlanError(message)
    if options.allow_shrink and not options.approximate:
        message = "allow_shrink: expected approximate to be set as well; exact scales shrink anyway. Set both or none."
        raise PlanError(message)


def _raw_tvr(
    checkpoint: Checkpoint, binding: Binding, survey: Survey, options: MethodOptions
) -> tuple[dict[str, tuple[float, float]], tuple[str, ...]]:
    """Return scale and shift of every matrix over the threshold, and the biases the reference zeroes."""
    affine, zeroed = {}, []
    for tensor in wanted_slices(binding):
        if tensor not in survey.stds or len(checkpoint.tensors[tensor].shape) != 2:
            continue
        mean, std = survey.means[tensor], survey.stds[tensor]
        target = float(target_std(options, binding.roles[tensor].layer))
        if std / target > RAW_THRESHOLD:
            affine[tensor] = (target / std, mean - mean * target / std)
            bias = tensor.removesuffix(".weight") + ".bias"
            if tensor.endswith(".weight") and bias in checkpoint.tensors:
                zeroed.append(bias)
    return affine, tuple(zeroed)


def _within_range(
    checkpoint: Checkpoint, binding: Binding, plan: RescalePlan, profile: Profile
) -> tuple[RescalePlan, int]:
    """Return the plan with every scale set to 1 that would push a weight out of range, and how many those were."""
    spaces = {name: values.copy() for name, values in plan.spaces.items()}
    left_out = 0
    while True:
        current = replace(plan, spaces=spaces)
        harmful = _harmful(checkpoint, binding, current, profile)
        if not harmful:
            return current, left_out
        for name, scales in harmful.items():
            left_out += int(np.count_nonzero(spaces[name][scales]))
            spaces[name][scales] = 0


def _harmful(
    checkpoint: Checkpoint, binding: Binding, plan: RescalePlan, profile: Profile
) -> Mapping[str, NDArray[np.int64]]:
    """Return for each space the scales that, together with others, push a weight out of the range of its type."""
    found: dict[str, list[NDArray[np.int64]]] = {}
    uses = by_tensor(binding.spaces)
    for tensor, scale in tensor_scales(binding, plan).items():
        info = profile.infos[tensor]
        if profile.surely_in_range(tensor, scale.exponents):
            continue
        for block in checkpoint.row_blocks(tensor):
            bad = _lost(info, block, scale)
            if not bad.any():
                continue
            for space, term in uses[tensor]:
                values = plan.spaces.get(space.name)
                if values is None:
                    continue
                ids = np.broadcast_to(window_of(term.index, info, block), bad.shape)[bad]
                ids = np.unique(ids[ids >= 0])
                moved = ids[values[ids] != 0]
                if moved.size:
                    found.setdefault(space.name, []).append(moved)
    return {name: np.unique(np.concatenate(ids)) for name, ids in found.items()}


def _lost(info: TensorInfo, block: RowBlock, scale: TensorScale) -> NDArray[np.bool_]:
    """Return a mask of the elements of a block that its scales push out of range."""
    import torch

    work = block.values.to(torch.float64)
    for window in scale.window(info, block):
        work = work * torch.from_numpy(np.ldexp(1.0, window))
    lost: NDArray[np.bool_] = out_of_range(block.values, work, work.to(block.values.dtype)).numpy()
    return lost
