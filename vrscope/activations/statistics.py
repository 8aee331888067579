"""The table of activation statistics: every number vrscope reports about a stream of activations, one entry each.

To add one, add an entry here; tables, report and documentation follow. An entry's function sees the
`ChannelStatistics` of one stream and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np

from vrscope.activations.channels import LARGE_SHARE, ChannelStatistics, Floats
from vrscope.tables import Column


@dataclass(frozen=True, slots=True)
class ActivationStatistic:
    """One statistic of a stream of activations.

    Attributes
    ----------
    name
        Column name.
    unit
        "" for a pure number.
    meaning
        One sentence.
    value
        Computes it; NaN where it is not defined.
    """

    name: str
    unit: str
    meaning: str
    value: Callable[[ChannelStatistics], SupportsFloat]

    @property
    def column(self) -> Column:
        """Its description as a column of results."""
        return Column(self.name, self.unit, self.meaning)


def outlier_channels(statistics: ChannelStatistics) -> list[int]:
    """Return the channels that reach a magnitude of 6 at 6 % of the positions or more."""
    return [int(channel) for channel in np.flatnonzero(statistics.large_share >= LARGE_SHARE)]


def spread(values: Floats) -> float:
    """Return maximum over median, NaN without values or where the median is 0."""
    known = values[np.isfinite(values)]
    median = float(np.median(known)) if known.size else 0.0
    return float(known.max()) / median if median > 0 else math.nan


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


def _largest(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size else math.nan


ACTIVATION_STATISTICS: tuple[ActivationStatistic, ...] = (
    ActivationStatistic("absmax", "", "Largest magnitude of an activation.", lambda s: s.pooled.absmax),
    ActivationStatistic("mean_abs", "", "Mean magnitude over all channels and tokens.", lambda s: _mean(s.mean_abs)),
    ActivationStatistic(
        "std", "", "Population standard deviation over all channels and tokens.", lambda s: s.pooled.std
    ),
    ActivationStatistic(
        "kurtosis_excess",
        "",
        "Fourth standardized moment over all channels and tokens less 3: 0 for a normal distribution, large with "
        "outliers.",
        lambda s: s.pooled.kurtosis_excess,
    ),
    ActivationStatistic(
        "channel_spread",
        "ratio",
        "Largest over median of the channels' largest magnitudes: what makes one scale for all channels waste levels, "
        "and what SmoothQuant moves into the weights.",
        lambda s: spread(s.channels.absmax),
    ),
    ActivationStatistic(
        "mean_abs_spread",
        "ratio",
        "Largest over median of the channels' mean magnitudes: how unevenly channels use the weight, which AWQ uses.",
        lambda s: spread(s.mean_abs),
    ),
    ActivationStatistic(
        "channel_kurtosis_max",
        "",
        "Largest excess kurtosis of a single channel over tokens: high if a few tokens are extreme in it.",
        lambda s: _largest(s.channels.kurtosis_excess),
    ),
    ActivationStatistic(
        "large_share",
        "share",
        "Share of activations of magnitude 6 or more, the threshold of LLM.int8.",
        lambda s: _mean(s.large_share),
    ),
    ActivationStatistic(
        "outlier_channels",
        "channels",
        "Number of channels that reach a magnitude of 6 at 6 % of the positions or more.",
        lambda s: len(outlier_channels(s)) if s.tokens else math.nan,
    ),
)
