"""Which matrix of a running model holds which matrix of a checkpoint, found by comparing the weights themselves.

Loading renames tensors, stacks experts and joins gate with up, and how it does so changes from release to release; the
values stay. Every row of a weight gets a 64-bit key from a sample of its values, and a stored matrix lies where its
keys are found again: one after the other, or every second one where two matrices alternate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Keys = NDArray[np.int64]

_SAMPLED = 64  # to twice as many values of a row enter its key
_MANY = 64  # places with the same key beyond which only those are tried that a joint matrix would have
_STEPS = (1, 2)  # joined one after the other, or alternating


def row_keys(matrix: Tensor, dtype: torch.dtype) -> Keys:
    """Return one key per row of a matrix `(rows, columns)`: from the bits, in `dtype`, of a sample of its columns."""
    import torch

    columns = matrix.shape[1]
    sample = matrix.detach()[:, :: max(1, columns // _SAMPLED)].to(dtype).contiguous()
    bits = sample.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[sample.element_size()])
    factors = np.random.default_rng(columns).integers(1 << 62, size=bits.shape[1], dtype=np.int64) | 1
    keys = (bits.long() * torch.from_numpy(factors).to(bits.device)).sum(dim=1)  # overflow wraps, as in any hash
    found: Keys = keys.cpu().numpy()
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """One matrix of a running model: a parameter, or one of the matrices stacked in it, seen as `(out, in)`.

    Attributes
    ----------
    name
        Of the parameter in the model.
    parameter
        The parameter itself.
    index
        Position along the leading dimensions of the parameter, () for a matrix.
    transposed
        Whether the last two dimensions of the parameter are `(in, out)`.
    """

    name: str
    parameter: torch.nn.Parameter
    index: tuple[int, ...]
    transposed: bool

    def matrix(self) -> Tensor:
        """Return a view of shape `(out, in)`."""
        found = self.parameter.data[self.index]
        return found.T if self.transposed else found


@dataclass(frozen=True, slots=True)
class Found:
    """Where a stored matrix lies: in which running matrix, and in which of its rows."""

    running: Running
    rows: slice


@dataclass(slots=True)
class Rows:
    """All rows of the running matrices of one width and dtype, to be searched by their keys."""

    matrices: list[Running] = field(default_factory=list)
    keys: list[Keys] = field(default_factory=list)
    _search: tuple[Keys, Keys, Keys] | None = None  # sorted keys, their places, first place of each matrix

    def add(self, running: Running) -> None:
        """Add one matrix."""
        self.matrices.append(running)
        self.keys.append(row_keys(running.matrix(), running.parameter.dtype))

    def find(self, wanted: Keys) -> list[Found]:
        """Return every place where rows with these keys follow each other, with a step of one or of two rows."""
        if self._search is None:
            everything = np.concatenate(self.keys)
            places = np.argsort(everything, kind="stable")
            self._search = everything[places], places, np.cumsum([0, *map(len, self.keys)])
        ordered, places, bounds = self._search
        low, high = (np.searchsorted(ordered, wanted, side) for side in ("left", "right"))
        counts = high - low
        if not counts.size or not counts.min():
            return []
        rarest = int(np.argmin(counts))
        found = []
        for place in places[low[rarest] : high[rarest]].tolist():
            at = int(np.searchsorted(bounds, place, "right")) - 1
            row = place - int(bounds[at])
            fits = self._fits(at, row, rarest, wanted, int(counts.min()))
            found += [Found(self.matrices[at], rows) for rows in fits]
        return found

    def _fits(self, at: int, row: int, rarest: int, wanted: Keys, places: int) -> Iterator[slice]:
        """Yield the rows of matrix number `at` that have the wanted keys, if its `row` is that of key `rarest`."""
        keys, count = self.keys[at], len(wanted)
        for step in _STEPS if count > 1 else _STEPS[:1]:
            start = row - step * rarest
            stop = start + step * (count - 1) + 1
            likely = start % count == 0 if step == 1 else start < step and stop > len(keys) - step
            if start < 0 or stop > len(keys) or (places > _MANY and not likely):
                continue
            if np.array_equal(keys[start:stop:step], wanted):
                yield slice(start, stop, step)


@dataclass(slots=True)
class Index:
    """The running matrices, by dtype and width."""

    groups: dict[tuple[torch.dtype, int], Rows] = field(default_factory=lambda: defaultdict(Rows))
    taken: set[tuple[int, tuple[int, ...], int, int]] = field(default_factory=set)

    def add(self, running: Running) -> None:
        """Add one matrix."""
        matrix = running.matrix()
        self.groups[matrix.dtype, matrix.shape[1]].add(running)

    def find(self, name: str, index: Sequence[int], matrix: Tensor) -> Found | None:
        """Return where a stored matrix `(out, in)` lies, None if nowhere.

        Where several places hold the same values, it is one that no other matrix took, whose name has the same
        numbers, and shares most words with the stored name.

        Parameters
        ----------
        name, index
            Its tensor on disk, and the position in it.
        matrix
            In its stored dtype.
        """
        found: list[Found] = []
        for (dtype, width), rows in self.groups.items():
            if width == matrix.shape[1]:
                found += rows.find(row_keys(matrix, dtype))
        if not found:
            return None
        own = _numbers(name, index), _words(name)

        def rank(place: Found) -> tuple[bool, bool, int]:
            running = place.running
            same = _numbers(running.name, running.index) == own[0]
            return self._key(place) not in self.taken, same, len(_words(running.name) & own[1])

        best = max(found, key=rank)  # the first of equals
        self.taken.add(self._key(best))
        return best

    @staticmethod
    def _key(place: Found) -> tuple[int, tuple[int, ...], int, int]:
        return id(place.running.parameter), place.running.index, place.rows.start, place.rows.step


def _numbers(name: str, index: Sequence[int]) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()] + list(index)


def _words(name: str) -> set[str]:
    return set(re.split(r"[._\d]+", name))
