"""What the methods need to know of the weights: sums along rows and columns, from one pass over the row blocks.

A method never reads a weight itself. It asks for the size of everything that one scale multiplies, which is a sum over
slices; slices of every tensor are accumulated here in float64, once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.roles import LINEAR
from vrscope.arch.spaces import GAIN_PAIR, NORM_FOLD, Space, Term
from vrscope.checkpoint.source import BlockPlace, Checkpoint, StoredBlock, TensorInfo
from vrscope.checkpoint.stream import Streaming, stream
from vrscope.executors import Executor
from vrscope.progress import Progress
from vrscope.rescale.scaling import TensorScale, require_finite, require_finite_pattern, scaled_bits
from vrscope.stats.encoding import encoding

if TYPE_CHECKING:
    import torch

    from vrscope.arch.binding import Binding

Dims = tuple[int, ...]  # dimensions along which a slice keeps its index
Sums = dict[Dims, NDArray[np.float64]]  # four rows: the fields of Slices from `total` on
PROFILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """Sums over the slices of one tensor, as float64 arrays with the tensor's rank and 1 where summed.

    Attributes
    ----------
    count
        Elements per slice.
    total, absolute, square
        Sum of w, of the magnitude of w, of w squared.
    largest
        Largest magnitude.
    """

    count: int
    total: NDArray[np.float64]
    absolute: NDArray[np.float64]
    square: NDArray[np.float64]
    largest: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Slices of every tensor that some space moves.

    Attributes
    ----------
    infos
        The tensors.
    slices
        By tensor, then by the dimensions that the slices keep.
    smallest
        Smallest magnitude of each tensor that is not zero (infinity if all are), for range checks.
    """

    infos: Mapping[str, TensorInfo]
    slices: Mapping[str, Mapping[Dims, Slices]]
    smallest: Mapping[str, float]

    def of(self, term: Term) -> Slices:
        """Return the slices that a term's scales multiply."""
        return self.slices[term.tensor][_kept(term)]

    def mean(self, tensor: str) -> float:
        """Return the mean of a tensor, NaN if it has no elements."""
        count = self.infos[tensor].numel
        return float(next(iter(self.slices[tensor].values())).total.sum()) / count if count else float("nan")

    def std(self, tensor: str) -> float:
        """Return the population standard deviation of a tensor, NaN if it has no elements."""
        part = next(iter(self.slices[tensor].values()))
        count, mean = self.infos[tensor].numel, self.mean(tensor)
        return float(np.sqrt(max(float(part.square.sum()) / count - mean * mean, 0.0))) if count else mean

    def largest(self, tensor: str) -> float:
        """Return the largest magnitude of a tensor."""
        return max((float(part.largest.max(initial=0.0)) for part in self.slices[tensor].values()), default=0.0)

    def surely_in_range(self, tensor: str, exponents: tuple[NDArray[np.signedinteger], ...]) -> bool:
        """Whether a tensor's extremes stay normal even if the extremes of all its exponents met in one element."""
        code = encoding(self.infos[tensor].dtype)
        low = sum(int(array.min(initial=0)) for array in exponents)
        high = sum(int(array.max(initial=0)) for array in exponents)
        top, bottom = np.ldexp(self.largest(tensor), high), np.ldexp(self.smallest[tensor], low)
        return bool(top <= code.largest and bottom >= code.smallest_normal)


def _kept(term: Term) -> Dims:
    return tuple(dim for dim, size in enumerate(term.index.shape) if size != 1)


def balanced(space: Space) -> bool:
    """Return whether the sizes of the two sides of a space's scales are comparable: weights on both, exactly scaled."""
    return space.rule not in {NORM_FOLD, GAIN_PAIR} and space.limit is None


def profile_weights(
    checkpoint: Checkpoint,
    binding: Binding,
    executor: Executor,
    progress: Progress,
    scales: Mapping[str, TensorScale] | None = None,
) -> Profile:
    """Return the slices of every tensor that a space of the binding moves, and of every linear weight.

    With `scales`, the weights are profiled as these would leave them, without writing anything. All of it takes 32
    bytes per channel; where that is too much, see `vrscope.rescale.survey`.

    Raises
    ------
    CheckpointError
        If one of them has NaN or infinite weights.
    """
    (profile,) = profile_parts(checkpoint, [wanted_slices(binding)], executor, progress, scales)
    return profile


