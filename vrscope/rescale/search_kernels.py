"""The compiled loops of the search: what weights cost after rounding, and how that changes with one scale.

All work on one matrix `(rows, columns)` of everything that reads a space, for several formats at once. A column's new
factor moves the scale of its unit of neighbours only where it holds, or comes to hold, the largest magnitude; elsewhere
only the one element changes. That is what makes a descent over single scales cheap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import compiled
from vrscope.quant.kernels import nearest

INTEGER, SYMMETRIC, CODEBOOK = range(3)
Singles = NDArray[np.float32]
Longs = NDArray[np.int64]

_ZERO = np.float32(0)


@compiled
def codes_of(book: Singles) -> tuple[tuple[np.float32, ...], tuple[np.float32, ...]]:
    """Return the codes and the bounds of a code book of 16 codes and 15 bounds as tuples, which stay in registers."""
    b = book
    code = (b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15])
    return code, (
        *(b[16], b[17], b[18], b[19], b[20], b[21], b[22], b[23], b[24], b[25], b[26], b[27], b[28], b[29], b[30]),
    )


@compiled
def _round(v: Singles, n: int, span: tuple[np.float32, np.float32], kind: int, top: np.float32, book: Singles) -> None:
    """Round the first `n` of `v` in place; `span` is their least and largest value, 0 included.

    `book` holds 16 codes and the 15 bounds between them.
    """
    low, high = span
    if kind == INTEGER:
        scale = (high - low) / top
        if scale > _ZERO:
            zero = np.rint(-low / scale)
            inverse = np.float32(1) / scale
            for j in range(n):
                code = np.rint(v[j] * inverse) + zero
                code = min(max(code, _ZERO), top)
                v[j] = (code - zero) * scale
    else:
        largest = max(high, -low)
        if largest > _ZERO:
            if kind == SYMMETRIC:
                inverse, step = top / largest, largest / top
                for j in range(n):
                    v[j] = np.rint(v[j] * inverse) * step
            else:
                inverse = np.float32(1) / largest
                code, bounds = codes_of(book)
                for j in range(n):
                    v[j] = nearest(v[j] * inverse, bounds, code) * largest


@compiled
def _span(weight: Singles, row: int, first: int, last: int, factors: Singles) -> tuple[np.float32, np.float32]:
    low, high = _ZERO, _ZERO
    for j in range(first, last):
        v = weight[row, j] * factors[j]
        low, high = min(low, v), max(high, v)
    return low, high


@compiled
def start(
    weight: Singles,
    importance: Singles,
    factors: Singles,
    format_: tuple[int, np.float32, int, Singles],
    error: Singles,
    spans: Singles,
) -> float:
    """Fill the errors and the spans for some factors and return the damage: half of sum(importance * error^2).

    Parameters
    ----------
    weight, importance
        Shape `(rows, columns)`.
    factors
        What columns are multiplied by before rounding, and divided by after it: powers of two of either sign, shape
        `(columns,)`.
    format_
        Kind, largest integer, columns per unit, code book.
    error
        Out: weight minus its round trip, shape `(rows, columns)`.
    spans
        Out: least and largest value of each unit, shape `(rows, units, 2)`.
    """
    kind, top, size, book = format_
    rows, columns = weight.shape
    values = np.empty(size, np.float32)
    damage = 0.0  # in double precision, as it sums over rows
    for i in range(rows):
        for unit in range(spans.shape[1]):
            first, last = unit * size, min(columns, (unit + 1) * size)
            low, high = _span(weight, i, first, last, factors)
            spans[i, unit, 0], spans[i, unit, 1] = low, high
            for j in range(first, last):
                values[j - first] = weight[i, j] * factors[j]
            _round(values, last - first, (low, high), kind, top, book)
            part = _ZERO
            for j in range(first, last):
                e = weight[i, j] - values[j - first] / factors[j]
                error[i, j] = e
                part += importance[i, j] * e * e
            damage += float(part)
    return damage / 2


@compiled
def change(
    weight: Singles,
    importance: Singles,
    factors: Singles,
    format_: tuple[int, np.float32, int, Singles],
    error: Singles,
    spans: Singles,
    column: int,
    factor: np.float32,
    keep: bool,
    values: Singles,
) -> float:
    """Return by how much another factor of one column changes the damage; with `keep`, also make the change.

    Parameters are those of `start`; `values` is room for one unit.
    """
    kind, top, size, book = format_
    unit = column // size
    first, last = unit * size, min(weight.shape[1], (unit + 1) * size)
    old = factors[column]
    factors[column] = factor
    found = np.float64(0)
    for i in range(weight.shape[0]):
        low0, high0 = spans[i, unit, 0], spans[i, unit, 1]
        was, now = weight[i, column] * old, weight[i, column] * factor
        if was <= low0 or was >= high0:
            low, high = _span(weight, i, first, last, factors)
        else:
            low, high = min(low0, now), max(high0, now)
        same = low == low0 and high == high0 if kind == INTEGER else max(high, -low) == max(high0, -low0)
        if same:
            values[0] = now
            _round(values, 1, (low, high), kind, top, book)
            e, before = weight[i, column] - values[0] / factor, error[i, column]
            found += importance[i, column] * (e * e - before * before)
            if keep:
                error[i, column] = e
        else:
            for j in range(first, last):
                values[j - first] = weight[i, j] * factors[j]
            _round(values, last - first, (low, high), kind, top, book)
            part = _ZERO
            for j in range(first, last):
                e, before = weight[i, j] - values[j - first] / factors[j], error[i, j]
                part += importance[i, j] * (e * e - before * before)
                if keep:
                    error[i, j] = e
            found += part
        if keep:
            spans[i, unit, 0], spans[i, unit, 1] = low, high
    if not keep:
        factors[column] = old
    return float(found / 2)


@compiled
def sweep(
    weight: Singles,
    importance: Singles,
    factors: Singles,
    formats: tuple[Longs, Singles, Longs, Singles, NDArray[np.float64]],
    errors: Singles,
    spans: Singles,
    places: tuple[Longs, Longs, Longs],
    exponents: Longs,
    negative: NDArray[np.bool_],
    limits: tuple[int, int, bool],
    threshold: float,
) -> int:
    """Try one step up, one down and the other sign for every scale, keep what lowers the weighted damage most.

    Returns how many scales moved.

    Parameters
    ----------
    weight, importance, factors
        As in `start`; the factors are changed in place.
    formats
        Kinds, largest integers, columns per unit, code books, weights: a row each per format.
    errors, spans
        As in `start`, with the formats in front; `spans` has as many units as the format with the most.
    places
        The columns of every scale one after the other, where those of each scale begin, and the order to go in.
    exponents, negative
        Of the scales, changed in place.
    limits
        Power of the reader (negative), the largest magnitude of an exponent, and whether signs may change.
    threshold
        Smallest fall of the damage that counts.
    """
    kinds, tops, sizes, books, shares = formats
    columns, begins, order = places
    power, limit, signed = limits
    values = np.empty(sizes.max(), np.float32)
    moved = 0
    for scale in order:
        own = columns[begins[scale] : begins[scale + 1]]  # which share one factor
        old = factors[own[0]]
        best, step, chosen = -threshold, 0, old
        for direction in (-1, 1, 0):  # 0 for the other sign
            exponent = exponents[scale] + direction
            if abs(exponent) > limit or (direction == 0 and not signed):
                continue
            factor = -old if direction == 0 else old * np.float32(2.0 ** (power * direction))
            cost = 0.0
            for f in range(kinds.size):
                format_ = (kinds[f], tops[f], sizes[f], books[f])
                for column in own:
                    cost += shares[f] * change(
                        weight, importance, factors, format_, errors[f], spans[f], column, factor, False, values
                    )
            if cost < best:
                best, step, chosen = cost, direction, factor
        if chosen != old:
            exponents[scale] += step
            negative[scale] ^= step == 0
            moved += 1
            for f in range(kinds.size):
                format_ = (kinds[f], tops[f], sizes[f], books[f])
                for column in own:
                    change(weight, importance, factors, format_, errors[f], spans[f], column, chosen, True, values)
                for column in own:
                    factors[column] = old  # the next format starts from the same
            for column in own:
                factors[column] = chosen
    return moved
