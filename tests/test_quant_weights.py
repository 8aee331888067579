"""Weight errors of a checkpoint against float64 numpy, in every orientation, slab size and thread count."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import write_safetensors

from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.executors import Serial, Threads
from vrscope.quant import weights
from vrscope.quant.formats import FORMATS, get_format
from vrscope.quant.weights import WEIGHT_ERROR_COLUMNS, WeightErrors, matrices, weight_error
from vrscope.stats.measure import StatOptions, measure_tensors

NAMES = [entry.name for entry in FORMATS]


def tensors() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 0.1)  # noqa: E731
    return {
        "layers.0.up.weight": make(50, 100),
        "layers.1.up.weight": make(33, 65),
        "layers.0.conv1d.weight": make(100, 40),
        "layers.0.experts.up": make(3, 20, 66),
        "layers.0.half.weight": make(16, 64).to(torch.bfloat16),
        "embed.weight": make(10, 16),
        "layers.0.up.bias": make(50),
        "layers.0.packed.weight": torch.ones(4, 4, dtype=torch.int8),
    }


ROLES = {
    name: TensorRole(name, name.split(".", 2)[-1], int(name.split(".")[1]) if name[0] == "l" else None, kind, dims)
    for name, kind, dims in [
        ("layers.0.up.weight", "linear", ("out", "in")),
        ("layers.1.up.weight", "linear", ("out", "in")),
        ("layers.0.conv1d.weight", "linear", ("in", "out")),
        ("layers.0.experts.up", "linear", ("x", "out", "in")),
        ("layers.0.half.weight", "linear", ("out", "in")),
        ("embed.weight", "embed", ("out", "in")),
        ("layers.0.up.bias", "bias", ("out",)),
        ("layers.0.packed.weight", "linear", ("out", "in")),
    ]
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_safetensors(tmp_path / "model.safetensors", tensors()))


def expected(stored: torch.Tensor, dims: tuple[str, ...], name: str) -> tuple[float, float, float]:
    """Return SQNR, relative and largest error in float64, each matrix quantized whole."""
    whole = stored.float()
    if dims == ("in", "out"):
        whole = whole.T.contiguous()
    parts = list(whole) if whole.ndim == 3 else [whole]
    error = np.concatenate([(get_format(name).roundtrip(part) - part).double().numpy().ravel() for part in parts])
    signal = float((whole.double() ** 2).sum())
    power = float((error**2).sum())
    return 10 * math.log10(signal / power), math.sqrt(power / signal), float(np.abs(error).max())


@pytest.mark.parametrize(("slab", "block"), [(130, 1 << 20), (1000, 1), (1 << 17, 5000), (1 << 20, 1 << 20)])
def test_figures_equal_float64(checkpoint: Checkpoint, slab: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SLAB_ELEMENTS", slab)
    monkeypatch.setattr(weights, "BLOCK_BYTES", block)
    frame = weight_error(checkpoint, ROLES, FORMATS, executor=Serial())
    assert list(frame.columns) == [column.name for column in WEIGHT_ERROR_COLUMNS]
    linear = [name for name in checkpoint.tensors if ROLES[name].kind == "linear" and "packed" not in name]
    assert list(frame["tensor"]) == [name for name in linear for _ in NAMES]
    assert list(frame["format"]) == NAMES * len(linear)
    for row in frame.itertuples():
        sqnr, relative, largest = expected(tensors()[row.tensor], ROLES[row.tensor].dims, row.format)
        assert row.sqnr_db == pytest.approx(sqnr, rel=1e-9)
        assert row.relative_error == pytest.approx(relative, rel=1e-9)
        assert row.max_error == pytest.approx(largest, rel=1e-12)
    assert frame["layer"].dtype == "Int64" and set(frame["layer"]) == {0, 1}


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
@pytest.mark.parametrize("dims", [("out", "in"), ("in", "out"), ("x", "out", "in"), ("out", "x", "in")], ids=str)
def test_every_stored_dtype_in_every_orientation(tmp_path: Path, dtype: torch.dtype, dims: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    shape = (30, 70) if len(dims) == 2 else (3, 5, 70) if dims[0] == "x" else (5, 3, 70)
    stored = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    whole = stored.float().transpose(0, 1) if dims == ("out", "x", "in") else stored.float()
    path = write_safetensors(tmp_path / "model.safetensors", {"w": stored, "none": torch.zeros(0, 8, dtype=dtype)})
    roles = {"w": TensorRole("w", "w", 0, "linear", dims), "none": TensorRole("none", "none", 0, "linear", dims[-2:])}
    frame = weight_error(open_checkpoint(path), roles, FORMATS)
    assert list(frame["tensor"]) == ["w"] * len(NAMES)
    for row in frame.itertuples():
        sqnr, relative, largest = expected(whole, ("in", "out") if dims == ("in", "out") else dims, row.format)
        assert row.sqnr_db == pytest.approx(sqnr, rel=1e-9)
        assert row.relative_error == pytest.approx(relative, rel=1e-9)
        assert row.max_error == pytest.approx(largest, rel=1e-12)


def test_the_stored_orientation_matters(checkpoint: Checkpoint) -> None:
    name = "layers.0.conv1d.weight"
    wrong = {name: TensorRole(name, "conv1d", 0, "linear", ("out", "in"))}
    entry = [get_format("int8-row")]
    first, second = (weight_error(checkpoint, roles, entry)["sqnr_db"][0] for roles in ({name: ROLES[name]}, wrong))
    assert first != second


def test_threads_change_nothing_and_torch_gets_its_threads_back(checkpoint: Checkpoint) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        serial = weight_error(checkpoint, ROLES, FORMATS, executor=Serial())
        pd.testing.assert_frame_equal(
            serial, weight_error(checkpoint, ROLES, FORMATS, executor=Threads(3)), check_exact=True
        )
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("names", [["nf4", "int8-row", "int4-g64"], NAMES])
def test_one_pass_beside_the_statistics_gives_both_tables(
    checkpoint: Checkpoint, block_bytes: int, names: list[str]
) -> None:
    formats = [get_format(name) for name in names]
    errors = WeightErrors(checkpoint, ROLES, formats)
    options = StatOptions(block_bytes=block_bytes)
    statistics = measure_tensors(checkpoint, ROLES, options=options, executor=Threads(2), beside=errors)
    pd.testing.assert_frame_equal(statistics, measure_tensors(checkpoint, ROLES), check_exact=True)
    alone = weight_error(checkpoint, ROLES, formats, executor=Serial())
    pd.testing.assert_frame_equal(errors.table(), alone, check_exact=False, rtol=1e-12)


def test_progress_counts_bytes(checkpoint: Checkpoint) -> None:
    calls: list[tuple[str, int, int, str]] = []
    weight_error(checkpoint, ROLES, [get_format("nf4")], progress=lambda *call: calls.append(call))
    total = calls[0][2]
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    assert calls[-1] == ("weight error", total, total, "bytes") and len(calls) == 5


def test_better_formats_have_less_error(checkpoint: Checkpoint) -> None:
    frame = weight_error(checkpoint, ROLES, FORMATS)
    sqnr = frame[frame["tensor"] == "layers.0.up.weight"].set_index("format")["sqnr_db"]
    assert sqnr["int8-row"] > sqnr["int8-tensor"] > 30 > sqnr["int4-g32"] > sqnr["int4-g64"] > sqnr["int4-row"] > 10
    assert sqnr["nf4"] > sqnr["fp4"]


@pytest.mark.parametrize(
    ("value", "sqnr", "relative"),
    [(0.0, math.inf, 0.0), (math.nan, math.nan, math.nan), (math.inf, math.nan, math.nan)],
)
def test_weights_of_zeros_or_without_a_value(tmp_path: Path, value: float, sqnr: float, relative: float) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {"layers.0.up.weight": torch.full((8, 64), value)})
    frame = weight_error(open_checkpoint(path), ROLES, [get_format("int8-row"), get_format("int4-g64")])
    for row in frame.itertuples():
        assert row.sqnr_db == pytest.approx(sqnr, nan_ok=True)
        assert row.relative_error == pytest.approx(relative, nan_ok=True)


def test_nothing_linear_gives_an_empty_table(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {"embed.weight": torch.ones(4, 4)})
    frame = weight_error(open_checkpoint(path), ROLES, FORMATS)
    assert frame.empty and list(frame.columns) == [column.name for column in WEIGHT_ERROR_COLUMNS]


def test_matrices_are_views_in_out_in_order() -> None:
    stored = np.arange(24.0).reshape(2, 3, 4)
    found = list(matrices(stored, ("x", "in", "out")))
    assert [tuple(matrix.shape) for matrix in found] == [(4, 3), (4, 3)]
    np.testing.assert_array_equal(found[1], stored[1].T)
    found[0][0, 0] = -1
    assert stored[0, 0, 0] == -1
