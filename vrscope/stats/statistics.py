"""The table of statistics: every number vrscope reports about a weight tensor, one entry each.

To add a statistic, add an entry here; tables, report and documentation follow. An entry's function sees the `Summary`
of one tensor and nothing else. NaN and infinite weights are counted and left out of all other statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from numpy.typing import NDArray

from vrscope.stats.summary import Summary
from vrscope.tables import Column


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic of a tensor.

    Attributes
    ----------
    name
        Column name; a unit, if there is one, is its last word.
    unit
        "" for a pure number.
    meaning
        One sentence.
    value
        Computes it; NaN where it is not defined.
    whole
        Whether values are whole numbers.
    """

    name: str
    unit: str
    meaning: str
    value: Callable[[Summary], SupportsFloat]
    whole: bool = False

    @property
    def column(self) -> Column:
        """Its description as a column of results."""
        return Column(self.name, self.unit, self.meaning)


def _share(part: int, summary: Summary) -> float:
    """Return `part` over the number of finite values."""
    return part / summary.count if summary.count else math.nan


def _spread(absmax: NDArray[np.float64] | None) -> float:
    """Return maximum over median of channel maxima; NaN without channels or where the median is 0."""
    if absmax is None:
        return math.nan
    ordered = np.sort(absmax[~np.isnan(absmax)])
    median = float(ordered[(ordered.size - 1) // 2] + ordered[ordered.size // 2]) / 2 if ordered.size else 0.0
    return float(ordered[-1]) / median if median > 0 else math.nan


def _stable_rank(summary: Summary) -> float:
    """Return squared Frobenius norm over squared top singular value; NaN for a zero matrix."""
    top = summary.top_singular_value
    return float(summary.moments.frobenius_norm / top) ** 2 if top > 0 else math.nan


STATISTICS: tuple[Statistic, ...] = (
    Statistic("mean", "", "Arithmetic mean of the weights.", lambda s: s.moments.mean),
    Statistic("std", "", "Population standard deviation of the weights.", lambda s: s.moments.std),
    Statistic("variance", "", "Square of the standard deviation.", lambda s: s.moments.variance),
    Statistic(
        "skewness",
        "",
        "Third standardized moment, 0 for a symmetric distribution; not defined for constant weights.",
        lambda s: s.moments.skewness,
    ),
    Statistic(
        "kurtosis_excess",
        "",
        "Fourth standardized moment less 3, 0 for a normal distribution and large with outliers; "
        "not defined for constant weights.",
        lambda s: s.moments.kurtosis_excess,
    ),
    Statistic("absmax", "", "Largest magnitude of a weight.", lambda s: s.moments.absmax),
    Statistic("abs_q50", "", "Median of the magnitudes.", lambda s: s.histogram.abs_quantile(0.5)),
    Statistic("abs_q99", "", "0.99 quantile of the magnitudes.", lambda s: s.histogram.abs_quantile(0.99)),
    Statistic("abs_q999", "", "0.999 quantile of the magnitudes.", lambda s: s.histogram.abs_quantile(0.999)),
    Statistic("abs_q9999", "", "0.9999 quantile of the magnitudes.", lambda s: s.histogram.abs_quantile(0.9999)),
    Statistic(
        "outlier_share_4sigma",
        "share",
        "Share of weights more than 4 standard deviations away from the mean (normal: 0.000063).",
        lambda s: s.share_beyond(4.0),
    ),
    Statistic(
        "outlier_share_6sigma",
        "share",
        "Share of weights more than 6 standard deviations away from the mean (normal: 0.000000002).",
        lambda s: s.share_beyond(6.0),
    ),
    Statistic("zero_share", "share", "Share of weights that are exactly 0.", lambda s: _share(s.zero_count, s)),
    Statistic("nan_count", "elements", "Number of weights that are NaN.", lambda s: s.nan_count, whole=True),
    Statistic("inf_count", "elements", "Number of infinite weights.", lambda s: s.inf_count, whole=True),
    Statistic(
        "row_absmax_spread",
        "ratio",
        "Largest over median of the largest magnitudes of the output channels; not defined for vectors.",
        lambda s: _spread(s.row_absmax),
    ),
    Statistic(
        "column_absmax_spread",
        "ratio",
        "Largest over median of the largest magnitudes of the input channels; not defined for vectors.",
        lambda s: _spread(s.column_absmax),
    ),
    Statistic("frobenius_norm", "", "Root of the sum of squared weights.", lambda s: s.moments.frobenius_norm),
    Statistic(
        "tvr_ratio",
        "ratio",
        "Standard deviation over the target of target variance rescaling (0.01 unless set); its rule acts above 1.2.",
        lambda s: s.moments.std / s.target_std,
    ),
)

# Opt-in, as they cost many passes over a tensor.
SPECTRAL_STATISTICS: tuple[Statistic, ...] = (
    Statistic(
        "top_singular_value",
        "",
        "Largest singular value; of stacked experts the largest of all; not defined for vectors.",
        lambda s: s.top_singular_value,
    ),
    Statistic(
        "stable_rank",
        "",
        "Squared Frobenius norm over squared top singular value: how many directions carry the weight.",
        _stable_rank,
    ),
)
