"""The compiled loops of planning and rewriting.

The rewrite multiplies stored floats by powers of two by adding to their exponent bits. Nothing is rounded because
nothing is multiplied: sign and mantissa are copied. An element whose exponent would leave the normal range, and that
is not zero, is counted instead, and the caller decides. Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


def _compiled(function: Any) -> Any:
    """Return `function` compiled, cached on disk where a folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compiled
def shift_exponents(
    bits: NDArray[np.unsignedinteger],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    mantissa_bits: int,
    magnitude_mask: int,
    largest_exponent: int,
) -> int:
    """Add `rows[i] + columns[j]` to the exponent of every element of `bits` in place; return how many it could not.

    Parameters
    ----------
    bits
        Stored bits, shape `(rows, columns)`; changed in place.
    rows, columns
        Exponents, shapes `(rows,)` and `(columns,)`.
    mantissa_bits
        Mantissa bits of the type.
    magnitude_mask
        All bits but the sign.
    largest_exponent
        Largest exponent field of its normal numbers.
    """
    kind = bits.dtype.type
    mantissa = np.uint64((1 << mantissa_bits) - 1)
    magnitude = np.uint64(magnitude_mask)
    shift = np.uint64(mantissa_bits)
    failed = 0
    for i in range(bits.shape[0]):
        row = rows[i]
        for j in range(bits.shape[1]):
            value = np.uint64(bits[i, j])
            move = row + columns[j]
            absolute = value & magnitude
            if move == 0 or absolute == np.uint64(0):
                continue
            field = np.int64(absolute >> shift)
            target = field + move
            if field == 0 or target < 1 or target > largest_exponent:
                failed += 1
            else:
                bits[i, j] = kind((value & ~magnitude) | (value & mantissa) | (np.uint64(target) << shift))
    return failed


@_compiled
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
        total = absolute = square = largest = 0.0
        for j in range(values.shape[1]):
            value = np.float64(values[i, j])
            magnitude = abs(value)
            squared = value * value
            total += value
            absolute += magnitude
            square += squared
            largest = max(largest, magnitude)
            columns[0, j] += value
            columns[1, j] += magnitude
            columns[2, j] += squared
            columns[3, j] = max(columns[3, j], magnitude)
            if magnitude < smallest and magnitude > 0.0:
                smallest = magnitude
        rows[0, i] += total
        rows[1, i] += absolute
        rows[2, i] += square
        rows[3, i] = max(rows[3, i], largest)
    return smallest
