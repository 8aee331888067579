"""The compiled loops of quantization: round-trip float32 weights through a format, and sum what that costs.

In: contiguous float32 arrays. Out: the dequantized weights in an array of the caller, which may be the input itself.
Every element comes out as bitsandbytes 0.50 on the CPU (blocks) and `vrscope.quant.simulated` (integers) make it, to
the last bit. All release the interpreter lock and run on the calling thread; blocks, rows and groups are independent,
so cutting the work anywhere between them changes nothing. Importing this module imports numba.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from vrscope.compiling import compiled

Function = TypeVar("Function", bound=Callable[..., object])
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Patterns = NDArray[np.unsignedinteger]

SIGNAL, ERROR, LARGEST = range(3)  # fields of the sums of `add_errors`

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)
_SMALLEST_SCALE = np.float32(1e-38)  # bitsandbytes divides by no less
_SMALL, _LARGE = np.float32(2.0**-90), np.float32(2.0**100)
_ONE, _ZERO, _LAST = np.float32(1), np.float32(0), np.float32(15)
_STEP = np.float32(1 / 127)
_TOGETHER = 16  # blocks
_PIECE = 4096  # elements


def _summing(function: Function) -> Function:
    """Return `function` compiled so that sums may be reordered to use vector units."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


def _bitcast_to(kind: Any) -> Callable[..., Any]:
    """Return how numba reads the 32 bits of a value in a register as another type."""

    def bitcast(context: Any, value: Any) -> Any:
        del context

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del signature
            return builder.bitcast(arguments[0], context.get_value_type(kind))

        return kind(value), generate

    return cast(Callable[..., Any], intrinsic(bitcast))


# In registers, since an array of one element would cost more than its block.
_as_float: Callable[..., np.float32] = _bitcast_to(numba.types.float32)
_as_bits: Callable[..., np.uint32] = _bitcast_to(numba.types.uint32)


@compiled
def _largest(x: Singles, first: int, count: int) -> np.float32:
    """Return the largest magnitude of `x[first : first + count]`, 0 if there are none, NaN if one of them is.

    Here and below a stretch is given by numbers, since a slice counts references, which costs as much as a block;
    unsigned places spare the test for negative ones, which would keep loops from using vector units.
    """
    top = np.uint32(0)
    for i in range(count):
        magnitude = np.uint32(_as_bits(x[np.uint64(first + i)]) & _MAGNITUDE)
        top = np.uint32(max(top, magnitude))  # as integers NaN > infinity > finite
    return _as_float(top)


@compiled
def largest(values: Singles) -> np.float32:
    """Return the largest magnitude of `values` (shape `(n,)`), 0 if there are none, NaN if one of them is."""
    return _largest(values, 0, values.size)


@compiled
def nearest(v: np.float32, bounds: tuple[np.float32, ...], code: tuple[np.float32, ...]) -> np.float32:
    """Return `code[number of bounds below v]`; NaN counts as above all bounds.

    A binary search that narrows bounds and codes instead of branching: loops over it use vector units, and it takes 4
    comparisons where counting takes 15.
    """
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14 = bounds
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15 = code
    low = v <= b7
    b0, b1, b2, b3 = b0 if low else b8, b1 if low else b9, b2 if low else b10, b3 if low else b11
    b4, b5, b6 = b4 if low else b12, b5 if low else b13, b6 if low else b14
    c0, c1, c2, c3 = c0 if low else c8, c1 if low else c9, c2 if low else c10, c3 if low else c11
    c4, c5, c6, c7 = c4 if low else c12, c5 if low else c13, c6 if low else c14, c7 if low else c15
    low = v <= b3
    b0, b1, b2 = b0 if low else b4, b1 if low else b5, b2 if low else b6
    c0, c1, c2, c3 = c0 if low else c4, c1 if low else c5, c2 if low else c6, c3 if low else c7
    low = v <= b1
    b0, c0, c1 = b0 if low else b2, c0 if low else c2, c1 if low else c3
    return c0 if v <= b0 else c1


@compiled
def _eight(x: Singles, first: int) -> tuple[np.float32, ...]:
    y = x[first : first + 8]
    return y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]


