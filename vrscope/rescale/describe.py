"""What a plan does, as tables: every space, every matrix, what it cannot reach, and which formats can feel it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.binding import Binding
from vrscope.arch.roles import LINEAR
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import PlanError
from vrscope.quant.formats import Format
from vrscope.rescale.methods import MethodOptions, target_std, usable_spaces
from vrscope.rescale.plan import NOT_EQUIVALENT, POW2, RescalePlan
from vrscope.rescale.reach import reach_of_spaces
from vrscope.rescale.survey import Surveys
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

SPACE_COLUMNS = (
    Column("space", "", "Path of the layer, then the vector of activations that is scaled."),
    Column("rule", "", "What ties the tensors: q.k, v.o, up.down, fc1.fc2, norm fold, q.k gains."),
    Column("layer", "", "Layer number from 0; empty outside the layers."),
    Column("size", "scales", "Number of free scales: channels, or RoPE pairs of channels, per KV group."),
    Column("changed", "scales", "Scales that the plan sets to something other than 1."),
    Column("negative", "scales", "Scales that are negative."),
    Column("exponent_min", "log2", "Smallest exponent."),
    Column("exponent_max", "log2", "Largest exponent."),
    Column("exponent_mean_abs", "log2", "Mean magnitude of the exponents."),
    Column(
        "imbalance_before",
        "factor",
        "Frobenius norms of the two sides of a channel, larger over smaller; geometric mean.",
    ),
    Column("imbalance_after", "factor", "The same after the plan; 1 is balanced."),
    Column("note", "", "Which formats feel this space alone."),
)
MATRIX_COLUMNS = (
    Column("tensor", "", "Linear weight."),
    Column("role", "", "Name without layer and expert numbers."),
    Column("layer", "", "Layer number from 0."),
    Column("std_before", "weight", "Population standard deviation in the original."),
    Column("std_after", "weight", "Population standard deviation after the plan."),
    Column("target_std", "weight", "Target of the plan, if it has one."),
    Column("left", "factor", "std_after over target: what the exact scales could not reach."),
)
UNREACHABLE_COLUMNS = (
    Column("space", "", "Path of the layer, then the vector of activations."),
    Column("reason", "", "Why no exact scale exists for it."),
)


def describe_spaces(
    checkpoint: Checkpoint,
    binding: Binding,
    plan: RescalePlan,
    surveys: Surveys,
    formats: Sequence[Format],
) -> pd.DataFrame:
    """Return the table "spaces", from the weights before and after the plan."""
    import pandas as pd

    felt = reach_of_spaces(checkpoint, binding, plan, formats) if plan.equivalent != NOT_EQUIVALENT else {}
    rows = []
    for space in usable_spaces(binding, plan.scales):
        values = plan.spaces.get(space.name, np.zeros(space.size) if plan.scales == POW2 else np.ones(space.size))
        exponents = values if plan.scales == POW2 else np.log2(values)
        moved = plan.moved(space.name) if space.name in plan.spaces else np.zeros(space.size, np.bool_)
        before, after = (survey.imbalances.get(space.name, float("nan")) for survey in surveys)
        names = felt.get(space.name, ())
        rows.append(
            {
                "space": space.name,
                "rule": space.rule,
                "layer": space.layer,
                "size": space.size,
                "changed": int(np.count_nonzero(moved)),
                "negative": int(np.count_nonzero(plan.negative.get(space.name, 0))),
                **_range(exponents),
                "imbalance_before": before,
                "imbalance_after": after,
                "note": f"felt by {', '.join(names)}" if names else "no format feels it" if moved.any() else "",
            }
        )
    return _frame(pd, rows, SPACE_COLUMNS)


def _range(exponents: NDArray[Any]) -> dict[str, float]:
    if not exponents.size:
        return {"exponent_min": 0.0, "exponent_max": 0.0, "exponent_mean_abs": 0.0}
    return {
        "exponent_min": float(exponents.min()),
        "exponent_max": float(exponents.max()),
        "exponent_mean_abs": float(np.abs(exponents).mean()),
    }


def describe_matrices(binding: Binding, plan: RescalePlan, surveys: Surveys) -> pd.DataFrame:
    """Return the table "matrices": the std of every linear weight in the layers, before, after, and its target."""
    import pandas as pd

    try:
        target = float(plan.settings.get("target_std", 0.01))
    except (TypeError, ValueError) as error:
        message = f"plan: target_std is {plan.settings['target_std']!r}, expected a number. Make the plan again."
        raise PlanError(message) from error
    options = MethodOptions(target_std=target, depth_scaled=bool(plan.settings.get("depth_scaled", False)))
    rows = []
    for name, role in binding.roles.items():
        if role.kind != LINEAR or role.layer is None:
            continue
        before, after = (survey.stds[name] for survey in surveys)
        target = float(target_std(options, role.layer)) if "target_std" in plan.settings else float("nan")
        rows.append(
            {
                "tensor": name,
                "role": role.role,
                "layer": role.layer,
                "std_before": before,
                "std_after": after,
                "target_std": target,
                "left": after / target,
            }
        )
    return _frame(pd, rows, MATRIX_COLUMNS)


def describe_unreachable(binding: Binding, scales: str) -> pd.DataFrame:
    """Return the table "unreachable": every space that has no exact scale of the wanted kind, and why."""
    import pandas as pd

    rows = list(binding.rigid)
    usable = {space.name for space in usable_spaces(binding, scales)}
    rows += [
        (space.name, "its gain is stored minus one (1+w), which a power of two would round")
        for space in binding.spaces
        if space.name not in usable
    ]
    return pd.DataFrame(rows, columns=[column.name for column in UNREACHABLE_COLUMNS])


def _frame(pandas: Any, rows: list[dict[str, Any]], columns: tuple[Column, ...]) -> pd.DataFrame:
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=[column.name for column in columns])
    return frame.astype({"layer": "Int64"})
