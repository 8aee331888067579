"""The compiled loop that looks at every move of every single scale: what it would change, each as if it were alone.

Unlike the descent of `vrscope.rescale.search_kernels` it changes nothing, so it can go through a matrix row by row,
unit by unit, which is an order of magnitude faster than column by column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import compiled
from vrscope.quant.kernels import nearest
from vrscope.rescale.grid_kernels import INTEGER, SYMMETRIC, Form, Grid, Singles, form_of, grid_of, rounded, same_grid
from vrscope.rescale.sum_kernels import summing

Doubles = NDArray[np.float64]

_ZERO, _ONE = np.float32(0), np.float32(1)


@summing
def _span(values: Singles, n: int) -> tuple[np.float32, np.float32]:
    """Return the least and the largest of the first `n` values, 0 included."""
    low, high = _ZERO, _ZERO
    for j in range(n):
        low, high = min(low, values[np.uint64(j)]), max(high, values[np.uint64(j)])
    return low, high


@summing
def _around(
    values: Singles,
    undo: Singles,
    error: Singles,
    place: tuple[Singles, Singles, int, int, int],
    grid: Grid,
    form: Form,
) -> tuple[np.float32, np.float32]:
    """Return what rounding a whole unit on a new grid gains by the slope, and half of what it costs by importance.

    `place` are importance, slope, row, first column and number of columns.
    """
    importance, slope, i, first, n = place
    step, inverse, zero = grid
    kind, top, code, bounds = form
    gain, cost = _ZERO, _ZERO
    if kind == INTEGER:
        lowest, highest = -zero, top - zero
        for j in range(n):
            t, at = np.uint64(j), np.uint64(first + j)
            level = min(max(np.rint(values[t] * inverse), lowest), highest)
            change = (values[t] - level * step) * undo[t] - error[t]
            gain += slope[i, at] * change
            cost += importance[i, at] * change * change
    elif kind == SYMMETRIC:
        for j in range(n):
            t, at = np.uint64(j), np.uint64(first + j)
            change = (values[t] - np.rint(values[t] * inverse) * step) * undo[t] - error[t]
            gain += slope[i, at] * change
            cost += importance[i, at] * change * change
    else:
        for j in range(n):
            t, at = np.uint64(j), np.uint64(first + j)
            change = (values[t] - nearest(values[t] * inverse, bounds, code) * step) * undo[t] - error[t]
            gain += slope[i, at] * change
            cost += importance[i, at] * change * change
    return gain, cost / np.float32(2)


@compiled
def look(
    weight: Singles,
    importance: Singles,
    slope: Singles,
    factors: Singles,
    format_: tuple[int, np.float32, int, Singles],
    moves: Singles,
    gain: Doubles,
    cost: Doubles,
) -> None:
    """Add what multiplying the factor of one column by each of `moves` gains and costs, for every column.

    With e the errors now and e' those after the move, the gain is the sum of slope * (e' - e): by how much the damage
    falls to first order, as rounded weights are w - e. The cost is half of the sum of importance * (e' - e)^2.

    Parameters
    ----------
    weight, importance, slope
        Shape `(rows, columns)`.
    factors
        What columns are multiplied by before rounding, and divided by after it: powers of two of either sign, shape
        `(columns,)`.
    format_
        Kind, largest integer, columns per unit, code book: as in `search_kernels.start`.
    moves
        Powers of two of either sign.
    gain, cost
        Added to; shape `(moves, columns)`.
    """
    kind, top, size, book = format_
    form = form_of(kind, top, book)
    rows, columns = weight.shape
    values, undo, error = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for i in range(rows):
        for first in range(0, columns, size):
            n = min(size, columns - first)
            for j in range(n):
                values[j] = weight[i, first + j] * factors[first + j]
                undo[j] = _ONE / factors[first + j]
            low, high = _span(values, n)
            own = grid_of(low, high, form)
            for j in range(n):
                error[j] = (values[j] - rounded(values[j], own, form)) * undo[j]
            place = (importance, slope, i, first, n)
            for j in range(n):
                was = values[j]
                if was == _ZERO:
                    continue
                rest_low, rest_high = low, high
                if was <= low or was >= high:
                    values[j] = _ZERO
                    rest_low, rest_high = _span(values, n)
                    values[j] = was
                back = undo[j]
                for m in range(moves.size):
                    now = was * moves[m]
                    new_low, new_high = min(rest_low, now), max(rest_high, now)
                    if same_grid((low, high), (new_low, new_high), form):
                        change = (now - rounded(now, own, form)) * (back / moves[m]) - error[j]
                        gain[m, first + j] += slope[i, first + j] * change
                        cost[m, first + j] += np.float32(0.5) * importance[i, first + j] * change * change
                    else:
                        values[j], undo[j] = now, back / moves[m]
                        grid = grid_of(new_low, new_high, form)
                        gained, paid = _around(values, undo, error, place, grid, form)
                        gain[m, first + j] += gained
                        cost[m, first + j] += paid
                        values[j], undo[j] = was, back
