"""Which formats can feel a plan at all, decided from its scales alone.

Round-to-nearest with a float scale that follows the data commutes with any factor that is constant over the elements
sharing that scale. So a factor per tensor or per row changes nothing for row, group and block formats, and a plan can
be told to be useless for a format before anything is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.roles import LINEAR
from vrscope.checkpoint.source import Checkpoint, TensorInfo
from vrscope.quant.formats import Format
from vrscope.rescale.plan import FREE, NOT_EQUIVALENT, RescalePlan
from vrscope.rescale.scaling import TensorScale, tensor_scales
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

    from vrscope.arch.binding import Binding

REACH_COLUMNS = (
    Column("format", "", "Quantization format."),
    Column("can_change", "", "Whether this plan can change what the format costs."),
    Column("tensors_changed", "tensors", "Linear weights whose rounding the plan can change."),
    Column("tensors_total", "tensors", "Linear weights that are quantized."),
    Column("reason", "", "Why, in words."),
)


_ROUNDED = (
    "The format's own scale absorbs the factors, but free factors round every stored weight once, so the format rounds "
    "slightly other weights. With powers of two the damage would stay what it was."
)


def reach(checkpoint: Checkpoint, binding: Binding, plan: RescalePlan, formats: Sequence[Format]) -> pd.DataFrame:
    """Return the table "reach": for every format, whether the plan can change its damage, and why."""
    import pandas as pd

    linears = [name for name, role in binding.roles.items() if role.kind == LINEAR]
    if plan.equivalent == NOT_EQUIVALENT:
        why = (
            "Raw TVR changes the weights themselves, not only their scales: it is another model, so all damage changes."
        )
        total = len(linears)
        rows = [(entry.name, True, len(plan.affine), total, why) for entry in formats]
        return pd.DataFrame(rows, columns=[column.name for column in REACH_COLUMNS])
    scales = tensor_scales(binding, plan)
    counts = dict.fromkeys((entry.name for entry in formats), 0)
    for name in linears:
        pair = row_column_factors(checkpoint.tensors[name], binding, scales.get(name))
        for entry in formats:
            counts[entry.name] += _feels(entry, *pair)
    rows = []
    for entry in formats:
        felt = counts[entry.name]
        reason = _reason(entry, felt, len(linears), plan)
        if plan.scales == FREE and not felt and plan.changed:
            felt = sum(name in scales for name in linears)
            reason = _ROUNDED
        rows.append((entry.name, felt > 0, felt, len(linears), reason))
    return pd.DataFrame(rows, columns=[column.name for column in REACH_COLUMNS])


def reach_of_spaces(
    checkpoint: Checkpoint, binding: Binding, plan: RescalePlan, formats: Sequence[Format]
) -> Mapping[str, tuple[str, ...]]:
    """Return for every space of the plan the formats that feel it when it is the only one scaled."""
    found = {}
    for space in binding.spaces:
        values = plan.spaces.get(space.name)
        if values is None:
            continue
        alone = tensor_scales(replace(binding, spaces=(space,)), plan.only([space.name]))
        pairs = [
            row_column_factors(checkpoint.tensors[name], binding, scale)
            for name, scale in alone.items()
            if binding.roles[name].kind == LINEAR
        ]
        found[space.name] = tuple(entry.name for entry in formats if any(_feels(entry, *pair) for pair in pairs))
    return found


def row_column_factors(
    info: TensorInfo, binding: Binding, scale: TensorScale | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the factors of the rows and columns of a linear weight as `(out, in)`, arrays `(x, out)` and `(x, in)`.

    x counts the matrices of a tensor that stacks experts, 1 for a plain matrix.
    """
    role = binding.roles[info.name]
    dims = {what: at for at, what in enumerate(role.dims)}
    batch = [size for at, size in enumerate(info.shape) if role.dims[at] not in {"out", "in"}]
    matrices = int(np.prod(batch, dtype=np.int64))
    factors = {side: np.ones((matrices, info.shape[dims[side]])) for side in ("out", "in")}
    scale = scale or TensorScale()
    signs = (np.where(array, -1.0, 1.0) for array in scale.negative)
    for array in (*(np.exp2(array) for array in scale.exponents), *signs, *scale.factors):
        side = "out" if array.shape[dims["out"]] != 1 else "in"
        order = [at for at, what in enumerate(role.dims) if what not in {"out", "in"}] + [dims[side]]
        rest = dims["in" if side == "out" else "out"]
        full = array.transpose([*order, rest])[..., 0]
        factors[side] = factors[side] * np.broadcast_to(full, (*batch, factors[side].shape[1])).reshape(matrices, -1)
    return factors["out"], factors["in"]


def _feels(entry: Format, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> bool:
    if not entry.odd and bool(np.any(rows < 0) or np.any(columns < 0)):
        return True  # the levels differ on the two sides of zero
    rows, columns = np.abs(rows), np.abs(columns)
    if entry.replaces_layers and bool(np.any(columns != 1.0)):
        return True  # the input is divided by the column factors, and its outliers change against a fixed threshold
    if entry.inputs is not None and bool(np.any(columns != columns[:, :1])):
        return True  # the same without a threshold: a factor that all columns share is absorbed by the input's scale
    return any(entry.scope.feels(row, column) for row, column in zip(rows, columns, strict=True))


def _reason(entry: Format, felt: int, total: int, plan: RescalePlan) -> str:
    if plan.changed == 0:
        return "The plan changes no scale."
    scope = {
        "tensor": "one scale per tensor",
        "row": "one scale per output row",
        "group": f"one scale per {entry.scope.size} inputs of a row",
        "block": f"one scale per block of {entry.scope.size} neighbours",
    }[entry.scope.kind]
    if entry.scope.nested:
        scope += ", itself quantized against the others"
    if entry.replaces_layers:
        scope += ", and its inputs are quantized with a fixed outlier threshold"
    elif entry.inputs is not None:
        scope += ", and one scale for all of a layer's inputs"
    if felt:
        return (
            f"The format has {scope}. In {felt} of {total} weights the plan's factors differ inside such a unit"
            + (", or rescale the layer's input" if entry.activations else "")
            + ", so rounding falls differently: better or worse, which only measuring tells."
        )
    return (
        f"The format has {scope}, and every factor of this plan is constant over each such unit. The format's own "
        "scale absorbs the factor, every weight rounds to the same level, and the quantized model puts out what it did."
    )
