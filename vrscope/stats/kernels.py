"""The compiled loops of the statistics: each visits a cache-sized block of weights and knows nothing of tensors.

In: arrays of stored bits (unsigned integers of the weight's width) or of float values. Out: numbers added to arrays
of the caller, who also gives the memory: so they run without numba once a machine has compiled them. All release the
interpreter lock.

Running moments are rows of ten float64, indexed by the constants below. `mean`, `m2`, `m3` and `m4` (sums of powers of
the distance to the mean) are in units of `2**exponent`, so that no fourth power overflows or underflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import standalone

COUNT, MEAN, M2, M3, M4, EXPONENT, ABSMAX, ZEROS, NANS, INFS = range(10)
MOMENT_FIELDS = 10
EMPTY_EXPONENT = -1000  # exponents stay within +-1000, so that 2**exponent and its inverse are normal float64

Function = TypeVar("Function", bound=Callable[..., object])
Floats = NDArray[np.float64]


def _compiled(function: Function) -> Function:
    """Return `function` compiled; sums may be reordered to use vector units, NaN and infinity keep their meaning."""
    return standalone(function, fastmath={"reassoc", "contract", "nsz"})


@_compiled
def count_patterns(bits: NDArray[np.unsignedinteger], shift: np.uint64, counts: NDArray[np.uint32]) -> None:
    """Count into `counts[pattern >> shift]` every pattern of `bits` (shape `(n,)`)."""
    for i in range(bits.size):
        counts[bits[i] >> shift] += np.uint32(1)


@_compiled
def add_counts(total: NDArray[np.int64], part: NDArray[np.uint32]) -> None:
    """Add `part` to `total`, same shape `(n,)`."""
    for i in range(total.size):
        total[i] += np.int64(part[i])


@_compiled
def _used_bins(counts: NDArray[np.int64], places: NDArray[np.int64]) -> int:
    used = 0
    for i in range(counts.size):
        if counts[i] != 0:
            places[used] = i
            used += 1
    return used


def used_bins(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places where `counts` (shape `(n,)`) is not 0, ascending."""
    places = np.empty(counts.size, np.int64)
    return places[: _used_bins(counts, places)]


