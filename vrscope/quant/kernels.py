"""The compiled loops of quantization: round-trip float32 weights through a format, and sum what that costs.

In: contiguous float32 arrays. Out: the dequantized weights in an array of the caller, which may be the input itself.
Every element comes out as bitsandbytes 0.50 on the CPU (blocks) and `vrscope.quant.simulated` (integers) make it, to
the last bit. All release the interpreter lock and run on the calling thread; blocks, rows and groups are independent,
so cutting the work anywhere between them changes nothing. Importing this module imports numba.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from vrscope.compiling import compiled

Function = TypeVar("Function", bound=Callable[..., object])
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]

SIGNAL, ERROR, LARGEST = range(3)  # fields of the sums of `add_errors`

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)
_SMALLEST_SCALE = np.float32(1e-38)  # bitsandbytes divides by no less
_SMALL, _LARGE = np.float32(2.0**-90), np.float32(2.0**100)
_ONE, _ZERO, _LAST = np.float32(1), np.float32(0), np.float32(15)
_STEP = np.float32(1 / 127)


def _summing(function: Function) -> Function:
    """Return `function` compiled so that sums may be reordered to use vector units."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


def _bitcast(context: Any, bits: Any) -> Any:
    """Tell numba how to read 32 bits as a float32 in a register."""
    del context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        return builder.bitcast(arguments[0], context.get_value_type(numba.types.float32))

    return numba.types.float32(bits), generate


_as_float: Callable[..., np.float32] = intrinsic(_bitcast)  # an array of one element would cost more than its block


@compiled
def largest(values: Singles) -> np.float32:
    """Return the largest magnitude of `values` (shape `(n,)`), 0 if there are none, NaN if one of them is."""
    bits = values.view(np.uint32)
    top = np.uint32(0)
    for i in range(bits.size):
        top = np.uint32(max(top, np.uint32(bits[i] & _MAGNITUDE)))  # as integers NaN > infinity > finite
    return _as_float(top)


@compiled
def _to_codes(x: Singles, scales: tuple[np.float32, np.float32], code: Singles, bounds: Singles, y: Singles) -> None:
    """Write `code[number of bounds below x * scales[0]] * scales[1]`; NaN counts as above all bounds.

    Written out, because only then does the loop over the elements use vector units.
    """
    factor, scale = scales
    b0, b1, b2, b3, b4 = bounds[0], bounds[1], bounds[2], bounds[3], bounds[4]
    b5, b6, b7, b8, b9 = bounds[5], bounds[6], bounds[7], bounds[8], bounds[9]
    b10, b11, b12, b13, b14 = bounds[10], bounds[11], bounds[12], bounds[13], bounds[14]
    c0, c1, c2, c3, c4, c5, c6, c7 = code[0], code[1], code[2], code[3], code[4], code[5], code[6], code[7]
    c8, c9, c10, c11, c12, c13, c14, c15 = code[8], code[9], code[10], code[11], code[12], code[13], code[14], code[15]
    for i in range(x.size):
        v = x[i] * factor
        c = c0 if v <= b0 else c1
        c = c if v <= b1 else c2
        c = c if v <= b2 else c3
        c = c if v <= b3 else c4
        c = c if v <= b4 else c5
        c = c if v <= b5 else c6
        c = c if v <= b6 else c7
        c = c if v <= b7 else c8
        c = c if v <= b8 else c9
        c = c if v <= b9 else c10
        c = c if v <= b10 else c11
        c = c if v <= b11 else c12
        c = c if v <= b12 else c13
        c = c if v <= b13 else c14
        c = c if v <= b14 else c15
        y[i] = c * scale


@compiled
def block_scales(values: Singles, size: int, out: Singles) -> None:
    """Write the scale of every block of `size` consecutive values (shape `(n,)`): its largest magnitude.

    `out` has shape `(ceil(n / size),)`. A last incomplete block gets no less than 1e-38, as in bitsandbytes.
    """
    for block in range(out.size):
        x = values[block * size : (block + 1) * size]
        scale = largest(x)
        out[block] = _SMALLEST_SCALE if x.size < size and scale < _SMALLEST_SCALE else scale


