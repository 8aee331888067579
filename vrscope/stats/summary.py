"""Everything that one pass over a tensor accumulates, from which every statistic follows.

In: row blocks in the stored order. Out: a `Summary`, which the table of statistics reads. Types of 8 and 16 bits are
counted pattern by pattern, which loses nothing. For F32 and F64 moments are taken over stretches of 4,096 elements,
counted from the start of the tensor, and merged one after the other. So the result is the same to the last bit for any
cut into blocks and any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vrscope.checkpoint.source import StoredBlock, TensorInfo
from vrscope.stats.encoding import Encoding, encoding
from vrscope.stats.histogram import Histogram, histogram_of, magnitude_of
from vrscope.stats.matrix import MatrixView
from vrscope.stats.moments import Moments, moments_of

CHUNK = 4096  # elements whose moments are taken together; they fit the first-level cache

Floats = NDArray[np.float64]
Bits = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of one tensor.

    Attributes
    ----------
    moments
        Of the finite values.
    histogram
        Of the finite values.
    zero_count, nan_count, inf_count
        Numbers of elements.
    row_absmax, column_absmax
        Largest finite magnitude of every output and input channel, NaN where there is none, shape `(channels,)`;
        None for vectors and scalars. Stacked experts count one after the other.
    recount
        Counts the values farther than a distance (second argument) from a mean (first) by reading the tensor again.
    target_std
        The standard deviation that `tvr_ratio` compares with.
    top_singular_value
        Largest singular value; NaN if it was not asked for.
    """

    moments: Moments
    histogram: Histogram
    zero_count: int
    nan_count: int
    inf_count: int
    row_absmax: Floats | None
    column_absmax: Floats | None
    recount: Callable[[float, float], int]
    target_std: float = 0.01
    top_singular_value: float = math.nan

    @property
    def count(self) -> int:
        """Number of finite values."""
        return int(self.moments.count)

    def share_beyond(self, sigmas: float) -> float:
        """Return the share of the finite values more than `sigmas` standard deviations away from their mean.

        Exact for every type. The histogram decides it, but for F32 and F64 tensors with values in the very bins that
        hold the two thresholds: these are read a second time. 0 for constant values, NaN without values.
        """
        if self.moments.is_constant:
            return 0.0 if self.count else math.nan
        mean, distance = float(self.moments.mean), sigmas * float(self.moments.std)
        beyond = self.histogram.count_beyond(mean, distance)
        return (self.recount(mean, distance) if beyond is None else beyond) / self.count


@dataclass(frozen=True, slots=True)
class BlockPart:
    """What one row block contributes.

    Attributes
    ----------
    patterns
        Counts per bin of the encoding, uint32, shape `(bins,)`.
    row_top, column_top
        Magnitude patterns plus one, shapes `(rows,)` and `(matrices, columns)`; empty for vectors.
    row
        Matrix row, counted over all matrices, that `row_top[0]` is.
    head, chunks, tail
        For F32 and F64: values up to the first multiple of `CHUNK`, running moments of the whole stretches
        (shape `(n, 10)`), and the values after the last. Empty for other types.
    """

    patterns: NDArray[np.uint32]
    row_top: Bits
    column_top: Bits
    row: int
    head: NDArray[np.floating]
    chunks: Floats
    tail: NDArray[np.floating]


