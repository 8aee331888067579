"""Statistics by torch against those of the compiled loops; on the CPU here, and on CUDA where there is one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stats_oracle import DTYPES, checkpoint_of, weights

from vrscope.arch.roles import TensorRole
from vrscope.executors import Threads
from vrscope.stats import kernels, measure
from vrscope.stats.device import summarize_block_on
from vrscope.stats.matrix import matrix_view
from vrscope.stats.measure import StatOptions, measure_tensors, role_of
from vrscope.stats.summary import summarize_block

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def hard(dtype: str) -> torch.Tensor:
    """Return weights with NaN, infinity, zeros, subnormal numbers, and a stretch in which nothing is finite."""
    values = weights((33, 700), "F64").double() * 0.1
    values[0, :50], values[1, 3], values[2, 7] = 0.0, torch.nan, -torch.inf
    values[3:16] = torch.nan
    values[20, :10] = 1e-40
    return values.to(DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(33, 700), (23100,), (3, 11, 700)], ids=str)
def test_every_block_contributes_the_same(tmp_path: Path, device: str, dtype: str, shape: tuple[int, ...]) -> None:
    checkpoint = checkpoint_of(tmp_path, a=hard(dtype).reshape(shape))
    info = checkpoint.tensors["a"]
    role = TensorRole("a", "a", None, "linear", ("x", "out", "in")) if len(shape) == 3 else role_of({}, info)
    view = matrix_view(info, role)
    for place in checkpoint.block_places("a", 20_000 * info.size_bytes // info.numel):
        block = checkpoint.read_stored(place)
        ours, theirs = summarize_block_on(device, info, view, block), summarize_block(info, view, block)
        for name in ("patterns", "row_top", "column_top", "head", "tail"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert ours.row == theirs.row and ours.chunks.shape == theirs.chunks.shape
        counted = [kernels.COUNT, kernels.EXPONENT, kernels.ABSMAX, kernels.ZEROS, kernels.NANS, kernels.INFS]
        np.testing.assert_array_equal(ours.chunks[:, counted], theirs.chunks[:, counted])
        np.testing.assert_allclose(ours.chunks, theirs.chunks, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_the_table_is_that_of_the_cpu(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: weights((40, 300), name) * 3 for name in ("F64", "F32", "F16", "BF16")}
    checkpoint = checkpoint_of(tmp_path, **tensors, constant=torch.full((10_000,), 0.1))
    expected = measure_tensors(checkpoint, {})
    monkeypatch.setattr(
        measure, "summarize_block_on", partial(lambda given, name, *rest: summarize_block_on(given, *rest), device)
    )
    found = measure_tensors(checkpoint, {}, options=StatOptions(device="meta", block_bytes=30_000), executor=Threads(2))
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-9)
