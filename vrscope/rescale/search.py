"""The search for the scales of one space that make what reads it survive rounding best.

Damage is half of sum(importance * error^2) over all readers, for several formats at once. The search starts from the
best of some given choices, goes over a grid of powers of the importance and of the size of the columns (as AWQ does,
arXiv 2306.00978, with mean |x| alone), and descends from there over single scales: one step up, one down, or the other
sign. A sign counts where the levels of a format are not the same on both sides of zero: neighbours that lean to one
side need fewer of them. Which of these is taken, if any, is decided on text that was held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vrscope.quant.formats import Format
from vrscope.rescale.readers import Reader, Singles

GRID = tuple((a / 10, b) for b in (0.0, 0.5) for a in range(10))  # powers of importance and of size
SWEEPS = 2
THRESHOLD = 1e-7  # of the damage of the space: what one step must gain
NONE, AWQ = "none", "awq"
START, ON_GRID, DESCENT = "start", "grid", "search"

Longs = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Scales(NamedTuple):
    """Scales of a space: log2 of their magnitudes, and which are negative; both of shape `(size,)`."""

    exponents: Longs
    negative: Bools

    def factors(self, ids: NDArray[np.int32], power: int) -> Singles:
        """Return what columns are multiplied by that read these scales (-1: none) with some power."""
        magnitudes = np.ldexp(np.float32(1), power * np.append(self.exponents, 0)[ids])
        turned = np.append(self.negative, False)[ids] & (power % 2 != 0)
        factors: Singles = np.where(turned, -magnitudes, magnitudes).astype(np.float32, copy=False)
        return factors


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What the search chose for one space.

    Attributes
    ----------
    exponents, negative
        Log2 of the scales of the space, and which of them are negative, both of shape `(size,)`.
    method
        Whose choice the search started from: "none" for the space as it was, "awq" for the grid, or another method's.
    stage
        "start", "grid" or "search" (descent); empty for "none".
    before, after
        Damage on the held-out text by format.
    refined
        How many scales were moved after the search, see `vrscope.rescale.refine`.
    """

    exponents: Longs
    negative: Bools
    method: str
    stage: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    refined: int = 0

    def moved(self, scales: Scales, after: Mapping[str, float], count: int) -> Found:
        """Return the same with other scales, of which `count` differ, and the damage they leave."""
        exponents, negative = scales
        method, stage = (AWQ, DESCENT) if count and self.method == NONE else (self.method, self.stage)
        return replace(
            self, exponents=exponents, negative=negative, method=method, stage=stage, after=after, refined=count
        )


def base_damage(readers: Sequence[Reader], formats: Sequence[Format]) -> NDArray[np.float64]:
    """Return the damage in every format as it is, on the text to search on, shape `(formats,)`."""
    works = [_Work.of(reader, formats) for reader in readers]
    return _damages(works, _nothing(_size(readers)), held_out=False)


def search(
    readers: Sequence[Reader],
    formats: Sequence[tuple[Format, float]],
    size: int,
    given: Mapping[str, NDArray[np.float64]],
    limit: int,
    signed: bool = False,
) -> Found:
    """Return the scales to give to a space.

    Parameters
    ----------
    readers
        Of the space.
    formats
        What to minimise the damage of, with the weight of each.
    size
        Number of scales.
    given
        Choices of other methods to start from: name to log2 scales, shape `(size,)`.
    limit
        Largest magnitude of an exponent.
    signed
        Whether scales may be negative.
    """
    entries, shares = [entry for entry, _ in formats], np.array([share for _, share in formats])
    works = [_Work.of(reader, entries) for reader in readers]

    def cost(scales: Scales, held_out: bool = False) -> float:
        return float(shares @ _damages(works, scales, held_out))

    nothing = _nothing(size)
    tried: list[tuple[str, str, Scales]] = [(NONE, "", nothing)]
    tried += [(name, START, _whole(values, limit)) for name, values in given.items()]
    best = min(((name, stage, values, cost(values)) for name, stage, values in tried), key=lambda entry: entry[3])
    if len({reader.power for reader in readers}) == 1:
        by_importance, by_size = _columns(readers, size)
        for a, b in GRID[1:]:
            wanted = a * by_importance - b * by_size
            values = _whole((wanted - np.median(wanted)) / readers[0].power, limit)
            value = cost(values)
            if value < best[3]:
                best = (AWQ, ON_GRID, values, value)
    tried.append(best[:3])
    if _separate(readers):
        lower = Scales(best[2].exponents.copy(), best[2].negative.copy())
        bounds = limit, signed and not all(entry.odd for entry in entries)
        for work in works:
            work.descend(lower, shares, bounds, THRESHOLD * cost(nothing))
        tried.append((best[0] if best[0] != NONE else AWQ, DESCENT, lower))
    chosen = min(tried, key=lambda entry: cost(entry[2], held_out=True))
    names = [entry.name for entry in entries]
    before, after = (dict(zip(names, _damages(works, scales).tolist(), strict=True)) for scales in (nothing, chosen[2]))
    return Found(*chosen[2], chosen[0], chosen[1], before, after)


def _nothing(size: int) -> Scales:
    return Scales(np.zeros(size, np.int64), np.zeros(size, np.bool_))


def _whole(values: NDArray[np.float64], limit: int) -> Scales:
    whole = np.clip(np.rint(np.where(np.isfinite(values), values, 0)), -limit, limit)
    return _nothing(values.size)._replace(exponents=whole.astype(np.int64))


def _separate(readers: Sequence[Reader]) -> bool:
    """Whether no scale is read by two readers, so that each can descend alone."""
    used = [np.unique(reader.ids[reader.ids >= 0]) for reader in readers]
    return sum(map(len, used)) == len(np.unique(np.concatenate(used))) if used else False