def summarize_block(info: TensorInfo, view: MatrixView | None, block: StoredBlock) -> BlockPart:
    """Return what `block` contributes to the summary of its tensor, in one visit to its values."""
    from vrscope.stats import kernels

    code = encoding(info.dtype)
    flat = block.bits.reshape(-1)
    patterns = np.zeros(code.bins, np.uint32)
    kernels.count_patterns(flat, np.uint64(code.shift), patterns)
    first = block.first_row * info.columns + block.first_column
    row, row_top, column_top = 0, np.zeros(0, code.unsigned), np.zeros((0, 0), code.unsigned)
    if view is not None:
        row, rows = first // view.columns, flat.size // view.columns
        per = view.rows if view.matrices > 1 else rows
        row_top = np.zeros(rows, code.unsigned)
        column_top = np.zeros((rows // per, view.columns), code.unsigned)
        limit = code.unsigned.type(code.limit)
        kernels.top_magnitudes(flat.reshape(rows, view.columns), limit, per, row_top, column_top)
    start, stop = 0, 0
    chunks = np.zeros((0, kernels.MOMENT_FIELDS))
    if code.shift:
        start = min(-first % CHUNK, flat.size)
        stop = start + (flat.size - start) // CHUNK * CHUNK
        chunks = _chunks(code, flat[start:stop])
    values = code.floats(flat[:0]) if not code.shift else code.floats(flat)
    return BlockPart(patterns, row_top, column_top, row, values[:start].copy(), chunks, values[stop:].copy())


def rehearsal(dtype: str) -> None:
    """Call every compiled loop that the summary of a tensor of this type needs."""
    from vrscope.stats import kernels

    code = encoding(dtype)
    info = TensorInfo("", dtype, (3, CHUNK), "", 0, 3 * CHUNK * code.width // 8)
    view = MatrixView(1, 3, CHUNK, False)
    accumulator = Accumulator(info, view)
    accumulator.add(summarize_block(info, view, StoredBlock(0, np.zeros((3, CHUNK), code.unsigned), 0, info)))
    accumulator.summary(lambda mean, distance: 0, 1.0)
    kernels.count_beyond(code.floats(np.zeros(1, code.unsigned)), 0.0, 0.0)


@dataclass(slots=True)
class Accumulator:
    """Merges the parts of one tensor, in the order of its rows."""

    info: TensorInfo
    view: MatrixView | None
    encoding: Encoding = field(init=False)
    _patterns: NDArray[np.int64] = field(init=False)
    _state: Floats = field(init=False)
    _row_top: Bits = field(init=False)
    _column_top: Bits = field(init=False)
    _pending: list[NDArray[np.floating]] = field(init=False, default_factory=list)
    _pending_count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        from vrscope.stats import kernels

        self.encoding = encoding(self.info.dtype)
        self._patterns = np.zeros(self.encoding.bins, np.int64)
        self._state = np.zeros(kernels.MOMENT_FIELDS)
        if self.view is not None:
            self._row_top = np.zeros(self.view.matrices * self.view.rows, self.encoding.unsigned)
            self._column_top = np.zeros((self.view.matrices, self.view.columns), self.encoding.unsigned)

    def add(self, part: BlockPart) -> None:
        """Merge the next block."""
        from vrscope.stats import kernels

        kernels.add_counts(self._patterns, part.patterns)
        if self.view is not None:
            self._row_top[part.row : part.row + part.row_top.size] = part.row_top
            first = part.row // self.view.rows if self.view.matrices > 1 else 0
            own = self._column_top[first : first + part.column_top.shape[0]]
            np.maximum(own, part.column_top, out=own)
        if self.encoding.shift:
            self._wait(part.head)
            self._fold(part.chunks)
            self._wait(part.tail)

    def summary(self, recount: Callable[[float, float], int], target_std: float) -> Summary:
        """Return the summary of all that was added; `recount` and `target_std` are handed through."""
        moments, zeros, nans, infs = self._figures()
        rows = columns = None
        if self.view is not None:
            rows = magnitude_of(self.encoding, self._row_top)
            columns = magnitude_of(self.encoding, self._column_top.reshape(-1))
            if self.view.transposed:
                rows, columns = columns, rows
        histogram = histogram_of(self.encoding, self._patterns, float(moments.absmax))
        return Summary(moments, histogram, zeros, nans, infs, rows, columns, recount, target_std)

    def _wait(self, values: NDArray[np.floating]) -> None:
        """Keep `values` until a stretch is complete."""
        self._pending.append(values)
        self._pending_count += values.size
        if self._pending_count == CHUNK:
            self._flush()

    def _flush(self) -> None:
        """Fold what is waiting, a whole stretch or the last one."""
        if self._pending_count:
            values = np.concatenate(self._pending)
            self._fold(_chunks(self.encoding, values.view(self.encoding.unsigned)))
        self._pending, self._pending_count = [], 0

    def _fold(self, chunks: Floats) -> None:
        from vrscope.stats import kernels

        kernels.fold(self._state, chunks)

    def _figures(self) -> tuple[Moments, int, int, int]:
        """Return moments and the numbers of zeros, NaNs and infinities."""
        from vrscope.stats import kernels

        if self.encoding.shift:
            self._flush()
            nans, infs = int(self._state[kernels.NANS]), int(self._state[kernels.INFS])
        else:
            finite, half = self.encoding.limit + 1, self.encoding.bins // 2
            positive, negative = self._patterns[:half], self._patterns[half:]
            infinity = self.encoding.infinity
            infs = int(positive[infinity] + negative[infinity]) if infinity is not None else 0
            nans = int(positive[finite:].sum() + negative[finite:].sum()) - infs
            positive, negative = positive[:finite], negative[:finite]
            kernels.pattern_moments(self.encoding.lower, positive, negative, self._state)
        return moments_of(self._state), int(self._state[kernels.ZEROS]), nans, infs


def _chunks(code: Encoding, bits: Bits) -> Floats:
    """Return running moments of every stretch of `CHUNK` F32 or F64 values, shape `(ceil(n / CHUNK), 10)`."""
    from vrscope.stats import kernels

    chunks = np.zeros((-(-bits.size // CHUNK), kernels.MOMENT_FIELDS))
    kernels.chunk_moments(code.floats(bits), bits, CHUNK, code.unsigned.type(code.limit), chunks)
    return chunks
