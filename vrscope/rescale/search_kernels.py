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
from vrscope.rescale.grid_kernels import (
    INTEGER,
    SYMMETRIC,
    Form,
    Grid,
    Singles,
    adding,
    form_of,
    grid_of,
    rounded,
    same_grid,
)

Longs = NDArray[np.int64]
Row = int | np.uint64

_ZERO, _ONE = np.float32(0), np.float32(1)
_TURNS, _ENOUGH, _SURE = 4, 256, 2.0  # rows are taken in so many turns; from so many rows the first may decide


@adding
def _span(weight: Singles, row: Row, place: tuple[int, int], factors: Singles) -> tuple[np.float32, np.float32]:
    """Return the least and the largest scaled value of a unit, 0 included; `place` is its first column and its size."""
    first, n = place
    low, high = _ZERO, _ZERO
    for j in range(n):
        at = np.uint64(first + j)
        v = weight[row, at] * factors[at]
        low, high = min(low, v), max(high, v)
    return low, high


@adding
def _unit(
    weight: Singles,
    importance: Singles,
    factors: Singles,
    undo: Singles,
    error: Singles,
    row: Row,
    place: tuple[int, int],
    grid: Grid,
    form: Form,
) -> np.float32:
    """Fill the errors of a unit rounded on a grid and return the sum of importance * error^2."""
    first, n = place
    step, inverse, zero = grid
    kind, top, code, bounds = form
    total = _ZERO
    if kind == INTEGER:
        lowest, highest = -zero, top - zero
        for j in range(n):
            at = np.uint64(first + j)
            level = min(max(np.rint(weight[row, at] * factors[at] * inverse), lowest), highest)
            error[row, at] = weight[row, at] - level * step * undo[at]
            total += importance[row, at] * error[row, at] * error[row, at]
    elif kind == SYMMETRIC:
        for j in range(n):
            at = np.uint64(first + j)
            level = np.rint(weight[row, at] * factors[at] * inverse)
            error[row, at] = weight[row, at] - level * step * undo[at]
            total += importance[row, at] * error[row, at] * error[row, at]
    else:
        for j in range(n):
            at = np.uint64(first + j)
            level = nearest(weight[row, at] * factors[at] * inverse, bounds, code)
            error[row, at] = weight[row, at] - level * step * undo[at]
            total += importance[row, at] * error[row, at] * error[row, at]
    return total


@adding
def _moved(
    weight: Singles,
    importance: Singles,
    factors: Singles,
    undo: Singles,
    error: Singles,
    row: Row,
    place: tuple[int, int],
    grid: Grid,
    form: Form,
) -> np.float32:
    """Return by how much the sum of importance * error^2 of a unit grows on another grid."""
    first, n = place
    step, inverse, zero = grid
    kind, top, code, bounds = form
    total = _ZERO
    if kind == INTEGER:
        lowest, highest = -zero, top - zero
        for j in range(n):
            at = np.uint64(first + j)
            level = min(max(np.rint(weight[row, at] * factors[at] * inverse), lowest), highest)
            e, before = weight[row, at] - level * step * undo[at], error[row, at]
            total += importance[row, at] * (e * e - before * before)
    elif kind == SYMMETRIC:
        for j in range(n):
            at = np.uint64(first + j)
            level = np.rint(weight[row, at] * factors[at] * inverse)
            e, before = weight[row, at] - level * step * undo[at], error[row, at]
            total += importance[row, at] * (e * e - before * before)
    else:
        for j in range(n):
            at = np.uint64(first + j)
            level = nearest(weight[row, at] * factors[at] * inverse, bounds, code)
            e, before = weight[row, at] - level * step * undo[at], error[row, at]
            total += importance[row, at] * (e * e - before * before)
    return total


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
    form = form_of(kind, top, book)
    rows, columns = weight.shape
    undo = _ONE / factors
    damage = 0.0  # in double precision, as it sums over rows
    for i in range(rows):
        for unit in range(spans.shape[1]):
            place = (unit * size, min(size, columns - unit * size))
            low, high = _span(weight, i, place, factors)
            spans[i, unit, 0], spans[i, unit, 1] = low, high
            grid = grid_of(low, high, form)
            damage += float(_unit(weight, importance, factors, undo, error, i, place, grid, form))
    return damage / 2


@compiled
def change(
    weight: Singles,
    importance: Singles,
    factors: Singles,
    undo: Singles,
    format_: tuple[int, np.float32, int, Singles],
    error: Singles,
    spans: Singles,
    column: int,
    factor: np.float32,
    bound: float,
    keep: bool,
) -> float:
    """Return by how much another factor of one column would change the damage; with `keep`, only make the change.

    Parameters are those of `start`; `undo` is one over the factors, exactly. A change that every fourth row shows to be
    above `bound`, by more standard errors than chance makes, is not followed further: the estimate is returned.
    """
    kind, top, size, book = format_
    form = form_of(kind, top, book)
    unit, rows = column // size, weight.shape[0]
    place = (unit * size, min(size, weight.shape[1] - unit * size))
    old, undone = factors[column], undo[column]
    factors[column], undo[column] = factor, _ONE / factor
    found, squares = np.float64(0), np.float64(0)
    for turn in range(_TURNS):
        for at in range(turn, rows, _TURNS):
            i = np.uint64(at)
            was, now = weight[i, column] * old, weight[i, column] * factor
            low0, high0 = spans[i, unit, 0], spans[i, unit, 1]
            if was <= low0 or was >= high0:
                low, high = _span(weight, i, place, factors)
            else:
                low, high = min(low0, now), max(high0, now)
            grid = grid_of(low, high, form)
            part = _ZERO
            if same_grid((low0, high0), (low, high), form):
                e = weight[i, column] - rounded(now, grid, form) * undo[column]
                if keep:
                    error[i, column] = e
                else:
                    part = importance[i, column] * (e * e - error[i, column] * error[i, column])
            elif keep:
                _unit(weight, importance, factors, undo, error, i, place, grid, form)
            else:
                part = _moved(weight, importance, factors, undo, error, i, place, grid, form)
            if keep:
                spans[i, unit, 0], spans[i, unit, 1] = low, high
            found += part
            squares += np.float64(part) * part
        if turn == 0 and rows >= _ENOUGH and squares > 0:
            count = (rows + _TURNS - 1) // _TURNS
            spread = max(squares / count - (found / count) ** 2, 0.0)
            if rows * (found / count - _SURE * np.sqrt(spread / count)) > 2 * bound:
                found *= rows / count
                break
    if not keep:
        factors[column], undo[column] = old, undone
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
    undo = _ONE / factors
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
                for number, column in enumerate(own):
                    last = f == kinds.size - 1 and number == own.size - 1
                    bound = (best - cost) / shares[f] if last and shares[f] > 0 else np.inf
                    cost += shares[f] * change(
                        weight, importance, factors, undo, format_, errors[f], spans[f], column, factor, bound, False
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
                    change(
                        weight, importance, factors, undo, format_, errors[f], spans[f], column, chosen, np.inf, True
                    )
                for column in own:
                    factors[column], undo[column] = old, _ONE / old  # the next format starts from the same
            for column in own:
                factors[column], undo[column] = chosen, _ONE / chosen
    return moved