def wanted_slices(binding: Binding) -> dict[str, tuple[Dims, ...]]:
    """Return the tensors that methods and tables look at, each with the dimensions its slices keep."""
    wanted: dict[str, set[Dims]] = defaultdict(set)
    for space in binding.spaces:
        for term in space.terms:
            wanted[term.tensor].add(_kept(term))
        for name in (name for names in space.limit.inputs.values() for name in names) if space.limit else ():
            wanted[name].add(())
    for name, role in binding.roles.items():
        if role.kind == LINEAR and name not in wanted:
            wanted[name].add(())  # no space moves it, but its std is compared with a target
    return {name: tuple(dims) for name, dims in wanted.items()}


def profile_parts(
    checkpoint: Checkpoint,
    parts: Iterable[Mapping[str, Collection[Dims]]],
    executor: Executor,
    progress: Progress,
    scales: Mapping[str, TensorScale] | None = None,
) -> Iterator[Profile]:
    """Yield one profile for each part of a checkpoint, in one pass; a part names its tensors as `wanted_slices` does.

    Raises
    ------
    CheckpointError
        If one of them has NaN or infinite weights.
    """
    parts, after = list(parts), scales or {}
    wanted = {name: dims for part in parts for name, dims in part.items()}

    def visit(info: TensorInfo, block: StoredBlock) -> tuple[Sums, float]:
        scale = after.get(info.name)
        if scale is not None:
            block = replace(block, bits=scaled_bits(info, block, scale))
        return (_sum_matrix if len(info.shape) <= 2 else _sum_tensor)(info, block, wanted[info.name])

    read = stream(checkpoint, wanted, visit, Streaming(executor, progress, "reading weights", PROFILE_BYTES))
    for part in parts:
        infos = {name: checkpoint.tensors[name] for name in part}
        slices: dict[str, Mapping[Dims, Slices]] = {}
        smallest: dict[str, float] = {}
        for name, blocks in islice(read, len(part)):
            info = infos[name]
            sums = {dims: np.zeros((4, *_reduced(info, dims))) for dims in part[name]}
            smallest[name] = np.inf
            for place, (block, least) in zip(checkpoint.block_places(name, PROFILE_BYTES), blocks, strict=True):
                smallest[name] = min(smallest[name], least)
                _merge(info, place, block, sums)
            slices[name] = {dims: Slices(_count(info, dims), *arrays) for dims, arrays in sums.items()}
        yield Profile(infos, slices, smallest)


def rescaled_profile(
    checkpoint: Checkpoint,
    binding: Binding,
    before: Profile,
    scales: Mapping[str, TensorScale],
    executor: Executor,
    progress: Progress,
) -> Profile:
    """Return what a profile would be with `scales`, of balanced spaces and of stds, reading as little as possible.

    Where powers of two do not differ within a slice, the sums after follow from those before without rounding. Of
    tensors that are not read, the other slices are missing, and the smallest magnitude.

    Raises
    ------
    PlanError
        If a power of two pushes a weight out of the normal range of its stored type.
    """
    needed: dict[str, set[Dims]] = defaultdict(set)
    for term in (term for space in binding.spaces if balanced(space) for term in space.terms):
        needed[term.tensor].add(_kept(term))
    moved = {name: scales[name] for name in before.slices if name in scales}
    derived: dict[str, set[Dims]] = {}
    again: dict[str, tuple[Dims, ...]] = {}
    for name, scale in moved.items():
        along = {dim for array in scale.exponents for dim, size in enumerate(array.shape) if size != 1}
        fitting = {dims for dims in before.slices[name] if along <= set(dims)}
        if scale.exponents and fitting >= needed[name] and fitting and before.surely_in_range(name, scale.exponents):
            derived[name] = needed[name] or fitting
        else:
            again[name] = tuple(before.slices[name])
    (read,) = profile_parts(checkpoint, [again], executor, progress, moved) if again else (Profile({}, {}, {}),)
    return Profile(before.infos, _Rescaled(before, read, moved, derived), read.smallest)


@dataclass(frozen=True, slots=True, eq=False)
class _Rescaled(Mapping[str, Mapping[Dims, Slices]]):
    """Slices after a plan, made from those before when asked for, so that they take no memory."""

    before: Profile
    read: Profile
    scales: Mapping[str, TensorScale]
    derived: Mapping[str, set[Dims]]

    def __getitem__(self, name: str) -> Mapping[Dims, Slices]:
        if name not in self.derived:
            return (self.read if name in self.read.slices else self.before).slices[name]
        scale = self.scales[name]
        exponents: Any = sum(scale.exponents)
        signs: Any = math.prod(np.where(array, -1.0, 1.0) for array in scale.negative)
        return {dims: _moved(self.before.slices[name][dims], exponents, signs) for dims in sorted(self.derived[name])}

    def __iter__(self) -> Iterator[str]:
        return iter(self.before.slices)

    def __len__(self) -> int:
        return len(self.before.slices)