@_compiled
def top_magnitudes(
    bits: NDArray[np.unsignedinteger],
    limit: np.unsignedinteger,
    rows_per_matrix: int,
    row_top: NDArray[np.unsignedinteger],
    column_top: NDArray[np.unsignedinteger],
) -> None:
    """Raise the largest magnitudes of rows and columns, as patterns without sign plus one; 0 means none was finite.

    Parameters
    ----------
    bits
        Shape `(rows, columns)`.
    limit
        Largest finite magnitude; patterns above it are infinity or NaN and are left out.
    rows_per_matrix
        Row r belongs to matrix `r // rows_per_matrix`.
    row_top
        Shape `(rows,)`, overwritten.
    column_top
        Shape `(matrices, columns)`, raised.
    """
    kind = bits.dtype.type
    mask = kind((np.uint64(1) << np.uint64(8 * bits.itemsize - 1)) - np.uint64(1))
    zero, one = kind(0), kind(1)
    for r in range(bits.shape[0]):
        row = bits[r]
        column = column_top[r // rows_per_matrix]
        top = zero
        for j in range(row.size):
            magnitude = kind(row[j] & mask)
            value = kind(magnitude + one) if magnitude <= limit else zero
            top = max(top, value)
            column[j] = max(column[j], value)
        row_top[r] = top


@_compiled
def _normal_power(exponent: int) -> float:
    """Return 2 to a whole exponent between -1022 and 1023, put together from its bits."""
    return np.uint64((np.int64(exponent) + np.int64(1023)) << np.int64(52)).view(np.float64)


@_compiled
def _power_of_two(exponent: float) -> float:
    """Return 2 to a whole exponent between -2,000 and 1,000; it may be subnormal or 0."""
    whole = int(exponent)
    half = whole // 2
    return _normal_power(half) * _normal_power(whole - half)


@_compiled
def _merge(state: Floats, other: Floats) -> None:
    """Merge running moments `other` into `state` (Chan et al. 1983; third and fourth powers: Pébay, SAND2008-6212)."""
    state[ABSMAX] = max(state[ABSMAX], other[ABSMAX])
    for field in (ZEROS, NANS, INFS):
        state[field] += other[field]
    if other[COUNT] == 0:
        return
    if state[COUNT] == 0:
        for field in (COUNT, MEAN, M2, M3, M4, EXPONENT):
            state[field] = other[field]
        return
    exponent = max(state[EXPONENT], other[EXPONENT])
    f, g = _power_of_two(state[EXPONENT] - exponent), _power_of_two(other[EXPONENT] - exponent)
    na, nb = state[COUNT], other[COUNT]
    n = na + nb
    mean, a2, a3, a4 = state[MEAN] * f, state[M2] * f * f, state[M3] * f * f * f, state[M4] * f * f * f * f
    b2, b3, b4 = other[M2] * g * g, other[M3] * g * g * g, other[M4] * g * g * g * g
    d = other[MEAN] * g - mean
    u, v = na / n, nb / n
    state[COUNT], state[EXPONENT] = n, exponent
    state[MEAN] = mean + d * v
    state[M2] = a2 + b2 + d * d * na * v
    state[M3] = a3 + b3 + d * d * d * na * v * (u - v) + 3 * d * (u * b2 - v * a2)
    state[M4] = (
        a4
        + b4
        + d * d * d * d * na * v * (u * u - u * v + v * v)
        + 6 * d * d * (u * u * b2 + v * v * a2)
        + 4 * d * (u * b3 - v * a3)
    )


@_compiled
def fold(state: Floats, parts: Floats) -> None:
    """Merge the rows of `parts` (shape `(n, 10)`) one after the other into `state` (shape `(10,)`)."""
    for i in range(parts.shape[0]):
        _merge(state, parts[i])


@_compiled
def merge_each(states: Floats, parts: Floats) -> None:
    """Merge row i of `parts` into row i of `states`; both have shape `(n, 10)`."""
    for i in range(parts.shape[0]):
        _merge(states[i], parts[i])


@_compiled
def _value_of(pattern: np.unsignedinteger, width: int) -> float:
    """Return the value of a float32 or float64 pattern."""
    if width == 32:
        return np.float64(np.uint32(pattern).view(np.float32))
    return np.uint64(pattern).view(np.float64)


@_compiled
def _scale_of(absmax: float) -> tuple[int, float]:
    """Return the exponent of the power of two above a magnitude, and the inverse of that power."""
    field = int(np.float64(absmax).view(np.uint64) >> np.uint64(52))  # 0 of numbers far below the smallest unit
    exponent = min(max(field - 1022, EMPTY_EXPONENT), -EMPTY_EXPONENT)
    return exponent, _normal_power(-exponent)


@_compiled
def _moments(x: NDArray[np.floating], absmax: float, out: Floats) -> None:
    """Write count, moments and exponent of finite `x`, in two passes: the mean, then powers of the distance to it."""
    exponent, scale = _scale_of(absmax)
    origin = np.float64(x[0]) * scale  # a sum of distances to one of the values is exactly 0 for equal values
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * scale - origin
    mean = origin + total / x.size
    m2, m3, m4 = 0.0, 0.0, 0.0
    for i in range(x.size):
        z = np.float64(x[i]) * scale - mean
        square = z * z
        m2 += square
        m3 += square * z
        m4 += square * square
    out[COUNT], out[MEAN], out[M2], out[M3], out[M4], out[EXPONENT] = x.size, mean, m2, m3, m4, exponent


@_compiled
def _finite_moments(x: NDArray[np.floating], first: int, count: int, absmax: float, out: Floats) -> None:
    """Do what `_moments` does with the finite values of `x`: `count` of them, the first at `first`."""
    exponent, scale = _scale_of(absmax)
    origin = np.float64(x[first]) * scale
    total = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += value * scale - origin if abs(value) <= absmax else 0.0
    mean = origin + total / count
    m2, m3, m4 = 0.0, 0.0, 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        z = value * scale - mean if abs(value) <= absmax else 0.0
        square = z * z
        m2 += square
        m3 += square * z
        m4 += square * square
    out[COUNT], out[MEAN], out[M2], out[M3], out[M4], out[EXPONENT] = count, mean, m2, m3, m4, exponent


@_compiled
def chunk_moments(
    values: NDArray[np.floating],
    bits: NDArray[np.unsignedinteger],
    chunk: int,
    limit: np.unsignedinteger,
    out: Floats,
) -> None:
    """Write the moments of each stretch of `chunk` values; the last may be shorter.

    Parameters
    ----------
    values, bits
        The same float32 or float64 memory, shape `(n,)`, as floats and as unsigned integers.
    chunk
        Length of a stretch; a whole row gives the moments of rows.
    limit
        Pattern of the largest finite magnitude; the one above is infinity, the others are NaN.
    out
        Zeros of shape `(ceil(n / chunk), 10)`.
    """
    kind = bits.dtype.type
    mask = kind((np.uint64(1) << np.uint64(8 * bits.itemsize - 1)) - np.uint64(1))
    zero, one = kind(0), kind(1)
    for k in range(out.shape[0]):
        x, b, row = values[k * chunk : (k + 1) * chunk], bits[k * chunk : (k + 1) * chunk], out[k]
        top, zeros = zero, zero
        for i in range(b.size):
            magnitude = kind(b[i] & mask)
            top = max(top, magnitude)
            zeros += one if magnitude == zero else zero
        row[ZEROS] = zeros
        if top <= limit:
            if x.size > 0:
                row[ABSMAX] = _value_of(top, 8 * bits.itemsize)
                _moments(x, row[ABSMAX], row)
            continue
        first, count, top = -1, 0, zero
        for i in range(b.size):
            magnitude = kind(b[i] & mask)
            if magnitude <= limit:
                first = i if count == 0 else first
                top = max(top, magnitude)
                count += 1
            elif magnitude == limit + one:
                row[INFS] += 1
            else:
                row[NANS] += 1
        if count > 0:
            row[ABSMAX] = _value_of(top, 8 * bits.itemsize)
            _finite_moments(x, first, count, row[ABSMAX], row)


@_compiled
def pattern_moments(magnitudes: Floats, positive: NDArray[np.int64], negative: NDArray[np.int64], out: Floats) -> None:
    """Write the moments of a tensor of which it is known how often each value occurs.

    Parameters
    ----------
    magnitudes
        Shape `(n,)`, ascending from 0.
    positive, negative
        How often `+magnitudes[i]` and `-magnitudes[i]` occur, shape `(n,)`.
    out
        Zeros of shape `(10,)`; the fields for NaN and infinity stay as they are.
    """
    count, total, last = 0, 0.0, 0
    for i in range(magnitudes.size):
        seen = positive[i] + negative[i]
        if seen > 0:
            count += seen
            total += (positive[i] - negative[i]) * magnitudes[i]  # the two signs cancel exactly
            last = i
    if count == 0:
        return
    mean = total / count
    m2, m3, m4 = 0.0, 0.0, 0.0
    for i in range(last + 1):
        if positive[i] + negative[i] > 0:
            p, q = magnitudes[i] - mean, -magnitudes[i] - mean
            m2 += positive[i] * (p * p) + negative[i] * (q * q)
            m3 += positive[i] * (p * p * p) + negative[i] * (q * q * q)
            m4 += positive[i] * (p * p) * (p * p) + negative[i] * (q * q) * (q * q)
    out[COUNT], out[MEAN], out[M2], out[M3], out[M4] = count, mean, m2, m3, m4
    out[ABSMAX], out[ZEROS] = magnitudes[last], positive[0] + negative[0]


@_compiled
def count_beyond(values: NDArray[np.floating], mean: float, distance: float) -> int:
    """Return how many finite `values` (shape `(n,)`) lie more than `distance` away from `mean`."""
    beyond = 0
    for i in range(values.size):
        away = abs(np.float64(values[i]) - mean)
        beyond += 1 if distance < away < np.inf else 0
    return beyond