def _columns(readers: Sequence[Reader], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log2 of the root of the mean importance, and of the mean magnitude, of the columns of every scale."""
    sums = np.zeros((3, size))
    for reader in readers:
        used = reader.ids >= 0
        rows = reader.weight.shape[0]
        for at, values in enumerate((reader.importance.mean(axis=0), np.abs(reader.weight).mean(axis=0), 1.0)):
            np.add.at(sums[at], reader.ids[used], rows * (values[used] if np.ndim(values) else values))
    tiny = np.finfo(np.float32).tiny
    mean = sums[:2] / np.maximum(sums[2], 1)
    floors = np.maximum(
        mean.max(axis=1, keepdims=True) * 2.0**-24, tiny
    )  # what no text reached is not infinitely small
    logs = np.log2(np.maximum(mean, floors))
    return logs[0] / 2, logs[1]


@dataclass(slots=True, eq=False)
class _Work:
    """One reader with room for the errors of all formats."""

    reader: Reader
    formats: tuple[Longs, Singles, Longs, Singles, NDArray[np.float64]]
    errors: Singles
    spans: Singles

    @classmethod
    def of(cls, reader: Reader, formats: Sequence[Format]) -> _Work:
        columns = reader.weight.shape[1]
        rows = [unit_parameters(entry, columns) for entry in formats]
        arrays = (
            np.array([row[0] for row in rows]),
            np.array([row[1] for row in rows], np.float32),
            np.array([row[2] for row in rows]),
            np.array([row[3] for row in rows], np.float32),
            np.ones(len(rows)),
        )
        units = max(-(-columns // row[2]) for row in rows)
        shape = reader.weight.shape
        return cls(
            reader,
            arrays,
            np.empty((len(rows), *shape), np.float32),
            np.empty((len(rows), shape[0], units, 2), np.float32),
        )

    def damage(self, scales: Scales, held_out: bool) -> NDArray[np.float64]:
        """Return the damage in every format, and leave errors and spans behind."""
        from vrscope.rescale.search_kernels import start

        factors = scales.factors(self.reader.ids, self.reader.power)
        importance = self.reader.held_out if held_out else self.reader.importance
        kinds, tops, sizes, books, _ = self.formats
        found = np.zeros(kinds.size)
        for f in range(kinds.size):
            units = -(-self.reader.weight.shape[1] // int(sizes[f]))
            format_ = (kinds[f], tops[f], sizes[f], books[f])
            found[f] = start(self.reader.weight, importance, factors, format_, self.errors[f], self.spans[f][:, :units])
        return found

    def descend(self, scales: Scales, shares: NDArray[np.float64], bounds: tuple[int, bool], threshold: float) -> None:
        """Lower the damage by single moves, in place; a sweep that raises it after all is undone.

        `bounds` are the largest magnitude of an exponent and whether scales may be negative.
        """
        from vrscope.rescale.search_kernels import sweep

        reader = self.reader
        used = np.flatnonzero(reader.ids >= 0)
        columns = used[np.argsort(reader.ids[used], kind="stable")]
        own, begins = np.unique(reader.ids[columns], return_index=True)
        places = (columns, np.append(begins, columns.size), self._order(columns, begins))
        current = float(shares @ self.damage(scales, held_out=False))
        for _ in range(SWEEPS):
            before = scales.exponents[own], scales.negative[own]
            after = before[0].copy(), before[1].copy()
            formats = (*self.formats[:4], shares)
            factors = scales.factors(reader.ids, reader.power)
            moved = sweep(
                *(reader.weight, reader.importance, factors, formats, self.errors, self.spans),
                *(places, *after, (reader.power, *bounds), threshold),
            )
            scales.exponents[own], scales.negative[own] = after
            reached = float(shares @ self.damage(scales, held_out=False))
            if reached >= current:
                scales.exponents[own], scales.negative[own] = before
                break
            current = reached
            if not moved:
                break

    def _order(self, columns: Longs, begins: Longs) -> Longs:
        """Return the scales, unit by unit, which stay in the cache, those of the most important columns first."""
        weight = self.reader.importance.mean(axis=0, dtype=np.float64)[columns]
        unit = columns[begins] // self.formats[2].max()
        return np.lexsort((-np.add.reduceat(weight, begins), unit))


def unit_parameters(entry: Format, columns: int) -> tuple[int, float, int, NDArray[np.float32]]:
    """Return kind, largest integer, columns per unit and code book of a format, as the kernels take them."""
    from vrscope.quant.roundtrip import codebook
    from vrscope.rescale.grid_kernels import CODEBOOK, INTEGER, SYMMETRIC

    assert entry.levels is not None
    kind = {"integer": INTEGER, "symmetric": SYMMETRIC, "codebook": CODEBOOK}[entry.levels.kind]
    book = np.concatenate(codebook(entry.levels.book)) if entry.levels.book else np.zeros(31)
    size = min(entry.scope.size or columns, columns)
    return kind, float(entry.levels.top), size, book.astype(np.float32)


def predicted(readers: Sequence[Reader], formats: Sequence[Format], scales: Scales) -> dict[str, float]:
    """Return the damage on the held-out text by format."""
    works = [_Work.of(reader, formats) for reader in readers]
    return dict(zip((entry.name for entry in formats), _damages(works, scales).tolist(), strict=True))


def _damages(works: Sequence[_Work], scales: Scales, held_out: bool = True) -> NDArray[np.float64]:
    """Return the damage of all readers in every format, shape `(formats,)`."""
    found: NDArray[np.float64] = np.sum([work.damage(scales, held_out) for work in works], axis=0)
    return found


def _size(readers: Sequence[Reader]) -> int:
    return max(int(reader.ids.max()) for reader in readers) + 1
