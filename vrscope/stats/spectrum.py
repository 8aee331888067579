"""The largest singular value of a weight that is never held in memory as a whole.

In: a checkpoint and the name of a tensor. Out: one number. The Lanczos method (scipy's ARPACK) asks for products with
`W^T W`, and each product is one pass over the row blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vrscope.checkpoint.source import Checkpoint
from vrscope.stats.encoding import encoding
from vrscope.stats.matrix import MatrixView

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DENSE = 64  # columns up to which W^T W is formed in one pass
_SEED = 0


def top_singular_value(checkpoint: Checkpoint, name: str, view: MatrixView, block_bytes: int = 4 << 20) -> float:
    """Return the largest singular value of a stored matrix, or of the largest of stacked ones.

    Computed in float64 as the root of the top eigenvalue of `W^T W` (stacked matrices form a block diagonal), to the
    precision of ARPACK, about 1e-14 relative. NaN for a tensor without elements or with NaN or infinite weights.

    Raises
    ------
    CheckpointError
        If the tensor cannot be read.
    """
    from scipy.linalg import eigvalsh
    from scipy.sparse.linalg import LinearOperator, eigsh

    size = view.matrices * view.columns
    scale = _largest(checkpoint, name, block_bytes)
    if not math.isfinite(scale) or scale == 0.0:
        return scale

    def product(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        return _normal_product(checkpoint, name, view, scale, vectors.reshape(size, -1), block_bytes)

    if size <= _DENSE:
        eigenvalue = float(eigvalsh(product(np.eye(size)))[-1])
    else:
        start = np.random.default_rng(_SEED).standard_normal(size)
        operator = LinearOperator((size, size), matvec=product, matmat=product, dtype=np.float64)
        eigenvalue = float(eigsh(operator, k=1, which="LA", v0=start, return_eigenvectors=False)[0])
    return scale * math.sqrt(max(eigenvalue, 0.0))


def _largest(checkpoint: Checkpoint, name: str, block_bytes: int) -> float:
    """Return the largest magnitude: NaN if there is no element or one is not finite."""
    code = encoding(checkpoint.tensors[name].dtype)
    largest = -math.inf
    for block in map(checkpoint.read_stored, checkpoint.block_places(name, block_bytes)):
        values = code.floats(block.bits)
        top = float(np.max(np.abs(values)))
        if not math.isfinite(top):
            return math.nan
        largest = max(largest, top)
    return largest if largest >= 0 else math.nan


def _normal_product(
    checkpoint: Checkpoint, name: str, view: MatrixView, scale: float, vectors: NDArray[np.float64], block_bytes: int
) -> NDArray[np.float64]:
    """Return `W^T W / scale^2` times `vectors`, shape `(matrices * columns, n)`, in one pass."""
    info = checkpoint.tensors[name]
    code = encoding(info.dtype)
    stacked = vectors.reshape(view.matrices, view.columns, -1)
    result = np.zeros(stacked.shape)
    for block in map(checkpoint.read_stored, checkpoint.block_places(name, block_bytes)):
        values = code.floats(block.bits).astype(np.float64) / scale
        weights = values.reshape(-1, view.rows, view.columns) if view.matrices > 1 else values[np.newaxis]
        first = block.first_row * info.columns // (view.rows * view.columns) if view.matrices > 1 else 0
        own = slice(first, first + weights.shape[0])
        result[own] += np.swapaxes(weights, 1, 2) @ (weights @ stacked[own])
    return result.reshape(vectors.shape)
