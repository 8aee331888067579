"""Where the elements of every space lie in a stored dimension, by its layout.

Apart from `layout`, so that reading the declarations needs no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.layout import Concat, Layout, Leaf, leaves, length


def positions(
    layout: Layout, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], outer: tuple[str, ...] = ()
) -> dict[str, NDArray[np.int64]]:
    """Return for each space an array, shaped by the space's axes, of the places of its elements in the dimension.

    Axes in `outer` are dimensions of their own, so along them the places repeat.
    """
    found: dict[str, NDArray[np.int64]] = {}
    for name in {leaf.names[0] for leaf in leaves(layout)}:
        shared = tuple(axis for axis in outer if axis in axes[name])
        start = np.zeros([sizes[axis] for axis in shared], np.int64)
        part: dict[str, NDArray[np.int64]] = {}
        _place(layout, (axes, sizes), (start, shared), part)
        found[name] = part[name]
    return found


def _place(
    layout: Layout,
    context: tuple[Mapping[str, tuple[str, ...]], Mapping[str, int]],
    at: tuple[NDArray[np.int64], tuple[str, ...]],
    found: dict[str, NDArray[np.int64]],
) -> None:
    """Record the places of every leaf; `at` holds the start of this piece for every index of the outer axes."""
    (axes, sizes), (start, outer) = context, at
    if isinstance(layout, Leaf):
        name = layout.names[0]
        order = [axis for axis in axes[name] if axis not in outer]
        shape = [sizes[axis] for axis in order]
        inner = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        full = start.reshape(*start.shape, *[1] * len(order)) + inner
        have = (*outer, *order)
        found[name] = full.transpose([have.index(axis) for axis in axes[name]])
    elif isinstance(layout, Concat):
        for part in layout.parts:
            _place(part, context, (start, outer), found)
            start = start + length(part, axes, sizes, outer)[0]
    else:
        split = ("g", "r") if layout.axis == "h" and "h" not in axes[leaves(layout)[0].names[0]] else (layout.axis,)
        step = length(layout.body, axes, sizes, outer + split)[0]
        shape = [sizes[axis] for axis in split]
        inner = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape) * step
        _place(layout.body, context, (start.reshape(*start.shape, *[1] * len(split)) + inner, (*outer, *split)), found)
