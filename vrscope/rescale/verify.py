"""The proof that one checkpoint is another one rescaled, from the weights alone.

For powers of two it is independent of how the copy was written: every element of B must equal the element of A with
the recorded exponent added (`ldexp` in float64, which is exact for every stored type), compared by value and sign.
Free scales and raw TVR are computed again by the code that wrote them. Names, shapes, dtypes and the configuration must
be the same, and the exponents must belong to spaces that were derived again from A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vrscope.arch.binding import Binding
from vrscope.checkpoint.source import Checkpoint, RowBlock, TensorInfo
from vrscope.errors import VerificationError
from vrscope.progress import Progress
from vrscope.rescale.plan import RescalePlan
from vrscope.rescale.scaling import TensorScale, scale_block, tensor_scales


def prove(a: Checkpoint, b: Checkpoint, binding: Binding, plan: RescalePlan, progress: Progress) -> int:
    """Prove that `b` is `a` rescaled by `plan`, and return the number of elements compared.

    For powers of two the comparison is exact arithmetic; for free scales, every element must be the correctly computed
    product, rounded once. A plan of raw TVR is compared the same way, and proves only that its formula was applied.

    Raises
    ------
    VerificationError
        Naming the first tensor that differs, and by how much.
    PlanError
        If the plan's spaces are not those of `a`.
    """
    require_same_shape(a, b)
    scales = tensor_scales(binding, plan)
    total = sum(info.size_bytes for info in a.tensors.values())
    done = compared = 0
    for name, info in a.tensors.items():
        scale = scales.get(name, TensorScale())
        for ours, theirs in zip(a.row_blocks(name), b.row_blocks(name), strict=True):
            _compare(info, ours, theirs, scale)
            compared += ours.values.numel()
        done += info.size_bytes
        progress("proving", done, total, "bytes")
    return compared


def require_same_shape(a: Checkpoint, b: Checkpoint) -> None:
    """Check that two checkpoints have the same tensors, dtypes, shapes and configuration.

    Raises
    ------
    VerificationError
        Naming the first difference.
    """
    for name in (*a.tensors, *b.tensors):
        ours, theirs = a.tensors.get(name), b.tensors.get(name)
        if ours is None or theirs is None:
            message = f"{name}: only in {(a if theirs is None else b).name}. The two are not the same model rescaled."
            raise VerificationError(message)
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            message = (
                f"{name}: {ours.dtype} {list(ours.shape)} in {a.name}, but {theirs.dtype} {list(theirs.shape)} in "
                f"{b.name}. A rescale changes neither."
            )
            raise VerificationError(message)
    first, second = _settings(a.config), _settings(b.config)
    differing = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    if differing:
        message = f"config.json: {differing[0]!r} differs between {a.name} and {b.name}. A rescale never edits it."
        raise VerificationError(message)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys that say only who wrote it."""
    return {key: value for key, value in config.items() if key not in {"transformers_version", "_name_or_path"}}


def _compare(info: TensorInfo, ours: RowBlock, theirs: RowBlock, scale: TensorScale) -> None:
    import torch

    if not info.is_float or (not scale.exponents and not scale.factors and scale.affine is None):
        raw = (torch.uint8,)
        if not torch.equal(ours.values.contiguous().view(*raw), theirs.values.contiguous().view(*raw)):
            _fail(info, ours, theirs, "must be the same bytes, since no scale touches it")
        return
    if not scale.exponents:
        expected = scale_block(info, ours, scale)
        if not torch.equal(expected.contiguous().view(torch.uint8), theirs.values.contiguous().view(torch.uint8)):
            _fail(info, ours, theirs, "is not the recorded formula rounded once")
        return
    exponent: Any = 0
    for window in scale.window(info, ours):
        exponent = exponent + window
    before = ours.values.to(torch.float64).numpy()
    after = theirs.values.to(torch.float64).numpy()
    exact = np.ldexp(before, np.broadcast_to(exponent, before.shape).astype(np.int32))
    if not np.array_equal(exact.view(np.int64), after.view(np.int64)):
        _fail(info, ours, theirs, "is not the original times the recorded powers of two", exact)


def _fail(info: TensorInfo, ours: RowBlock, theirs: RowBlock, what: str, exact: Any = None) -> None:
    import torch

    expected = ours.values.to(torch.float64).numpy() if exact is None else exact
    after = theirs.values.to(torch.float64).numpy()
    differing = np.argwhere(~((expected == after) & (np.signbit(expected) == np.signbit(after))))
    row, column = (int(n) for n in differing[0]) if len(differing) else (0, 0)
    message = (
        f"{info.name}: {what}; first at row {ours.first_row + row}, column {ours.first_column + column}: expected "
        f"{expected[row, column]!r}, found {after[row, column]!r}. The two checkpoints are not the same function."
    )
    raise VerificationError(message)
