"""What a plan does to one tensor: its row, column and element scales, applied to one row block at a time.

`W' = diag(r) W diag(c)`: every space contributes an array that broadcasts against the tensor. Powers of two only move
exponents, so they are exact unless a value leaves the normal range of its type; that is checked on every element. A
negative scale also turns the sign bit, which is exact for every value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.spaces import Space, Term, by_tensor
from vrscope.checkpoint.room import new_room
from vrscope.checkpoint.source import RowBlock, StoredBlock, TensorInfo
from vrscope.errors import CheckpointError, PlanError
from vrscope.rescale.plan import POW2, RescalePlan

if TYPE_CHECKING:
    import torch

    from vrscope.arch.binding import Binding


# Pattern of the largest finite magnitude.
_LARGEST_FINITE = {
    "F64": 0x7FEF_FFFF_FFFF_FFFF,
    "F32": 0x7F7F_FFFF,
    "F16": 0x7BFF,
    "BF16": 0x7F7F,
    "F8_E4M3": 0x7E,
    "F8_E5M2": 0x7B,
}
# Bits of a value and of its mantissa. F8_E4M3 has finite values in its top exponent field; those are multiplied.
_BITS = {"F64": (64, 52), "F32": (32, 23), "F16": (16, 10), "BF16": (16, 7), "F8_E4M3": (8, 3), "F8_E5M2": (8, 2)}
_FEW = 8  # more than are used at once, by one thread per core
_NARROW = 1 << 13  # exponents below fit 16 bits, also when a field of the type is added


@dataclass(frozen=True, slots=True, eq=False)
class TensorScale:
    """The scales of one tensor.

    Attributes
    ----------
    exponents
        Integer arrays that broadcast against the tensor; the element's exponent is their sum.
    factors
        The same with real factors, whose product counts; one of the two is empty.
    negative
        Bool arrays that broadcast against the tensor; where an odd number of them is true, the sign turns. Only beside
        `exponents`: factors have signs of their own.
    one_plus
        The stored value is a gain minus one: `w' = (1 + w) s - 1`.
    affine
        `(scale, shift)` of raw TVR, or None.
    """

    exponents: tuple[NDArray[np.signedinteger], ...] = ()
    factors: tuple[NDArray[np.float64], ...] = ()
    one_plus: bool = False
    affine: tuple[float, float] | None = None
    negative: tuple[NDArray[np.bool_], ...] = ()

    def window(self, info: TensorInfo, block: RowBlock | StoredBlock) -> list[NDArray[Any]]:
        """Return the arrays of `exponents` or `factors` cut to a block and shaped to broadcast against it."""
        return [window_of(array, info, block) for array in (*self.exponents, *self.factors)]

    def turn(self, info: TensorInfo, block: RowBlock | StoredBlock, bits: NDArray[np.unsignedinteger]) -> None:
        """Turn the sign bits of negative scales in stored bits of a block, shape `(rows, columns)`, in place."""
        kind = bits.dtype.type
        for array in self.negative:
            bits ^= window_of(array, info, block).astype(kind) << kind(8 * bits.itemsize - 1)


def window_of(array: NDArray[Any], info: TensorInfo, block: RowBlock | StoredBlock) -> NDArray[Any]:
    """Return an array that broadcasts against a tensor, cut to a block and shaped to broadcast against it."""
    rows, columns = block.shape
    if len(info.shape) <= 1:
        flat = array.reshape(1, -1)
        return flat if flat.shape[1] == 1 else flat[:, block.first_column : block.first_column + columns]
    cut = array if array.shape[0] == 1 else array[block.first_row : block.first_row + rows]
    if all(size == 1 for size in cut.shape[1:]):
        return cut.reshape(-1, 1)
    return np.broadcast_to(cut, (cut.shape[0], *info.shape[1:])).reshape(cut.shape[0], -1)


def tensor_scales(binding: Binding, plan: RescalePlan) -> Mapping[str, TensorScale]:
    """Return the scales of every tensor that a plan changes.

    Raises
    ------
    PlanError
        If the plan names a space the checkpoint does not have, or of another size.
    """
    known = {space.name: space for space in binding.spaces}
    for name, values in plan.spaces.items():
        if name not in known:
            why = dict(binding.rigid).get(name)
            reason = f"cannot be scaled: {why}" if why else f"is not a space of family {binding.family!r}"
            message = f"plan: {name!r} {reason}. Make the plan for this checkpoint with `vrscope plan`."
            raise PlanError(message)
        if len(values) != known[name].size:
            message = f"plan: {name!r} has {len(values)} scales, expected {known[name].size}. Make the plan again."
            raise PlanError(message)
        if name in plan.negative and not known[name].signed:
            message = (
                f"plan: {name!r} has negative scales, but a ReLU or a norm stands behind it, which would not pass the "
                "sign on. Make the plan again."
            )
            raise PlanError(message)
    unknown = next((name for name in (*plan.affine, *plan.zeroed) if name not in binding.roles), None)
    if unknown is not None:
        message = f"plan: {unknown!r} is not a tensor of this checkpoint. Make the plan for it with `vrscope plan`."
        raise PlanError(message)
    return _PlanScales.of(binding, plan)


@dataclass(frozen=True, slots=True, eq=False)
class _PlanScales(Mapping[str, TensorScale]):
    """The scales of a plan by tensor, made when asked for: all of them would take memory for every channel.

    The last few are kept, as blocks of one tensor come one after the other.
    """

    plan: RescalePlan
    uses: Mapping[str, Sequence[tuple[Space, Term]]]  # all of the tensors that the plan scales; of affine ones none
    moved: frozenset[str]  # names of the spaces that the plan scales
    made: dict[str, TensorScale] = field(default_factory=dict)

    @classmethod
    def of(cls, binding: Binding, plan: RescalePlan) -> _PlanScales:
        moved = frozenset(name for name in plan.spaces if plan.moved(name).any())
        uses: dict[str, list[tuple[Space, Term]]] = {
            tensor: all_of
            for tensor, all_of in by_tensor(binding.spaces).items()
            if any(space.name in moved for space, _ in all_of)
        }
        rounded = next((tensor for tensor in uses if plan.scales == POW2 and _one_plus(uses[tensor])), None)
        if rounded is not None:
            message = f"plan: {rounded} stores its gain minus one, which a power of two rounds. Use --scales free."
            raise PlanError(message)
        for tensor in (*plan.affine, *plan.zeroed):
            uses[tensor] = []
        return cls(plan, uses, moved)

    def __getitem__(self, name: str) -> TensorScale:
        found = self.made.get(name)
        if found is None:
            found = self._make(name)
            if len(self.made) >= _FEW:
                self.made.clear()
            self.made[name] = found
        return found

    def _make(self, name: str) -> TensorScale:
        plan = self.plan
        if name in plan.zeroed or name in plan.affine:
            return TensorScale(affine=(0.0, 0.0) if name in plan.zeroed else plan.affine[name])
        arrays: list[NDArray[Any]] = []
        negative: list[NDArray[np.bool_]] = []
        for space, term in self.uses[name]:
            if space.name not in self.moved:
                continue
            chosen = plan.spaces[space.name]
            powered = _exponents(chosen, term.power) if plan.scales == POW2 else chosen**term.power
            if space.name in plan.negative:  # their terms have the powers 1 and -1
                signs = plan.signs(space.name)
                if plan.scales == POW2:
                    negative.append(np.append(signs, np.False_)[term.index])
                else:
                    powered = np.where(signs, -powered, powered)
            arrays.append(np.append(powered, powered.dtype.type(plan.neutral))[term.index])
        if plan.scales == POW2:
            return TensorScale(tuple(arrays), negative=tuple(negative))
        return TensorScale(factors=tuple(arrays), one_plus=_one_plus(self.uses[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.uses)

    def __len__(self) -> int:
        return len(self.uses)

    def __contains__(self, name: object) -> bool:
        return name in self.uses


def _one_plus(uses: Sequence[tuple[Space, Term]]) -> bool:
    return any(term.stored == "1+w" for _, term in uses)


def _exponents(chosen: NDArray[np.signedinteger], power: int) -> NDArray[np.signedinteger]:
    """Return exponents times a power, in half the memory if they fit."""
    powered = chosen.astype(np.int64) * power
    return powered.astype(np.int32) if np.abs(powered).max(initial=0) < 1 << 30 else powered


def scale_block(info: TensorInfo, block: RowBlock | StoredBlock, scale: TensorScale) -> torch.Tensor:
    """Return the scaled values of a block, in the stored dtype and shape.

    Raises
    ------
    PlanError
        If a power of two pushes an element out of the normal range of the stored type.
    """
    import torch

    values = block.values
    if scale.exponents:
        shifted = _shift(info, block, scale)
        if shifted is None:
            return _multiply(info, block, scale)
        return StoredBlock(block.first_row, shifted, block.first_column, info).values
    wide = values.to(torch.float64)
    if scale.affine is not None:
        wide = wide * scale.affine[0] + scale.affine[1]
    else:
        wide = wide + 1.0 if scale.one_plus else wide
        for window in scale.window(info, block):
            wide = wide * torch.from_numpy(np.array(window))
        wide = wide - 1.0 if scale.one_plus else wide
    stored = wide.to(values.dtype)
    if not bool(torch.isfinite(stored.to(torch.float32)).all()):
        message = f"{info.name} ({info.shard}): a scale overflows {info.dtype}. Plan again with a smaller --limit."
        raise PlanError(message)
    return stored


def _shift(
    info: TensorInfo,
    block: RowBlock | StoredBlock,
    scale: TensorScale,
    room: Callable[[int], NDArray[np.uint8]] = new_room,
) -> NDArray[np.unsignedinteger] | None:
    """Return the stored bits of a block with its exponents moved, shape `(rows, columns)`.

    None where bits alone cannot do it: other scales than powers of two, subnormal numbers, limits of the type, NaN and
    infinity.
    """
    from vrscope.rescale.kernels import shift_exponents

    if not scale.exponents:
        return None
    width, mantissa = _BITS[info.dtype]
    rows, columns = (np.zeros(size, np.int64) for size in block.shape)
    for window in scale.window(info, block):
        if window.shape[1] == 1:
            rows += window[:, 0]
        elif window.shape[0] == 1:
            columns += window[0]
        else:
            return None
    far = int(np.abs(rows).max(initial=0) + np.abs(columns).max(initial=0))
    small = far < _NARROW
    # The narrower, the more elements the loop takes at a time.
    lane: Any = np.int16 if width <= 16 and small else np.int32 if width <= 32 and small else np.int64
    bits = _bits(block)
    moved = room(bits.nbytes).view(bits.dtype).reshape(bits.shape)
    magnitude = (1 << (width - 1)) - 1
    finite = _LARGEST_FINITE[info.dtype]
    done = shift_exponents(bits, moved, rows.astype(lane), columns.astype(lane), mantissa, magnitude, finite)
    if not done:
        return None
    scale.turn(info, block, moved)
    return moved


def scaled_bits(
    info: TensorInfo,
    block: StoredBlock,
    scale: TensorScale,
    room: Callable[[int], NDArray[np.uint8]] = new_room,
) -> NDArray[np.unsignedinteger]:
    """Return the stored bits of the scaled values of a block, shape `(rows, columns)`, in memory that `room` gives.

    Raises
    ------
    PlanError
        As `scale_block`.
    CheckpointError
        If an element is not finite.
    """
    shifted = _shift(info, block, scale, room)  # only if all are finite
    if shifted is not None:
        return shifted
    require_finite(info, block)
    return _bits(RowBlock(0, scale_block(info, block, scale)))


def _bits(block: RowBlock | StoredBlock) -> NDArray[np.unsignedinteger]:
    """Return the stored bits of a float block, shape `(rows, columns)`."""
    if isinstance(block, StoredBlock):
        return block.bits
    import torch

    values = block.values.contiguous()
    width = 8 * values.dtype.itemsize
    signed = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    bits: NDArray[np.unsignedinteger] = values.view(signed).numpy().view(f"uint{width}")
    return bits


def _multiply(info: TensorInfo, block: RowBlock | StoredBlock, scale: TensorScale) -> torch.Tensor:
    """Return the block multiplied in a wider type and stored again; refuse if that lost anything."""
    import torch

    work = block.values.to(torch.float64)
    for window in scale.window(info, block):
        work = work * torch.from_numpy(np.ldexp(1.0, window))
    for array in scale.negative:
        work = work * torch.from_numpy(np.where(window_of(array, info, block), -1.0, 1.0))
    stored = work.to(block.values.dtype)
    if bool(out_of_range(block.values, work, stored).any()):
        message = (
            f"{info.name} ({info.shard}): a power of two would push weights out of the normal range of "
            f"{info.dtype}, so the result would not be exact. Plan with a smaller --limit, or store it as BF16."
        )
        raise PlanError(message)
    return stored


def out_of_range(before: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return a mask of the elements that storing changed, or made subnormal."""
    import torch

    tiny = torch.finfo(stored.dtype).smallest_normal
    back = stored.to(exact.dtype)
    lost = (back != exact) | ~torch.isfinite(back)
    newly = (back.abs() < tiny) & (before.to(exact.dtype).abs() >= tiny)
    return lost | newly


def require_finite(info: TensorInfo, block: RowBlock | StoredBlock) -> None:
    """Refuse a block with NaN or infinity: no scale can be chosen for it or proved on it.

    Raises
    ------
    CheckpointError
        If an element is not finite.
    """
    from vrscope.rescale.kernels import largest_pattern

    if info.is_float:
        require_finite_pattern(info, largest_pattern(_bits(block).reshape(-1)))


def require_finite_pattern(info: TensorInfo, largest: int) -> None:
    """Refuse weights whose largest pattern without sign is that of NaN or infinity.

    Raises
    ------
    CheckpointError
        If it is.
    """
    if largest > _LARGEST_FINITE[info.dtype]:
        message = (
            f"{info.name} ({info.shard}): has NaN or infinite weights, so it is not rescaled. "
            "`vrscope analyze --weights-only` counts them."
        )
        raise CheckpointError(message)