def _moved(slices: Slices, exponents: NDArray[np.signedinteger], signs: NDArray[np.float64]) -> Slices:
    """Return slices of weights times signs and powers of two that broadcast against the slices."""
    return Slices(
        slices.count,
        np.ldexp(slices.total * signs, exponents),
        np.ldexp(slices.absolute, exponents),
        np.ldexp(slices.square, 2 * exponents),
        np.ldexp(slices.largest, exponents),
    )


def _reduced(info: TensorInfo, dims: Dims) -> list[int]:
    return [size if dim in dims else 1 for dim, size in enumerate(info.shape)]


def _count(info: TensorInfo, dims: Dims) -> int:
    """Return how many elements a slice has."""
    return math.prod(size for dim, size in enumerate(info.shape) if dim not in dims)


def _merge(info: TensorInfo, place: BlockPlace, part: Sums, sums: Sums) -> None:
    """Add what one block contributes."""
    first = place.first_row if len(info.shape) > 1 else place.first_column
    for dims, arrays in sums.items():
        here = arrays[:, first : first + part[dims].shape[1]] if 0 in dims else arrays
        here[:3] += part[dims][:3]
        np.maximum(here[3], part[dims][3], out=here[3])


def _sum_matrix(info: TensorInfo, block: StoredBlock, wanted: Collection[Dims]) -> tuple[Sums, float]:
    """Return the sums of a block of a matrix or vector, and its smallest magnitude that is not zero."""
    from vrscope.rescale.sum_kernels import add_sums

    code, (n, m) = encoding(info.dtype), block.shape
    bits = block.bits
    rows, columns = np.zeros((n, 3)), np.zeros((3, m))
    row_tops, column_tops = np.zeros(n, bits.dtype), np.zeros(m, bits.dtype)
    least = add_sums(bits, None if info.dtype == "BF16" else code.floats(bits), rows, columns, row_tops, column_tops)
    require_finite_pattern(info, int(row_tops.max(initial=0)))
    by_row = np.vstack((rows.T, code.floats(row_tops)))
    by_column = np.vstack((columns, code.floats(column_tops)))
    pooled = np.append(by_row[:3].sum(axis=1), by_row[3].max(initial=0.0))
    sums = {}
    for dims in wanted:
        if len(info.shape) < 2:  # a vector is one row; its elements are columns
            sums[dims] = by_column if dims else pooled.reshape(4, *_reduced(info, dims))
        elif dims:
            sums[dims] = by_row[:, :, None] if 0 in dims else by_column[:, None, :]
        else:
            sums[dims] = pooled[:, None, None]
    least = int(least) + 1  # as if of a type one bit wider: 0 alone has become the largest number
    return sums, float(code.floats(np.array([least], bits.dtype))[0]) if least >> code.width == 0 else np.inf


def _sum_tensor(info: TensorInfo, block: StoredBlock, wanted: Collection[Dims]) -> tuple[Sums, float]:
    """Return the sums of a block of a tensor of three or more dimensions, and its smallest nonzero magnitude."""
    import torch

    require_finite(info, block)
    values = block.values.reshape(-1, *info.shape[1:]).to(torch.float64)
    magnitude = values.abs()
    sums = {}
    for dims in wanted:
        over = [dim for dim in range(len(info.shape)) if dim not in dims]
        peak = torch.amax(magnitude, dim=over, keepdim=True).numpy() if over else magnitude.numpy()
        parts = [_sum(part, over) for part in (values, magnitude, magnitude * magnitude)]
        sums[dims] = np.stack((*parts, peak))
    return sums, float(torch.where(magnitude > 0, magnitude, torch.inf).min())


def _sum(values: torch.Tensor, over: list[int]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (values.sum(dim=over, keepdim=True) if over else values).numpy()
    return result


def side_sizes(space: Space, profile: Profile, norm: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the size of the writers and of the readers of every scale of a space, arrays of shape `(size,)`.

    Only matrices count, not biases or gains: WISCA balances weights. `norm` is "frobenius", "l1" or "max".
    """
    sides = []
    for sign in (1, -1):
        sizes = np.zeros(space.size)
        for term in space.terms:
            if np.sign(term.power) != sign or len(profile.infos[term.tensor].shape) < 2:
                continue
            part = profile.of(term)
            values = {"frobenius": part.square, "l1": part.absolute, "max": part.largest}[norm].reshape(-1)
            index = term.index.reshape(-1)
            used = index >= 0
            if norm == "max":
                np.maximum.at(sizes, index[used], values[used])
            else:
                np.add.at(sizes, index[used], values[used])
        sides.append(np.sqrt(sizes) if norm == "frobenius" else sizes)
    return sides[0], sides[1]
