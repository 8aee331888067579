"""What the histogram of a tensor's bit patterns tells: quantiles, shares, and its distribution over other bins.

In: counts from `vrscope.stats.kernels.count_patterns`. For types of 8 and 16 bits every answer is exact. For F32 and
F64 the values of a bin are taken as evenly spread over it; a bin is at most 0.4 % (F32) or 0.8 % (F64) wide, relative
to its values (subnormal numbers excepted), which bounds the error of every quantile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vrscope.stats.encoding import Encoding

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bins:
    """Bins in use, ascending; those with equal bounds hold one value.

    Attributes
    ----------
    lower, upper
        Bounds, float64, shape `(n,)`.
    ends
        Number of values up to and including each bin, int64, shape `(n,)`.
    """

    lower: Floats
    upper: Floats
    ends: Counts

    @property
    def counts(self) -> Counts:
        """Number of values in each bin, shape `(n,)`."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True, slots=True)
class Histogram:
    """The distribution of the finite values of a tensor: with their sign, and of their magnitudes."""

    values: Bins
    magnitudes: Bins

    @property
    def count(self) -> int:
        """Number of finite values."""
        return int(self.values.ends[-1]) if self.values.ends.size else 0

    def abs_quantile(self, share: float) -> float:
        """Return a quantile of the magnitudes, linear between order statistics (the default of `numpy.quantile`).

        `share` lies between 0 and 1; the result is NaN without values.
        """
        if not self.count:
            return math.nan
        position = share * (self.count - 1)
        rank = math.floor(position)
        below, above = _order_statistic(self.magnitudes, rank), _order_statistic(self.magnitudes, math.ceil(position))
        return below + (above - below) * (position - rank)

    def count_beyond(self, mean: float, distance: float) -> tuple[float, int]:
        """Return how many values lie more than `distance` away from `mean`, and by how much that may be wrong.

        The second number is the count of the bins that hold a threshold: 0 for types of 8 and 16 bits.
        """
        lower, upper, counts = self.values.lower, self.values.upper, self.values.counts
        low, high = mean - distance, mean + distance
        single = lower == upper
        outside = np.where(single, np.abs(lower - mean) > distance, (upper <= low) | (lower >= high))
        torn = ~single & (((lower < low) & (low < upper)) | ((lower < high) & (high < upper)))
        low_share = np.clip((low - lower[torn]) / (upper[torn] - lower[torn]), 0.0, 1.0)
        high_share = np.clip((upper[torn] - high) / (upper[torn] - lower[torn]), 0.0, 1.0)
        partly = float((counts[torn] * (low_share + high_share)).sum())
        return int(counts[outside].sum()) + partly, int(counts[torn].sum())

    def over(self, edges: Floats) -> tuple[Counts, int, int]:
        """Return the counts between `edges` (ascending, shape `(n + 1,)`), and how many values lie below and above.

        A value on an edge belongs to the bin that starts there, as in `numpy.histogram`, but for the last edge, where
        it counts as above.
        """
        lower, upper = self.values.lower, self.values.upper
        if not self.count:
            return np.zeros(edges.size - 1, np.int64), 0, 0
        before = np.searchsorted(lower, edges, side="left")  # bins that start below each edge
        torn = np.maximum(before - 1, 0)
        width = np.where(before > 0, upper[torn] - lower[torn], 0.0)
        rest = np.divide(upper[torn] - edges, width, out=np.zeros(edges.size), where=width > 0)
        ends = np.concatenate([[0], self.values.ends])
        reached = ends[before] - np.rint(self.values.counts[torn] * np.clip(rest, 0.0, 1.0)).astype(np.int64)
        return np.diff(reached), int(reached[0]), self.count - int(reached[-1])


def histogram_of(encoding: Encoding, counts: NDArray[np.integer], absmax: float) -> Histogram:
    """Return the finite part of a count of bit patterns.

    Parameters
    ----------
    encoding
        Says what the bins are.
    counts
        One per bin of both signs, in the order of the bit patterns, shape `(encoding.bins,)`.
    absmax
        The largest finite magnitude, which bounds the outermost bins.
    """
    half, finite = encoding.bins // 2, encoding.lower.size
    positive, negative = counts[:finite], counts[half : half + finite]
    up, down = np.flatnonzero(positive), np.flatnonzero(negative)[::-1]
    either = np.union1d(up, down)
    lower, upper = encoding.lower, np.minimum(encoding.upper, absmax)
    signed = np.concatenate([negative[down], positive[up]])
    both = positive[either].astype(np.int64) + negative[either]
    values = Bins(
        np.concatenate([-upper[down], lower[up]]),
        np.concatenate([-lower[down], upper[up]]),
        np.cumsum(signed, dtype=np.int64),
    )
    return Histogram(values, Bins(lower[either], upper[either], np.cumsum(both, dtype=np.int64)))


def magnitude_of(encoding: Encoding, tops: NDArray[np.unsignedinteger]) -> Floats:
    """Return the magnitudes that `vrscope.stats.kernels.top_magnitudes` found; NaN where nothing was finite."""
    patterns = np.maximum(tops, tops.dtype.type(1)) - tops.dtype.type(1)
    values = encoding.floats(patterns).astype(np.float64)
    values[tops == 0] = np.nan
    return values


def _order_statistic(bins: Bins, rank: int) -> float:
    """Return the value with `rank` values before it, counted from 0."""
    place = int(np.searchsorted(bins.ends, rank, side="right"))
    seen = int(bins.ends[place - 1]) if place else 0
    share = (rank - seen + 0.5) / (int(bins.ends[place]) - seen)
    return float(bins.lower[place] + (bins.upper[place] - bins.lower[place]) * share)
