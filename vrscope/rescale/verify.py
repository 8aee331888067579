"""The proof that one checkpoint is another one rescaled, from the weights alone.

For powers of two it is independent of how the copy was written: every element of B must equal the element of A times
the recorded power of two, its sign turned where that is negative, compared exactly by sign, mantissa and exponent
(`proof_kernels`).
Free scales and raw TVR are computed again by the code that wrote them. Names, shapes, dtypes and the configuration must
be the same, and the exponents must belong to spaces that were derived again from A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.binding import Binding
from vrscope.checkpoint.room import Room
from vrscope.checkpoint.source import BlockPlace, Checkpoint, StoredBlock, TensorInfo
from vrscope.errors import VerificationError
from vrscope.executors import default_executor
from vrscope.progress import Progress
from vrscope.rescale.plan import RescalePlan
from vrscope.rescale.scaling import TensorScale, require_finite, scale_block, scaled_bits, tensor_scales

_BLOCK_BYTES = 4 << 20
# Bits of a value, bits of its mantissa, pattern of the largest finite magnitude.
_LAYOUTS = {
    "F64": (64, 52, 0x7FEF_FFFF_FFFF_FFFF),
    "F32": (32, 23, 0x7F7F_FFFF),
    "F16": (16, 10, 0x7BFF),
    "BF16": (16, 7, 0x7F7F),
    "F8_E4M3": (8, 3, 0x7E),
    "F8_E5M2": (8, 2, 0x7B),
}


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
    proof = BlockProof(a, tensor_scales(binding, plan))
    total = sum(info.size_bytes for info in a.tensors.values())
    done = compared = 0
    places = (place for name in a.tensors for place in a.block_places(name, _BLOCK_BYTES))
    for count, size in default_executor().map(partial(proof, b), places):
        compared += count
        done += size
        progress("proving", done, total, "bytes")
    return compared


@dataclass(frozen=True, slots=True)
class BlockProof:
    """Proves one block after the other, on any thread.

    Attributes
    ----------
    original
        The checkpoint that was rescaled.
    scales
        What `tensor_scales` derives from it for the plan.
    rooms
        Memory for a block of each; nothing else may need it while a block is proved.
    """

    original: Checkpoint
    scales: Mapping[str, TensorScale]
    rooms: tuple[Room, Room] = field(default_factory=lambda: (Room(), Room()))

    def __call__(self, copy: Checkpoint, place: BlockPlace, ours: StoredBlock | None = None) -> tuple[int, int]:
        """Compare one block of a copy with the original; return its elements and bytes.

        Parameters
        ----------
        copy
            The copy, which is read.
        place
            Of the block.
        ours
            The original's block, whose bits may be changed; None if it is to be read.

        Raises
        ------
        VerificationError
            If an element differs from what the scales make of it.
        """
        ours = self.original.read_stored(place, self.rooms[0]) if ours is None else ours
        theirs = copy.read_stored(place, self.rooms[1])
        _compare(self.original.tensors[place.name], ours, theirs, self.scales.get(place.name, TensorScale()))
        return ours.bits.size, ours.bits.nbytes


def rehearsal(dtype: str) -> None:
    """Call every compiled loop that scaling values of this type by powers of two, and the proof of it, need."""
    width = _LAYOUTS[dtype][0]
    info = TensorInfo("", dtype, (1, 1), "", 0, width // 8)
    block = StoredBlock(0, np.zeros((1, 1), f"uint{width}"), 0, info)
    scale = TensorScale((np.zeros((1, 1), np.int32),))
    require_finite(info, block)
    scaled_bits(info, block, scale)
    _compare(info, block, block, scale)


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


def _compare(info: TensorInfo, ours: StoredBlock, theirs: StoredBlock, scale: TensorScale) -> None:
    if not info.is_float or (not scale.exponents and not scale.factors and scale.affine is None):
        if not _same_bytes(ours.bits, theirs.bits):
            _fail(info, ours, theirs, "must be the same bytes, since no scale touches it")
        return
    if not scale.exponents:
        import torch

        expected = scale_block(info, ours, scale).contiguous().view(torch.uint8).numpy()
        if not np.array_equal(expected, theirs.bits.view(np.uint8)):
            _fail(info, ours, theirs, "is not the recorded formula rounded once")
        return
    from vrscope.rescale.proof_kernels import first_unequal

    layout = _LAYOUTS[info.dtype]
    rows, columns = _exponents(scale.window(info, ours), ours.shape, layout[0])
    scale.turn(info, ours, ours.bits)
    if first_unequal(ours.bits, theirs.bits, rows, columns, layout) >= 0:
        import torch

        exact = np.ldexp(ours.values.to(torch.float64).numpy(), rows[:, None] + columns)
        _fail(info, ours, theirs, "is not the original times the recorded powers of two", exact)


def _exponents(
    windows: Sequence[NDArray[Any]], shape: tuple[int, ...], width: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the exponents of a block by row, shape `(n,)`, and by column, `(1, m)` or, if need be, `(n, m)`.

    Their type is the narrowest that the comparison of values of `width` bits can be done in.
    """
    rows = np.zeros((shape[0], 1), np.int64)
    columns = np.zeros((1, shape[1]), np.int64)
    for window in windows:
        if window.shape[1] == 1:
            rows = rows + window
        else:
            columns = columns + window
    furthest = max(abs(int(array.min(initial=0))) + abs(int(array.max(initial=0))) for array in (rows, columns))
    kind = next(kind for kind in (np.int16, np.int32, np.int64) if 8 * kind().itemsize >= width)
    kind = kind if furthest < 1 << 13 else np.int64  # so that sums with an exponent field fit
    return np.ascontiguousarray(rows[:, 0], kind), np.ascontiguousarray(columns, kind)


def _same_bytes(ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    """Return whether two arrays of one shape and type are equal in all bits, eight bytes at a time if they can be."""
    wide = np.uint64 if ours.nbytes % 8 == 0 else np.uint8
    return np.array_equal(ours.reshape(-1).view(wide), theirs.reshape(-1).view(wide))


def _fail(info: TensorInfo, ours: StoredBlock, theirs: StoredBlock, what: str, exact: Any = None) -> None:
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
