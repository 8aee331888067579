"""The compiled loops of planning and rewriting.

The rewrite multiplies stored floats by powers of two by adding to their exponent bits. Nothing is rounded because
nothing is multiplied: sign and mantissa are copied. An element whose exponent would leave the normal range, and that
is not zero, is counted instead, and the caller decides. Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import compiled


def _summing(function: Any) -> Any:
    """Return `function` compiled so that sums of finite values may be reordered to use vector units."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz", "nnan"})


@compiled
def shift_exponents(
    bits: NDArray[np.unsignedinteger],
    rows: NDArray[np.signedinteger],
    columns: NDArray[np.signedinteger],
    mantissa_bits: int,
    magnitude_mask: int,
    largest_exponent: int,
) -> Any:
    """Add `rows[i] + columns[j]` to the exponent of every element of `bits` in place; return how many it could not.

    Parameters
    ----------
    bits
        Stored bits, shape `(rows, columns)`; changed in place.
    rows, columns
        Exponents, shapes `(rows,)` and `(columns,)`; int64 for types of 64 bits, else int32 or int64.
    mantissa_bits
        Mantissa bits of the type.
    magnitude_mask
        All bits but the sign.
    largest_exponent
        Largest exponent field of its normal numbers.
    """
    kind, lane = bits.dtype.type, columns.dtype.type
    mantissa, magnitude, largest = lane(mantissa_bits), lane(magnitude_mask), lane(largest_exponent)
    failed: Any = 0
    for i in range(bits.shape[0]):
        values = bits[i]
        row = lane(rows[i])
        lost = lane(0)
        for j in range(values.size):
            move = lane(row + columns[j])
            absolute = lane(lane(values[j]) & magnitude)
            field = lane(absolute >> mantissa)
            target = lane(field + move)
            touched = (move != 0) & (absolute != 0)
            bad = touched & ((field == 0) | (target < 1) | (target > largest))
            lost = lane(lost + lane(bad))
            step = lane(move << mantissa) if touched & ~bad else lane(0)
            values[j] = kind(lane(values[j]) + step)
        failed += lost
    return failed


@compiled
def largest_pattern(bits: NDArray[np.unsignedinteger]) -> Any:
    """Return the largest of stored bits (shape `(n,)`) without their sign, 0 if there are none.

    Above the pattern of the largest finite magnitude are infinity and NaN.
    """
    kind = bits.dtype.type
    mask = kind((np.uint64(1) << np.uint64(8 * bits.itemsize - 1)) - np.uint64(1))
    top = kind(0)
    for i in range(bits.size):
        top = kind(max(top, kind(bits[i] & mask)))
    return top


@_summing
def _add_columns(values: NDArray[np.floating], columns: NDArray[np.float64]) -> None:
    """Add up to four rows of values to the sums of their columns; together, because each sum is then stored once."""
    total, absolute, square, largest = columns[0], columns[1], columns[2], columns[3]
    last = values.shape[0] - 1
    a, b, c, d = values[0], values[min(1, last)], values[min(2, last)], values[min(3, last)]
    use_b, use_c, use_d = np.float64(last >= 1), np.float64(last >= 2), np.float64(last >= 3)
    for j in range(total.size):
        w, x = np.float64(a[j]), np.float64(b[j]) * use_b
        y, z = np.float64(c[j]) * use_c, np.float64(d[j]) * use_d
        total[j] += (w + x) + (y + z)
        absolute[j] += (abs(w) + abs(x)) + (abs(y) + abs(z))
        square[j] += (w * w + x * x) + (y * y + z * z)
        largest[j] = max(max(max(abs(w), abs(x)), max(abs(y), abs(z))), largest[j])


@_summing
def add_sums(values: NDArray[np.floating], rows: NDArray[np.float64], columns: NDArray[np.float64]) -> float:
    """Add the sums of a block to those of its rows and columns, and return its smallest magnitude that is not zero.

    Parameters
    ----------
    values
        Finite values, shape `(n, m)`.
    rows, columns
        Shapes `(4, n)` and `(4, m)`: sum of w, of the magnitude of w, of w squared, and the largest magnitude.
    """
    smallest = np.inf
    for i in range(values.shape[0]):
        line = values[i]
        total = absolute = square = largest = 0.0
        for j in range(line.size):
            value = np.float64(line[j])
            magnitude = abs(value)
            total += value
            absolute += magnitude
            square += value * value
            largest = max(largest, magnitude)
            smallest = min(smallest, magnitude if magnitude > 0.0 else np.inf)
        rows[0, i] += total
        rows[1, i] += absolute
        rows[2, i] += square
        rows[3, i] = max(rows[3, i], largest)
    for i in range(0, values.shape[0], 4):
        _add_columns(values[i : i + 4], columns)
    return smallest