@compiled
def block_scales(values: Singles, size: int, out: Singles) -> None:
    """Write the scale of every block of `size` consecutive values (shape `(n,)`): its largest magnitude.

    `out` has shape `(ceil(n / size),)`. A last incomplete block gets no less than 1e-38, as in bitsandbytes.
    """
    for block in range(out.size):
        count = min(size, values.size - block * size)
        scale = _largest(values, block * size, count)
        out[block] = _SMALLEST_SCALE if count < size and scale < _SMALLEST_SCALE else scale


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
    b = _eight(bounds, 0)[:7] + _eight(bounds, 7)
    c = _eight(code, 0) + _eight(code, 8)
    step = _TOGETHER * size  # blocks are searched together, so that bounds and codes stay in registers
    part, own = np.empty(step, np.float32), np.empty(_TOGETHER, np.float32)
    for start in range(0, values.size, step):
        stop = min(start + step, values.size)
        for k in range((stop - start + size - 1) // size):
            first, count = start + k * size, min(size, stop - start - k * size)
            top = _largest(values, first, count)
            divisor = _SMALLEST_SCALE if top < _SMALLEST_SCALE else top
            if count == size:
                own[k], factor = top, _ONE / divisor
                for i in range(size):
                    part[np.uint64(k * size + i)] = values[np.uint64(first + i)] * factor
            else:
                own[k] = divisor
                for i in range(count):
                    part[np.uint64(k * size + i)] = values[np.uint64(first + i)] / divisor
        for i in range(stop - start):
            part[i] = nearest(part[i], b, c)
        for k in range((stop - start + size - 1) // size):
            first, count = start + k * size, min(size, stop - start - k * size)
            scale = scales[first // size] if scales.size > 0 else own[k]
            for i in range(count):
                out[np.uint64(first + i)] = part[np.uint64(k * size + i)] * scale


@compiled
def _exponent(top: np.float32) -> int:
    """Return by which power of two a group must be moved down so that no intermediate result leaves the normal range.

    0 for groups of usual magnitude; those with NaN or infinity must not get here.
    """
    return 0 if top == _ZERO or _SMALL < top < _LARGE else math.frexp(np.float64(top))[1]


@compiled
def _move(x: Singles, first: int, count: int, exponent: int, y: Singles) -> None:
    """Write `x * 2**exponent`, in two steps because 2**exponent alone may not be a float32."""
    half = exponent // 2
    one, two = np.float32(math.ldexp(1.0, half)), np.float32(math.ldexp(1.0, exponent - half))
    for i in range(count):
        place = np.uint64(first + i)
        y[place] = x[place] * one * two


@compiled
def _round_int8(x: Singles, first: int, count: int, top: np.float32, y: Singles) -> None:
    """Write `x` rounded to 255 levels of which the outermost are +-`top`, a magnitude of the usual range."""
    factor = _ONE / (top if top != _ZERO else _ONE) * np.float32(127)  # torch divides a number by a tensor like this
    for i in range(count):
        place = np.uint64(first + i)
        y[place] = (np.rint(x[place] * factor) + _ZERO) * top * _STEP


@compiled
def _to_int8(x: Singles, first: int, count: int, top: np.float32, y: Singles) -> None:
    """Write `x` rounded to 255 levels of which the outermost are +-`top`."""
    if not top < np.inf:
        y[first : first + count] = np.nan
        return
    exponent = _exponent(top)
    if exponent == 0:
        _round_int8(x, first, count, top, y)
    else:
        _move(x, first, count, -exponent, y)
        _round_int8(y, first, count, np.float32(math.ldexp(np.float64(top), -exponent)), y)
        _move(y, first, count, exponent, y)


@compiled
def roundtrip_int8_rows(values: Singles, out: Singles) -> None:
    """Round every row of `values` (shape `(rows, columns)`) to symmetric 8-bit integers with one scale per row."""
    rows, columns = values.shape
    x, y = values.reshape(-1), out.reshape(-1)
    for row in range(rows):
        _to_int8(x, row * columns, columns, _largest(x, row * columns, columns), y)


@compiled
def roundtrip_int8_scale(values: Singles, top: np.float32, out: Singles) -> None:
    """Round `values` (shape `(n,)`) to symmetric 8-bit integers; `top` is the largest magnitude of all."""
    _to_int8(values, 0, values.size, np.float32(top), out)  # numba hands a float32 out as a Python float


@compiled
def _range(x: Singles, first: int, count: int) -> tuple[np.float32, np.float32]:
    """Return the least and the largest of a stretch of `x` and 0; NaN counts as beyond infinity of its sign.

    By their bits, positive values ascend as signed integers and negative ones descend as unsigned ones.
    """
    high, low = np.int32(0), np.uint32(0)
    for i in range(count):
        bits = _as_bits(x[np.uint64(first + i)])
        high = np.int32(max(high, np.int32(bits)))
        low = np.uint32(max(low, bits))
    return _as_float(low if low > _MAGNITUDE else np.uint32(0)), _as_float(np.uint32(high))


@compiled
def _round_int4(x: Singles, first: int, count: int, ends: tuple[np.float32, np.float32], y: Singles) -> None:
    """Write one group of the range `ends`, of a usual magnitude, rounded to asymmetric 4-bit integers."""
    low, high = ends
    scale = (high - low) / _LAST
    scale = scale if scale != _ZERO else _ONE
    zero = min(max(np.rint(-low / scale), _ZERO), _LAST)
    for i in range(count):
        place = np.uint64(first + i)
        c = np.rint(x[place] / scale) + zero
        c = c if c > _ZERO else _ZERO
        c = c if c < _LAST else _LAST
        y[place] = (c - zero) * scale


@compiled
def _to_int4(x: Singles, first: int, count: int, y: Singles) -> None:
    """Write one group rounded to asymmetric 4-bit integers."""
    low, high = _range(x, first, count)
    if not (-low < np.inf and high < np.inf):
        y[first : first + count] = np.nan
        return
    exponent = _exponent(max(-low, high))
    if exponent == 0:
        _round_int4(x, first, count, (low, high), y)
    else:
        _move(x, first, count, -exponent, y)
        _round_int4(y, first, count, _range(y, first, count), y)
        _move(y, first, count, exponent, y)


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
    rows, columns = values.shape
    x, y = values.reshape(-1), out.reshape(-1)
    for row in range(rows):
        for first in range(0, columns, size):
            _to_int4(x, row * columns + first, min(size, columns - first), y)


@compiled
def _single(bits: np.uint32, width: int) -> np.float32:
    """Return the float32 whose upper `width` bits are given."""
    return _as_float(np.uint32(np.uint32(bits) << np.uint32(32 - width)))


@compiled
def _decode(bits: Patterns, first: int, x: Singles) -> int:
    """Write the float32 values of stored bits from `first` on, until `x` is full, and return how many there were."""
    count = min(x.size, bits.size - first)
    for i in range(count):
        x[i] = _single(bits[np.uint64(first + i)], 8 * bits.itemsize)
    return count


@compiled
def singles(bits: Patterns) -> Singles:
    """Return the float32 values of stored bits, same shape; `bits` as in `add_codebook_errors`."""
    out = np.empty(bits.size, np.float32)
    _decode(bits.reshape(-1), 0, out)
    return out.reshape(bits.shape)


@_summing
def signal(bits: Patterns) -> float:
    """Return the sum of the squares of weights in float64; `bits` as in `add_codebook_errors`."""
    flat, total = bits.reshape(-1), 0.0
    for i in range(flat.size):
        value = np.float64(_single(flat[i], 8 * flat.itemsize))
        total += value * value
    return total


@_summing
def add_errors(values: Singles, dequantized: Singles, sums: Doubles) -> None:
    """Add to `sums` the squares of what rounding changed, and raise the largest change.

    Parameters
    ----------
    values, dequantized
        Shape `(n,)`. Their difference is taken in float32, squares and sums in float64.
    sums
        Fields ERROR and LARGEST; the latter becomes NaN if any difference is. SIGNAL is left to `signal`, as it is the
        same for all formats.
    """
    top = np.uint32(0)
    error = 0.0
    for i in range(values.size):
        difference = np.float32(dequantized[i] - values[i])
        off = np.float64(difference)
        error += off * off
        top = np.uint32(max(top, np.uint32(_as_bits(difference) & _MAGNITUDE)))
    sums[ERROR] += error
    worst = np.float64(_as_float(top))
    if top > _INFINITY or worst > sums[LARGEST]:
        sums[LARGEST] = worst


@compiled
def _piece(unit: int) -> tuple[Singles, Singles]:
    """Return room for whole units of so many elements and what they round to, both in the first-level cache."""
    size = max(1, _PIECE // max(1, unit)) * max(1, unit)
    return np.empty(size, np.float32), np.empty(size, np.float32)


@compiled
def add_codebook_errors(bits: Patterns, size: int, code: Singles, bounds: Singles, sums: Doubles) -> None:
    """Do what `add_errors` does for weights and their selves after `roundtrip_codebook_blocks`, which are not kept.

    Parameters
    ----------
    bits
        Stored bits of the weights, shape `(rows, columns)`: uint32 for float32, or uint16 for its upper half (BF16).
    size, code, bounds
        As in `roundtrip_codebook_blocks`.
    sums
        As in `add_errors`.
    """
    flat, scales = bits.reshape(-1), np.empty(0, np.float32)
    x, y = _piece(size)
    for first in range(0, flat.size, x.size):
        values = x[: _decode(flat, first, x)]
        roundtrip_codebook_blocks(values, size, code, bounds, scales, y[: values.size])
        add_errors(values, y[: values.size], sums)


@compiled
def add_int8_row_errors(bits: Patterns, sums: Doubles) -> None:
    """Do what `add_codebook_errors` does, for `roundtrip_int8_rows`."""
    flat, columns = bits.reshape(-1), bits.shape[1]
    x, y = _piece(columns)
    for first in range(0, flat.size, x.size):
        values = x[: _decode(flat, first, x)]
        roundtrip_int8_rows(values.reshape(-1, columns), y[: values.size].reshape(-1, columns))
        add_errors(values, y[: values.size], sums)


@compiled
def add_int4_group_errors(bits: Patterns, size: int, sums: Doubles) -> None:
    """Do what `add_codebook_errors` does, for `roundtrip_int4_groups` and its `size`."""
    flat, columns = bits.reshape(-1), bits.shape[1]
    x, y = _piece(columns)
    for first in range(0, flat.size, x.size):
        values = x[: _decode(flat, first, x)]
        roundtrip_int4_groups(values.reshape(-1, columns), size, y[: values.size].reshape(-1, columns))
        add_errors(values, y[: values.size], sums)