@compiled
def roundtrip_codebook_blocks(
    values: Singles, size: int, code: Singles, bounds: Singles, scales: Singles, out: Singles
) -> None:
    """Replace every value by the nearest code times the scale of its block.

    A value is divided by the largest magnitude of its block, as bitsandbytes 0.50 does it: times the inverse in whole
    blocks, by a true division in a last incomplete one.

    Parameters
    ----------
    values, out
        Shape `(n,)`.
    size
        Elements per block.
    code
        The 16 codes in ascending order.
    bounds
        The 15 bounds between them; a value on a bound belongs below it.
    scales
        What the codes of each block are multiplied by, shape `(ceil(n / size),)`; empty: its largest magnitude.
    """
    rest = np.empty(size, np.float32)
    for block in range((values.size + size - 1) // size):
        x, y = values[block * size : (block + 1) * size], out[block * size : (block + 1) * size]
        top = largest(x)
        divisor = _SMALLEST_SCALE if top < _SMALLEST_SCALE else top
        if x.size == size:
            scale = scales[block] if scales.size > 0 else top
            _to_codes(x, (_ONE / divisor, scale), code, bounds, y)
        else:
            scale = scales[block] if scales.size > 0 else divisor
            for i in range(x.size):
                rest[i] = x[i] / divisor
            _to_codes(rest[: x.size], (_ONE, scale), code, bounds, y)


@compiled
def _exponent(top: np.float32) -> int:
    """Return by which power of two a group must be moved down so that no intermediate result leaves the normal range.

    0 for groups of usual magnitude; those with NaN or infinity must not get here.
    """
    return 0 if top == _ZERO or _SMALL < top < _LARGE else math.frexp(np.float64(top))[1]


@compiled
def _moved(x: Singles, exponent: int, y: Singles) -> None:
    """Write `x * 2**exponent`, in two steps because 2**exponent alone may not be a float32."""
    half = exponent // 2
    first, second = np.float32(math.ldexp(1.0, half)), np.float32(math.ldexp(1.0, exponent - half))
    for i in range(x.size):
        y[i] = x[i] * first * second


@compiled
def _to_int8(x: Singles, top: np.float32, y: Singles) -> None:
    """Write `x` rounded to 255 levels of which the outermost are +-`top`."""
    if not top < np.inf:
        y[:] = np.nan
        return
    exponent = _exponent(top)
    if exponent != 0:
        _moved(x, -exponent, y)
        top = np.float32(math.ldexp(np.float64(top), -exponent))
        x = y
    factor = _ONE / (top if top != _ZERO else _ONE) * np.float32(127)  # torch divides a number by a tensor like this
    for i in range(x.size):
        y[i] = (np.rint(x[i] * factor) + _ZERO) * top * _STEP
    if exponent != 0:
        _moved(y, exponent, y)


@compiled
def roundtrip_int8_rows(values: Singles, out: Singles) -> None:
    """Round every row of `values` (shape `(rows, columns)`) to symmetric 8-bit integers with one scale per row."""
    for row in range(values.shape[0]):
        _to_int8(values[row], largest(values[row]), out[row])


@compiled
def roundtrip_int8_scale(values: Singles, top: np.float32, out: Singles) -> None:
    """Round `values` (shape `(n,)`) to symmetric 8-bit integers; `top` is the largest magnitude of all."""
    _to_int8(values, np.float32(top), out)  # numba hands a float32 out as a Python float


@compiled
def _range(x: Singles) -> tuple[np.float32, np.float32]:
    """Return the least and the largest of `x` and 0; NaN counts as beyond infinity of its sign.

    By their bits, positive values ascend as signed integers and negative ones descend as unsigned ones.
    """
    signed, unsigned = x.view(np.int32), x.view(np.uint32)
    high, low = np.int32(0), np.uint32(0)
    for i in range(x.size):
        high = np.int32(max(high, signed[i]))
        low = np.uint32(max(low, unsigned[i]))
    return _as_float(low if low > _MAGNITUDE else np.uint32(0)), _as_float(np.uint32(high))


@compiled
def _to_int4(x: Singles, y: Singles) -> None:
    """Write one group rounded to asymmetric 4-bit integers."""
    low, high = _range(x)
    if not (-low < np.inf and high < np.inf):
        y[:] = np.nan
        return
    exponent = _exponent(max(-low, high))
    if exponent != 0:
        _moved(x, -exponent, y)
        x = y
        low, high = _range(x)
    scale = (high - low) / _LAST
    scale = scale if scale != _ZERO else _ONE
    zero = min(max(np.rint(-low / scale), _ZERO), _LAST)
    for i in range(x.size):
        c = np.rint(x[i] / scale) + zero
        c = c if c > _ZERO else _ZERO
        c = c if c < _LAST else _LAST
        y[i] = (c - zero) * scale
    if exponent != 0:
        _moved(y, exponent, y)


@compiled
def roundtrip_int4_groups(values: Singles, size: int, out: Singles) -> None:
    """Round every group to asymmetric 4-bit integers with a float32 scale and an integer zero point.

    Parameters
    ----------
    values, out
        Shape `(rows, columns)`.
    size
        Consecutive inputs of one row that share a scale; the last group of a row may be shorter.
    """
    columns = values.shape[1]
    for row in range(values.shape[0]):
        for first in range(0, columns, size):
            _to_int4(values[row, first : first + size], out[row, first : first + size])


@_summing
def add_errors(values: Singles, dequantized: Singles, sums: Doubles) -> None:
    """Add to `sums` the squares of the values and of their errors, and raise the largest error.

    Parameters
    ----------
    values, dequantized
        Shape `(n,)`. Their difference is taken in float32, squares and sums in float64.
    sums
        Fields SIGNAL, ERROR and LARGEST; the last becomes NaN if any difference is.
    """
    part = np.empty(1024, np.float32)
    bits = part.view(np.uint32)
    top = np.uint32(0)
    signal, error = 0.0, 0.0
    for first in range(0, values.size, part.size):
        x, y = values[first : first + part.size], dequantized[first : first + part.size]
        for i in range(x.size):
            difference = y[i] - x[i]
            part[i] = difference
            value, off = np.float64(x[i]), np.float64(difference)
            signal += value * value
            error += off * off
        for i in range(x.size):
            top = np.uint32(max(top, np.uint32(bits[i] & _MAGNITUDE)))
    sums[SIGNAL] += signal
    sums[ERROR] += error
    worst = np.float64(_as_float(top))
    if top > _INFINITY or worst > sums[LARGEST]:
        sums[LARGEST] = worst
