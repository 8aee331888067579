"""A stored tensor seen as weight matrices: which of its dimensions are output and input channels.

In: shape and role. Out: `MatrixView`, by which the statistics find the rows and columns of a weight `(out, in)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import TensorInfo


@dataclass(frozen=True, slots=True)
class MatrixView:
    """A tensor as a stack of matrices that keeps the stored order of its elements.

    Attributes
    ----------
    matrices
        Number of matrices: the experts of stacked experts, else 1.
    rows, columns
        Stored shape of each.
    transposed
        Whether stored rows are input channels: GPT-2 stores `(in, out)`.
    """

    matrices: int
    rows: int
    columns: int
    transposed: bool


def matrix_view(info: TensorInfo, role: TensorRole) -> MatrixView | None:
    """Return how to see a tensor as matrices; None for vectors and scalars.

    The last two dimensions are the matrix if the role calls them "out" and "in", in either order; dimensions before
    them count matrices. Otherwise the first dimension is the output channel and all others together the input.
    """
    if len(info.shape) < 2:
        return None
    dims = role.dims if len(role.dims) == len(info.shape) else ()
    if set(dims[-2:]) == {"out", "in"}:
        *stack, rows, columns = info.shape
        return MatrixView(math.prod(stack), rows, columns, dims[-1] == "out")
    transposed = bool(dims) and dims[0] != "out" and dims[-1] == "out"
    return MatrixView(1, info.rows, info.columns, transposed)
