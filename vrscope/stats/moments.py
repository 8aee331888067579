"""Mean, spread and shape of finite values, from running moments.

In: running moments of `vrscope.stats.kernels`, of one tensor or of many channels at once. Out: `Moments`, whose
figures are computed element by element; used by the table of statistics and by the tables of parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESOLUTION = 1e-15  # of float64; scipy.stats uses the same bound to call values constant

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of the finite values of one or more sets of weights; every array has the shape of the sets.

    Without values, `count` and `frobenius_norm` are 0 and all other figures NaN.

    Attributes
    ----------
    count
        Number of finite values, whole numbers in float64.
    absmax
        Largest magnitude.
    mean
        Arithmetic mean.
    std, variance
        Population standard deviation (divided by the count) and its square.
    skewness
        Third standardized moment; NaN for constant values (as scipy.stats.skew).
    kurtosis_excess
        Fourth standardized moment less 3, so 0 for a normal distribution; NaN for constant values.
    frobenius_norm
        Root of the sum of squares.
    is_constant
        Whether all values are equal as far as float64 can tell; also true without values.
    """

    count: Floats
    absmax: Floats
    mean: Floats
    std: Floats
    variance: Floats
    skewness: Floats
    kurtosis_excess: Floats
    frobenius_norm: Floats
    is_constant: NDArray[np.bool_]


def moments_of(states: Floats) -> Moments:
    """Return the moments that running moments hold; `states` has shape `(..., 10)`, the figures `(...)`.

    Figures that float64 cannot hold overflow to infinity or underflow to 0, as those of F64 tensors may.
    """
    from vrscope.stats import kernels

    count, scaled_mean, m2 = states[..., kernels.COUNT], states[..., kernels.MEAN], states[..., kernels.M2]
    exponent = states[..., kernels.EXPONENT].astype(np.int32)
    with np.errstate(all="ignore"):
        blank = np.where(count > 0, 0.0, np.nan)
        scaled_variance = m2 / count
        scaled_std = np.sqrt(scaled_variance)
        is_constant = ~(scaled_variance > (_RESOLUTION * scaled_mean) ** 2)
        spread = np.where(is_constant, np.nan, scaled_std)
        return Moments(
            count,
            states[..., kernels.ABSMAX] + blank,
            np.ldexp(scaled_mean, exponent) + blank,
            np.ldexp(scaled_std, exponent),
            np.ldexp(scaled_variance, 2 * exponent),
            states[..., kernels.M3] / count / spread**3,
            states[..., kernels.M4] / count / spread**4 - 3.0,
            np.ldexp(np.sqrt(m2 + count * scaled_mean**2), exponent),
            is_constant,
        )
