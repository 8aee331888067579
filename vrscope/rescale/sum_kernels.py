"""The compiled loops of planning: sums over rows and columns of stored weights. Importing this module imports numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import Function, compiled

_TILE = 1024  # columns


def summing(function: Function) -> Function:
    """Return `function` compiled so that sums of finite values may be reordered to use vector units."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz", "nnan"})


@compiled
def _widen(bits: NDArray[np.unsignedinteger], wide: NDArray[np.uint32]) -> None:
    """Write bfloat16 patterns as those of float32, whose upper half they are."""
    for j in range(bits.size):
        wide[j] = np.uint32(bits[j]) << np.uint32(16)


@compiled
def _raise_tops(bits: NDArray[np.unsignedinteger], tops: NDArray[np.unsignedinteger]) -> tuple[Any, Any]:
    """Raise the largest patterns of columns to those of one row, without their sign.

    Returns the largest of the row, and one less than the smallest: of 0, that is the largest number of the type.
    """
    kind = bits.dtype.type
    one = kind(1)
    mask = kind((np.uint64(1) << np.uint64(8 * bits.itemsize - 1)) - np.uint64(1))
    top, low = kind(0), kind(kind(0) - one)
    for j in range(bits.size):
        magnitude = kind(bits[j] & mask)
        tops[j] = max(tops[j], magnitude)
        top = max(top, magnitude)
        low = min(low, kind(magnitude - one))
    return top, low


# Two loops are several times as fast as one that does both: each is then compiled to vector units.
@summing
def _add_row(values: NDArray[np.floating], sums: NDArray[np.float64]) -> None:
    """Add one row of values to its sums, shape `(3,)`."""
    total = absolute = square = 0.0
    for j in range(values.size):
        value = np.float64(values[j])
        total += value
        absolute += abs(value)
        square += value * value
    sums[0] += total
    sums[1] += absolute
    sums[2] += square


@summing
def _add_columns(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    c: NDArray[np.floating],
    d: NDArray[np.floating],
    total: NDArray[np.float64],
    absolute: NDArray[np.float64],
    square: NDArray[np.float64],
) -> None:
    """Add four rows of values to the sums of their columns; together, because each sum is then stored once."""
    for j in range(total.size):
        w, x, y, z = np.float64(a[j]), np.float64(b[j]), np.float64(c[j]), np.float64(d[j])
        total[j] += (w + x) + (y + z)
        absolute[j] += (abs(w) + abs(x)) + (abs(y) + abs(z))
        square[j] += (w * w + x * x) + (y * y + z * z)


@compiled
def add_sums(
    bits: NDArray[np.unsignedinteger],
    values: NDArray[np.floating] | None,
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    row_tops: NDArray[np.unsignedinteger],
    column_tops: NDArray[np.unsignedinteger],
) -> Any:
    """Add the sums of a block to those of its rows and columns; return its smallest pattern but 0 without sign, less 1.

    Parameters
    ----------
    bits
        Stored bits, shape `(n, m)`.
    values
        What they mean, same shape; None: they are bfloat16. Where they are not finite, only the patterns are of use.
    rows, columns
        Shapes `(n, 3)` and `(3, m)`: sum of w, of the magnitude of w, of w squared.
    row_tops, column_tops
        Shapes `(n,)` and `(m,)`, raised to the largest patterns without their sign.
    """
    kind = bits.dtype.type
    least = kind(kind(0) - kind(1))
    patterns = np.zeros((4, _TILE), np.uint32)
    wide = patterns.view(np.float32)
    # Slices of single rows are known to be contiguous, which those of matrices are not: that makes the loops fast.
    for first in range(0, bits.shape[1], _TILE):  # so narrow that sums and values stay in the nearest cache
        last = min(first + _TILE, bits.shape[1])
        total, absolute, square = columns[0][first:last], columns[1][first:last], columns[2][first:last]
        for i in range(0, bits.shape[0], 4):
            count = min(4, bits.shape[0] - i)
            for k in range(count):
                line = bits[i + k][first:last]
                top, low = _raise_tops(line, column_tops[first:last])
                row_tops[i + k] = max(row_tops[i + k], top)
                least = min(least, low)
                if values is None:
                    _widen(line, patterns[k])
                    _add_row(wide[k][: last - first], rows[i + k])
                else:
                    _add_row(values[i + k][first:last], rows[i + k])
            if values is None:
                patterns[count:] = 0
                _add_columns(wide[0], wide[1], wide[2], wide[3], total, absolute, square)
            else:
                idle = np.zeros(last - first if count < 4 else 0, values.dtype)
                a = values[i][first:last]
                b = values[i + 1][first:last] if count > 1 else idle
                c = values[i + 2][first:last] if count > 2 else idle
                d = values[i + 3][first:last] if count > 3 else idle
                _add_columns(a, b, c, d, total, absolute, square)
    return least
