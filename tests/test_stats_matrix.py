"""How stored tensors are seen as matrices."""

from __future__ import annotations

import pytest

from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import TensorInfo
from vrscope.stats.matrix import MatrixView, matrix_view


@pytest.mark.parametrize(
    ("shape", "dims", "expected"),
    [
        ((), (), None),
        ((5,), ("out",), None),
        ((4, 6), ("out", "in"), MatrixView(1, 4, 6, transposed=False)),
        ((4, 6), ("in", "out"), MatrixView(1, 4, 6, transposed=True)),
        ((4, 6), ("vocabulary", "out"), MatrixView(1, 4, 6, transposed=True)),
        ((4, 6), (), MatrixView(1, 4, 6, transposed=False)),
        ((3, 4, 6), ("x", "out", "in"), MatrixView(3, 4, 6, transposed=False)),
        ((3, 4, 6), ("x", "in", "out"), MatrixView(3, 4, 6, transposed=True)),
        ((2, 3, 4, 6), ("a", "x", "out", "in"), MatrixView(6, 4, 6, transposed=False)),
        ((8, 1, 4), ("out", "a", "b"), MatrixView(1, 8, 4, transposed=False)),
        ((8, 2, 4), ("out", "in"), MatrixView(1, 8, 8, transposed=False)),
        ((8, 2, 4), (), MatrixView(1, 8, 8, transposed=False)),
        ((0, 4), ("out", "in"), MatrixView(1, 0, 4, transposed=False)),
    ],
)
def test_the_view_follows_shape_and_declared_dimensions(
    shape: tuple[int, ...], dims: tuple[str, ...], expected: MatrixView | None
) -> None:
    info = TensorInfo("w", "F32", shape, "model.safetensors", 0, 0)
    assert matrix_view(info, TensorRole("w", "w", 0, "linear", dims)) == expected
