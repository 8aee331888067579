"""The compiled loops of rewriting.

The rewrite multiplies stored floats by powers of two by adding to their exponent bits. Nothing is rounded because
nothing is multiplied: sign and mantissa are copied. If the exponent of an element that is not zero would leave the
normal range, the caller is told and decides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import standalone


def shift_exponents(
    bits: NDArray[np.unsignedinteger],
    moved: NDArray[np.unsignedinteger],
    rows: NDArray[np.signedinteger],
    columns: NDArray[np.signedinteger],
    mantissa_bits: int,
    magnitude_mask: int,
    largest_finite: int,
) -> bool:
    """Write `bits` with `rows[i] + columns[j]` added to the exponent of every element; return whether all could be.

    Parameters
    ----------
    bits
        Stored bits, shape `(rows, columns)`.
    moved
        Where to write them, same shape and type.
    rows, columns
        Exponents, shapes `(rows,)` and `(columns,)`, of a signed type at least as wide as the stored one; any sum of
        two of them and an exponent field must fit it.
    mantissa_bits
        Mantissa bits of the type.
    magnitude_mask
        All bits but the sign.
    largest_finite
        Pattern of its largest finite magnitude; above are infinity and NaN, which cannot be moved.
    """
    return bool(_shifting(mantissa_bits)(bits, moved, rows, columns, magnitude_mask, largest_finite))


@cache
def _shifting(mantissa_bits: int) -> Callable[..., Any]:
    """Return the loop of `shift_exponents` for one width of the mantissa.

    Shifts by a number that the compiler knows take as many elements at a time as fit; others, four times fewer.
    """

    @standalone
    def shift(
        bits: NDArray[np.unsignedinteger],
        moved: NDArray[np.unsignedinteger],
        rows: NDArray[np.signedinteger],
        columns: NDArray[np.signedinteger],
        magnitude_mask: int,
        largest_finite: int,
    ) -> Any:
        kind, lane = bits.dtype.type, columns.dtype.type
        magnitude, finite, zero, one = lane(magnitude_mask), lane(largest_finite), lane(0), lane(1)
        largest = lane((magnitude >> mantissa_bits) - one)  # the field above is that of infinity and NaN
        complete = True
        for i in range(bits.shape[0]):
            values, out = bits[i], moved[i]
            row = lane(rows[i])
            lost = zero
            for j in range(values.size):
                move = lane(row + columns[j])
                absolute = lane(lane(values[j]) & magnitude)
                field = lane(absolute >> mantissa_bits)
                target = lane(field + move)
                step = lane(move << mantissa_bits) if absolute != 0 else zero
                touched = move if absolute != 0 else zero
                bad = (field == 0) | (target < 1) | (target > largest)
                lost = lane(lost | (touched if bad else zero) | (one if absolute > finite else zero))
                out[j] = kind(lane(values[j]) + step)
            complete &= lost == 0
        return complete

    return shift


@standalone
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
