"""Top singular values against numpy's SVD."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stats_oracle import DTYPES, checkpoint_of, weights

from vrscope.arch.roles import TensorRole, roles_from_names
from vrscope.checkpoint.source import open_checkpoint
from vrscope.executors import Threads
from vrscope.stats.matrix import MatrixView
from vrscope.stats.measure import StatOptions, measure_tensors
from vrscope.stats.spectrum import top_singular_value


def top(tensor: torch.Tensor) -> float:
    return float(np.linalg.svd(tensor.double().numpy(), compute_uv=False)[..., 0].max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(90, 130), (130, 90), (200, 7), (7, 200), (1, 80), (80, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("block_bytes", [1 << 20, 700])
def test_the_top_singular_value_is_that_of_the_svd(
    tmp_path: Path, dtype: str, shape: tuple[int, int], block_bytes: int
) -> None:
    tensor = weights(shape, dtype, seed=shape[0])
    view = MatrixView(1, *shape, transposed=False)
    found = top_singular_value(checkpoint_of(tmp_path, w=tensor), "w", view, block_bytes)
    assert found == pytest.approx(top(tensor), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(tmp_path: Path, scale: float) -> None:
    tensor = weights((90, 80), "F32", scale=scale)
    found = top_singular_value(checkpoint_of(tmp_path, w=tensor), "w", MatrixView(1, 90, 80, transposed=False))
    assert found == pytest.approx(top(tensor), rel=1e-9)


def test_equal_singular_values_are_no_obstacle(tmp_path: Path) -> None:
    tensor = 3 * torch.eye(100)
    found = top_singular_value(checkpoint_of(tmp_path, w=tensor), "w", MatrixView(1, 100, 100, transposed=False))
    assert found == pytest.approx(3.0, rel=1e-9)


def test_stacked_matrices_give_the_largest_of_all(tmp_path: Path) -> None:
    tensor = weights((5, 30, 40), "BF16")
    checkpoint = checkpoint_of(tmp_path, w=tensor)
    found = top_singular_value(checkpoint, "w", MatrixView(5, 30, 40, transposed=False), 5000)
    assert found == pytest.approx(top(tensor), rel=1e-9)


def test_what_has_no_spectrum_says_so(tmp_path: Path) -> None:
    bad = torch.ones(4, 4)
    bad[1, 1] = math.nan
    checkpoint = checkpoint_of(tmp_path, zero=torch.zeros(4, 5), bad=bad, vector=torch.ones(3), empty=torch.ones(0, 3))
    roles = roles_from_names(checkpoint.tensors)
    frame = measure_tensors(checkpoint, roles, options=StatOptions(spectrum=True)).set_index("tensor")
    assert frame.loc["zero", "top_singular_value"] == 0
    assert frame["stable_rank"].isna().all()
    assert frame.loc[["bad", "vector", "empty"], "top_singular_value"].isna().all()


def test_the_stable_rank_counts_directions(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(
        tmp_path, many=2 * torch.eye(70), one=torch.ones(20, 30), stack=weights((3, 8, 9), "F32")
    )
    stack = TensorRole("stack", "experts", 0, "linear", ("x", "out", "in"))
    roles = {**roles_from_names(checkpoint.tensors), "stack": stack}
    options = StatOptions(spectrum=True)
    frame = measure_tensors(checkpoint, roles, options=options, executor=Threads(2)).set_index("tensor")
    assert frame.loc["many", "stable_rank"] == pytest.approx(70)
    assert frame.loc["one", "stable_rank"] == pytest.approx(1)
    block_diagonal = torch.block_diag(*checkpoint.read("stack")).double().numpy()
    values = np.linalg.svd(block_diagonal, compute_uv=False)
    assert frame.loc["stack", "stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)


@pytest.mark.real
def test_a_real_matrix(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    name = "model.layers.5.self_attn.k_proj.weight"
    view = MatrixView(1, *checkpoint.tensors[name].shape, transposed=False)
    assert top_singular_value(checkpoint, name, view) == pytest.approx(top(checkpoint.read(name)), rel=1e-9)
