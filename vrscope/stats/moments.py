"""Count, mean and central moments of finite values, and the figures that follow from them.

In: a row of running moments from `vrscope.stats.kernels`. Out: `Moments`, used by the table of statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESOLUTION = 1e-15  # of float64; scipy.stats uses the same bound to call values constant


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of finite values; every figure is NaN where there are no values.

    Attributes
    ----------
    count
        Number of finite values.
    absmax
        Largest magnitude; NaN without values.
    exponent
        The next four are in units of `2**exponent`.
    scaled_mean, m2, m3, m4
        Mean, and sums of the second to fourth power of the distance to it.
    """

    count: int
    absmax: float
    exponent: int
    scaled_mean: float
    m2: float
    m3: float
    m4: float

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return _times_power(self.scaled_mean, self.exponent) if self.count else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation, the root of `variance`."""
        return _times_power(math.sqrt(self.m2 / self.count), self.exponent) if self.count else math.nan

    @property
    def variance(self) -> float:
        """Mean squared distance to the mean (population, divided by the count)."""
        return _times_power(self.m2 / self.count, 2 * self.exponent) if self.count else math.nan

    @property
    def frobenius_norm(self) -> float:
        """Root of the sum of squares; 0 without values."""
        if not self.count:
            return 0.0
        return _times_power(math.sqrt(self.m2 + self.count * self.scaled_mean**2), self.exponent)

    @property
    def is_constant(self) -> bool:
        """Whether all values are equal as far as float64 can tell; also true without values."""
        return not self.count or self.m2 / self.count <= (_RESOLUTION * self.scaled_mean) ** 2

    @property
    def skewness(self) -> float:
        """Third standardized moment; NaN for constant values (as scipy.stats.skew)."""
        if self.is_constant:
            return math.nan
        variance = self.m2 / self.count
        return self.m3 / self.count / (variance * math.sqrt(variance))

    @property
    def kurtosis_excess(self) -> float:
        """Fourth standardized moment less 3, so 0 for a normal distribution; NaN for constant values."""
        if self.is_constant:
            return math.nan
        variance = self.m2 / self.count
        return self.m4 / self.count / (variance * variance) - 3.0


def moments_of(state: NDArray[np.float64]) -> Moments:
    """Return the moments that a row of running moments (shape `(10,)`) holds."""
    from vrscope.stats import kernels

    count = int(state[kernels.COUNT])
    mean, m2, m3, m4 = (float(state[i]) for i in (kernels.MEAN, kernels.M2, kernels.M3, kernels.M4))
    absmax = float(state[kernels.ABSMAX]) if count else math.nan
    return Moments(count, absmax, int(state[kernels.EXPONENT]), mean, m2, m3, m4)


def _times_power(value: float, exponent: int) -> float:
    """Return `value * 2**exponent`, infinity where float64 overflows."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)
