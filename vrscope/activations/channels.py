"""Statistics of a stream of vectors, channel by channel: nothing is kept of a token once it was added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.stats.moments import Moments, moments_of

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
LARGE = 6.0  # the threshold of LLM.int8, Dettmers et al. 2022, section 3.2
LARGE_SHARE = 0.06  # of positions, for a dimension to count as outlier; section 4.1
_LARGEST_FLOAT32 = np.uint32(0x7F7FFFFF)  # bits of the largest finite magnitude


@dataclass(frozen=True, slots=True)
class ChannelPart:
    """What one call adds: running moments `(channels, 10)`, sums of magnitudes and counts of large ones per channel."""

    tokens: int
    states: Floats
    magnitude: Floats
    large: NDArray[np.int64]

    @property
    def bad_count(self) -> int:
        """Number of values that are NaN or infinite."""
        from vrscope.stats import kernels

        return int(self.states[:, [kernels.NANS, kernels.INFS]].sum())


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Statistics over all tokens, of each channel and of all values together.

    Attributes
    ----------
    tokens
        How many vectors were added.
    channels
        Moments of each channel, arrays of shape `(channels,)`.
    pooled
        Moments of all values, arrays of shape `()`.
    mean_abs
        Mean magnitude of each channel, NaN without tokens.
    large_share
        Share of tokens whose magnitude in a channel is at least 6, NaN without tokens.
    """

    tokens: int
    channels: Moments
    pooled: Moments
    mean_abs: Floats
    large_share: Floats


class ChannelSums:
    """Accumulates the statistics of a stream of vectors with a fixed number of channels, in float64."""

    def __init__(self, channels: int) -> None:
        from vrscope.stats import kernels

        self.tokens = 0
        self.states = np.zeros((channels, kernels.MOMENT_FIELDS))
        self.magnitude = np.zeros(channels)
        self.large = np.zeros(channels, np.int64)

    def add(self, part: ChannelPart | ChannelSums) -> None:
        """Add what one call held, or another accumulator."""
        from vrscope.stats import kernels

        kernels.merge_each(self.states, part.states)
        self.tokens += part.tokens
        self.magnitude += part.magnitude
        self.large += part.large

    def statistics(self) -> ChannelStatistics:
        """Return the statistics of everything added so far."""
        from vrscope.stats import kernels

        pooled = np.zeros(kernels.MOMENT_FIELDS)
        kernels.fold(pooled, self.states)
        count = self.tokens or np.nan
        return ChannelStatistics(
            self.tokens, moments_of(self.states), moments_of(pooled), self.magnitude / count, self.large / count
        )


def channel_part(vectors: Tensor) -> ChannelPart:
    """Return what vectors of shape `(tokens, channels)` add; NaN and infinity are counted and left out of moments."""
    from vrscope.stats import kernels

    values = vectors.detach().float().T.contiguous().cpu().numpy()
    channels, tokens = values.shape
    states = np.zeros((channels, kernels.MOMENT_FIELDS))
    flat = values.reshape(-1)
    if flat.size:
        kernels.chunk_moments(flat, flat.view(np.uint32), tokens, _LARGEST_FLOAT32, states)
    magnitudes = np.abs(values)
    return ChannelPart(
        tokens, states, magnitudes.sum(axis=1, dtype=np.float64), np.count_nonzero(magnitudes >= LARGE, axis=1)
    )
