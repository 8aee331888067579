"""The compiled loop of the proof that every element of one array is that of another times a power of two.

It shares nothing with the loop that writes. Stored bits are taken apart into sign, whole-number mantissa and exponent,
and the parts are compared; no float is computed, so nothing can be rounded or overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import standalone


@standalone
def _odd(magnitude: Any, mantissa_bits: int) -> tuple[Any, Any]:
    """Return the odd whole number m and the exponent q of a magnitude m * 2**q, up to a constant in q; 0 for zero."""
    field: Any = np.int64(magnitude >> np.uint64(mantissa_bits))
    number = magnitude & ((np.uint64(1) << np.uint64(mantissa_bits)) - np.uint64(1))
    if field > 0:
        number |= np.uint64(1) << np.uint64(mantissa_bits)
    else:
        field = 1  # subnormal numbers have the exponent of the smallest normal ones, without the leading one
    while number != np.uint64(0) and number & np.uint64(1) == np.uint64(0):
        number >>= np.uint64(1)
        field += 1
    return number, field


@standalone
def _is_multiple(before: Any, after: Any, exponent: Any, layout: tuple[int, int, int]) -> Any:
    """Return whether one stored value is exactly another times `2**exponent`; NaN and infinity stay."""
    width, mantissa_bits, limit = layout
    sign = np.uint64(1) << np.uint64(width - 1)
    first, second = before & ~sign, after & ~sign
    if first > np.uint64(limit) or second > np.uint64(limit):
        return before == after
    if before & sign != after & sign:
        return False
    number, scale = _odd(first, mantissa_bits)
    other, other_scale = _odd(second, mantissa_bits)
    return number == other and (number == np.uint64(0) or scale + exponent == other_scale)


def first_unequal(
    before: NDArray[np.unsignedinteger],
    after: NDArray[np.unsignedinteger],
    rows: NDArray[np.signedinteger],
    columns: NDArray[np.signedinteger],
    layout: tuple[int, int, int],
) -> int:
    """Return the flat place of the first element where `after` is not `before * 2**(rows + columns)`, -1 if none.

    Parameters
    ----------
    before, after
        Stored bits, shape `(n, m)`.
    rows
        Exponents, shape `(n,)`, of a signed type at least as wide as the stored one; any sum of two of them and an
        exponent field must fit it.
    columns
        Exponents of the same type, shape `(1, m)`, or `(n, m)` where they differ by row.
    layout
        Bits of a value, bits of its mantissa, pattern of its largest finite magnitude.
    """
    width, mantissa_bits, limit = layout
    return int(_comparing(mantissa_bits)(before, after, rows, columns, width, limit))


@cache
def _comparing(mantissa_bits: int) -> Callable[..., Any]:
    """Return the loop of `first_unequal` for one width of the mantissa, which the compiler then knows."""

    @standalone
    def compare(
        before: NDArray[np.unsignedinteger],
        after: NDArray[np.unsignedinteger],
        rows: NDArray[np.signedinteger],
        columns: NDArray[np.signedinteger],
        width: int,
        limit: int,
    ) -> Any:
        lane = columns.dtype.type
        layout = (width, mantissa_bits, limit)
        most, zero, one = lane(limit), lane(0), lane(1)
        magnitude = lane((np.uint64(1) << np.uint64(width - 1)) - np.uint64(1))
        field = lane(magnitude ^ ((one << mantissa_bits) - one))
        for i in range(before.shape[0]):
            a, b, shifts = before[i], after[i], columns[i if columns.shape[0] > 1 else 0]
            row = lane(rows[i])
            doubtful = zero
            for j in range(a.size):
                # Numbers with the same sign and mantissa, both normal, whose exponents differ as they should.
                x, y = lane(a[j]), lane(b[j])
                first, second = lane(x & magnitude), lane(y & magnitude)
                e, f = lane(first >> mantissa_bits), lane(second >> mantissa_bits)
                wrong = lane(lane(x ^ y) & ~field) | lane(lane(f - e) ^ lane(row + shifts[j]))
                odd = (e == 0) | (f == 0) | (first > most) | (second > most)
                doubtful = lane(doubtful | lane(wrong) | (one if odd else zero))
            if doubtful != 0:
                for j in range(a.size):
                    exponent = np.int64(row) + np.int64(shifts[j])
                    if not _is_multiple(np.uint64(a[j]), np.uint64(b[j]), exponent, layout):
                        return i * before.shape[1] + j
        return -1

    return compare
