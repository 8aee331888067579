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

    def below(self, bounds: Floats) -> Floats:
        """Return how many values lie below each of `bounds`; a bin that a bound tears counts by the share of its width.

        Same shape as `bounds`.
        """
        place = self.lower.searchsorted(bounds)
        last = np.maximum(place - 1, 0)
        reach = np.where(place > 0, self.upper[last] - bounds, 0.0)
        width = self.upper[last] - self.lower[last]
        before = np.where(last > 0, self.ends[last - 1], 0)
        torn = (self.ends[last] - before) * np.clip(reach / np.where(width > 0, width, 1.0), 0.0, 1.0)
        return np.where(place > 0, self.ends[last], 0) - torn


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

    def count_beyond(self, mean: float, distance: float) -> int | None:
        """Return how many values lie more than `distance` away from `mean`.

        None if values of F32 or F64 share a bin with one of the two thresholds, so that the histogram cannot tell.
        """
        low, high, bins = mean - distance, mean + distance, self.values
        below, within = int(bins.lower.searchsorted(low)), int(bins.lower.searchsorted(high, side="right"))
        if (below and bins.upper[below - 1] > low) or (within and bins.upper[within - 1] > high):
            return None
        return (int(bins.ends[below - 1]) if below else 0) + self.count - (int(bins.ends[within - 1]) if within else 0)

    def over(self, edges: Floats) -> tuple[Counts, int, int]:
        """Return the counts between `edges` (ascending, shape `(n + 1,)`), and how many values lie below and above.

        A value on an edge belongs to the bin that starts there, as in `numpy.histogram`, but for the last edge, where
        it counts as above.
        """
        if not self.count:
            return np.zeros(edges.size - 1, np.int64), 0, 0
        below = np.rint(self.values.below(edges)).astype(np.int64)
        return np.diff(below), int(below[0]), self.count - int(below[-1])


def histogram_of(encoding: Encoding, counts: Counts, absmax: float) -> Histogram:
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
    from vrscope.stats import kernels

    half, finite = encoding.bins // 2, int(encoding.lower.searchsorted(absmax, side="right"))  # no bin above is in use
    positive, negative = counts[:finite], counts[half : half + finite]
    both = positive + negative
    up, down, either = kernels.used_bins(positive), kernels.used_bins(negative)[::-1], kernels.used_bins(both)

    def upper(places: NDArray[np.int64]) -> Floats:
        return np.minimum(encoding.upper[places], absmax)

    values = Bins(
        np.concatenate([-upper(down), encoding.lower[up]]),
        np.concatenate([-encoding.lower[down], upper(up)]),
        np.cumsum(np.concatenate([negative[down], positive[up]])),
    )
    return Histogram(values, Bins(encoding.lower[either], upper(either), np.cumsum(both[either])))


def magnitude_of(encoding: Encoding, tops: NDArray[np.unsignedinteger]) -> Floats:
    """Return the magnitudes that `vrscope.stats.kernels.top_magnitudes` found; NaN where nothing was finite."""
    patterns = np.maximum(tops, tops.dtype.type(1)) - tops.dtype.type(1)
    values = encoding.floats(patterns).astype(np.float64)
    values[tops == 0] = np.nan
    return values


def _order_statistic(bins: Bins, rank: int) -> float:
    """Return the value with `rank` values before it, counted from 0."""
    place = int(bins.ends.searchsorted(rank, side="right"))
    seen = int(bins.ends[place - 1]) if place else 0
    share = (rank - seen + 0.5) / (int(bins.ends[place]) - seen)
    return float(bins.lower[place] + (bins.upper[place] - bins.lower[place]) * share)
