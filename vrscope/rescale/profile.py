"""What the methods need to know of the weights: sums along rows and columns, from one pass over the row blocks.

A method never reads a weight itself. It asks for the size of everything that one scale multiplies, which is a sum over
slices; slices of every tensor are accumulated here in float64, once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.binding import Binding
from vrscope.arch.roles import LINEAR
from vrscope.arch.spaces import Space, Term
from vrscope.checkpoint.source import Checkpoint, StoredBlock, TensorInfo
from vrscope.executors import Executor
from vrscope.progress import Progress
from vrscope.rescale.scaling import TensorScale, require_finite, scaled_bits
from vrscope.stats.encoding import encoding

if TYPE_CHECKING:
    import torch

Dims = tuple[int, ...]  # dimensions along which a slice keeps its index
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

    def std(self, tensor: str) -> float:
        """Return the population standard deviation of a tensor, NaN if it has no elements."""
        part = next(iter(self.slices[tensor].values()))
        count = self.infos[tensor].numel
        mean = float(part.total.sum()) / count if count else float("nan")
        return float(np.sqrt(max(float(part.square.sum()) / count - mean * mean, 0.0))) if count else mean

    def largest(self, tensor: str) -> float:
        """Return the largest magnitude of a tensor."""
        return max((float(part.largest.max(initial=0.0)) for part in self.slices[tensor].values()), default=0.0)


def _kept(term: Term) -> Dims:
    return tuple(dim for dim, size in enumerate(term.index.shape) if size != 1)


def profile_weights(
    checkpoint: Checkpoint,
    binding: Binding,
    executor: Executor,
    progress: Progress,
    scales: Mapping[str, TensorScale] | None = None,
) -> Profile:
    """Return the slices of every tensor that a space of the binding moves, and of every linear weight.

    With `scales`, the weights are profiled as these would leave them, without writing anything.

    Raises
    ------
    CheckpointError
        If one of them has NaN or infinite weights.
    """
    wanted: dict[str, set[Dims]] = defaultdict(set)
    for space in binding.spaces:
        for term in space.terms:
            wanted[term.tensor].add(_kept(term))
        for name in (name for names in space.limit.inputs.values() for name in names) if space.limit else ():
            wanted[name].add(())
    for name, role in binding.roles.items():
        if role.kind == LINEAR and name not in wanted:
            wanted[name].add(())  # no space moves it, but its std is compared with a target
    infos = {name: checkpoint.tensors[name] for name in wanted}
    after = scales or {}
    total = sum(info.size_bytes for info in infos.values())
    done = 0
    slices: dict[str, Mapping[Dims, Slices]] = {}
    smallest: dict[str, float] = {}
    for name, (parts, least) in zip(
        wanted,
        executor.map(lambda name: _slice(checkpoint, infos[name], wanted[name], after.get(name)), list(wanted)),
        strict=True,
    ):
        slices[name], smallest[name] = parts, least
        done += infos[name].size_bytes
        progress("reading weights", done, total, "bytes")
    return Profile(infos, slices, smallest)


def _slice(
    checkpoint: Checkpoint, info: TensorInfo, wanted: set[Dims], scale: TensorScale | None
) -> tuple[dict[Dims, Slices], float]:
    sums = {dims: np.zeros((4, *_reduced(info, dims))) for dims in wanted}
    least = np.inf
    for block in map(checkpoint.read_stored, checkpoint.block_places(info.name, PROFILE_BYTES)):
        require_finite(info, block)
        stored = block if scale is None else replace(block, bits=scaled_bits(info, block, scale))
        least = min(least, (_add_matrix if len(info.shape) <= 2 else _add_tensor)(info, stored, sums))
    found = {}
    for dims, arrays in sums.items():
        slice_count = int(np.prod([size for dim, size in enumerate(info.shape) if dim not in dims], dtype=np.int64))
        found[dims] = Slices(slice_count, *arrays)
    return found, least


def _reduced(info: TensorInfo, dims: Dims) -> list[int]:
    return [size if dim in dims else 1 for dim, size in enumerate(info.shape)]


def _add_matrix(info: TensorInfo, block: StoredBlock, sums: Mapping[Dims, NDArray[np.float64]]) -> float:
    """Add a block of a matrix or vector to its sums, and return its smallest nonzero magnitude."""
    from vrscope.rescale.kernels import add_sums

    values = encoding(info.dtype).floats(block.bits)
    rows, columns = np.zeros((4, values.shape[0])), np.zeros((4, values.shape[1]))
    least = float(add_sums(values, rows, columns))
    for dims, arrays in sums.items():
        if len(info.shape) < 2:  # a vector is one row; its elements are columns
            part = columns if dims else rows
            here = arrays[:, block.first_column : block.first_column + values.shape[1]] if dims else arrays
            here = here.reshape(4, -1)
        else:
            part = rows[:, :, None] if 0 in dims else columns[:, None, :]
            here = arrays[:, block.first_row : block.first_row + values.shape[0]] if 0 in dims else arrays
            if not dims:
                part = _pool(rows)[:, None, None]
        here[:3] += part[:3]
        np.maximum(here[3], part[3], out=here[3])
    return least


def _pool(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.append(rows[:3].sum(axis=1), rows[3].max(initial=0.0))


def _add_tensor(info: TensorInfo, block: StoredBlock, sums: Mapping[Dims, NDArray[np.float64]]) -> float:
    """Add a block of a tensor of three or more dimensions to its sums, and return its smallest nonzero magnitude."""
    import torch

    values = block.values.reshape(-1, *info.shape[1:]).to(torch.float64)
    magnitude = values.abs()
    for dims, arrays in sums.items():
        over = [dim for dim in range(len(info.shape)) if dim not in dims]
        here = arrays[:, block.first_row : block.first_row + values.shape[0]] if 0 in dims else arrays
        for at, part in enumerate((values, magnitude, magnitude * magnitude)):
            here[at] += _sum(part, over)
        peak = torch.amax(magnitude, dim=over, keepdim=True).numpy() if over else magnitude.numpy()
        np.maximum(here[3], peak, out=here[3])
    return float(torch.where(magnitude > 0, magnitude, torch.inf).min())


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
