"""The compiled pieces that the loops of the search share: the grid a unit of neighbours is rounded on, and rounding.

Places are unsigned throughout: a test for negative ones would keep loops from using vector units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vrscope.compiling import Function, compiled
from vrscope.quant.kernels import nearest

INTEGER, SYMMETRIC, CODEBOOK = range(3)
Singles = NDArray[np.float32]
Grid = tuple[np.float32, np.float32, np.float32]  # step, its inverse, the code of zero
Form = tuple[int, np.float32, tuple[np.float32, ...], tuple[np.float32, ...]]  # kind, largest integer, codes, bounds

_ZERO, _ONE = np.float32(0), np.float32(1)


def adding(function: Function) -> Function:
    """Return `function` compiled so that sums of finite values may be reordered to use vector units.

    Unlike `sum_kernels.summing`, it rounds every product as the format does, also one that is subtracted at once.
    """
    return compiled(function, fastmath={"reassoc", "nsz", "nnan"})


@compiled
def form_of(kind: int, top: np.float32, book: Singles) -> Form:
    """Return how a format rounds; `book` holds 16 codes and the 15 bounds between them.

    As tuples codes and bounds stay in registers.
    """
    b = book
    code = (b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15])
    bounds = (
        *(b[16], b[17], b[18], b[19], b[20], b[21], b[22], b[23], b[24], b[25], b[26], b[27], b[28], b[29], b[30]),
    )
    return kind, top, code, bounds


@compiled
def grid_of(low: np.float32, high: np.float32, form: Form) -> Grid:
    """Return the grid of a unit whose values, and 0, span from `low` to `high`; inverse 0 if all of them are zero."""
    kind, top, _, _ = form
    if kind == INTEGER:
        step = (high - low) / top
        return (step, _ONE / step, np.rint(-low / step)) if step > _ZERO else (_ONE, _ZERO, _ZERO)
    largest = max(high, -low)
    if not largest > _ZERO:
        return _ONE, _ZERO, _ZERO
    return (largest / top, top / largest, _ZERO) if kind == SYMMETRIC else (largest, _ONE / largest, _ZERO)


@compiled
def same_grid(old: tuple[np.float32, np.float32], new: tuple[np.float32, np.float32], form: Form) -> bool:
    """Return whether two spans have the same grid."""
    if form[0] == INTEGER:
        return bool(new[0] == old[0] and new[1] == old[1])
    return bool(max(new[1], -new[0]) == max(old[1], -old[0]))


@compiled
def rounded(value: np.float32, grid: Grid, form: Form) -> np.float32:
    """Return one value rounded on a grid."""
    step, inverse, zero = grid
    kind, top, code, bounds = form
    if kind == INTEGER:
        level = min(max(np.rint(value * inverse), -zero), top - zero)
    elif kind == SYMMETRIC:
        level = np.rint(value * inverse)
    else:
        level = nearest(value * inverse, bounds, code)
    return np.float32(level * step)
