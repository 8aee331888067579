"""Statistics of whole tensors against numpy and scipy in float64, whatever the dtype, shape, block or thread."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stats_oracle import DTYPES, EXACT, QUANTILES, checkpoint_of, oracle, spread, weights

from vrscope.arch.roles import TensorRole, roles_from_names
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.executors import Serial, Threads
from vrscope.stats.measure import (
    HISTOGRAM_COLUMNS,
    TENSOR_COLUMNS,
    StatOptions,
    histograms,
    measure_tensors,
    tensor_columns,
)
from vrscope.stats.statistics import SPECTRAL_STATISTICS, STATISTICS
from vrscope.tables import Report, from_json, to_json

SHAPES = [(), (1,), (7,), (5000,), (40, 33), (300, 1), (1, 300), (3, 20, 17), (9000, 3)]
CONTRACT = (
    "tensor role layer kind dtype shape count size_bytes mean std variance skewness kurtosis_excess absmax abs_q50 "
    "abs_q99 abs_q999 abs_q9999 outlier_share_4sigma outlier_share_6sigma zero_share nan_count inf_count "
    "row_absmax_spread column_absmax_spread frobenius_norm tvr_ratio"
)


def measure(checkpoint: Checkpoint, block_bytes: int = 1 << 20, **roles: TensorRole) -> pd.DataFrame:
    frame = measure_tensors(
        checkpoint, {**roles_from_names(checkpoint.tensors), **roles}, options=StatOptions(block_bytes=block_bytes)
    )
    return frame.set_index("tensor")


def assert_row(row: pd.Series, tensor: torch.Tensor, dtype: str) -> None:
    expected = oracle(tensor)
    for name, value in expected.items():
        tolerance = {"rel": 1e-6, "abs": 1e-300}
        if name in QUANTILES and dtype not in EXACT:
            tolerance = {"rel": 0.01, "abs": 2.0**-134}  # the width of the bins of subnormal F32
        if name == "mean":  # a mean near 0 is a difference of large sums in the oracle too
            tolerance["abs"] = 1e-12 * expected["std"] if expected["std"] > 0 else 1e-300
        if name in ("skewness", "kurtosis_excess"):
            tolerance["abs"] = 1e-9
        assert row[name] == pytest.approx(value, **tolerance, nan_ok=True), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_those_of_numpy_and_scipy(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = weights(shape, dtype, seed=len(shape))
    row = measure(checkpoint_of(tmp_path, w=tensor)).loc["w"]
    assert_row(row, tensor, dtype)
    assert (row["count"], row["dtype"], row["size_bytes"]) == (tensor.numel(), dtype, tensor.nbytes)
    assert row["shape"] == ("x".join(map(str, shape)) or "scalar")
    if len(shape) < 2:
        assert math.isnan(row["row_absmax_spread"])
        assert math.isnan(row["column_absmax_spread"])
    else:
        matrix = tensor.to(torch.float64).abs().numpy().reshape(shape[0], -1)
        assert row["row_absmax_spread"] == pytest.approx(spread(matrix.max(axis=1)), rel=1e-6)
        assert row["column_absmax_spread"] == pytest.approx(spread(matrix.max(axis=0)), rel=1e-6)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("scale", "shift"), [(1e-30, 0.0), (1e30, 0.0), (1e-41, 0.0), (1.0, 1000.0), (1e-30, 1e-27), (1e25, -1e28)]
)
def test_scales_and_means_that_break_naive_sums(tmp_path: Path, dtype: str, scale: float, shift: float) -> None:
    tensor = weights((60, 200), dtype, scale=scale, shift=shift)
    if shift:  # no zeros here: they would widen the distribution to the size of its mean
        tensor = torch.where(tensor == 0, torch.as_tensor(shift, dtype=tensor.dtype), tensor)
    assert_row(measure(checkpoint_of(tmp_path, w=tensor)).loc["w"], tensor, dtype)


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_f64_moments_survive_what_overflows_in_scipy(tmp_path: Path, scale: float) -> None:
    plain = weights((50, 50), "F64")
    frame = measure(checkpoint_of(tmp_path, plain=plain, scaled=plain * scale))
    for name in ("skewness", "kurtosis_excess", "zero_share", "row_absmax_spread", "outlier_share_4sigma"):
        assert frame.loc["scaled", name] == pytest.approx(frame.loc["plain", name], rel=1e-9), name
    for name in ("std", "absmax", "frobenius_norm"):
        assert frame.loc["scaled", name] / scale == pytest.approx(frame.loc["plain", name], rel=1e-9), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_counted_and_left_out(tmp_path: Path, dtype: str) -> None:
    tensor = weights((30, 40), dtype).to(torch.float64)
    tensor[3, 5] = tensor[7] = tensor[:, 9] = math.nan
    if dtype != "F8_E4M3":  # which has no infinity
        tensor[0, 0], tensor[1, 1] = math.inf, -math.inf
    tensor = tensor.to(DTYPES[dtype])
    row = measure(checkpoint_of(tmp_path, w=tensor)).loc["w"]
    assert_row(row, tensor, dtype)
    assert row["inf_count"] == (0 if dtype == "F8_E4M3" else 2)
    plain = tensor.to(torch.float64).abs().numpy()
    finite = np.where(np.isfinite(plain), plain, -1.0)
    rows, columns = finite.max(axis=1), finite.max(axis=0)
    assert row["row_absmax_spread"] == pytest.approx(spread(rows[rows >= 0]), rel=1e-6)
    assert row["column_absmax_spread"] == pytest.approx(spread(columns[columns >= 0]), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
def test_constant_weights_have_no_spread_and_no_shape(tmp_path: Path, dtype: str, value: float) -> None:
    tensor = torch.full((70, 90), value, dtype=torch.float64).to(DTYPES[dtype])
    row = measure(checkpoint_of(tmp_path, w=tensor)).loc["w"]
    stored = float(tensor[0, 0])
    assert (row["mean"], row["std"], row["variance"], row["absmax"]) == (stored, 0, 0, abs(stored))
    assert math.isnan(row["skewness"])
    assert math.isnan(row["kurtosis_excess"])
    assert (row["outlier_share_4sigma"], row["zero_share"]) == (0, float(value == 0))
    assert row["abs_q99"] == pytest.approx(abs(stored), rel=0 if dtype in EXACT else 0.01)
    assert row["row_absmax_spread"] == pytest.approx(math.nan if value == 0 else 1.0, nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_a_tensor_without_elements_is_listed(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    frame = measure(checkpoint_of(tmp_path, w=torch.zeros(shape, dtype=DTYPES[dtype]), z=weights((4, 4), dtype)))
    row = frame.loc["w"]
    assert (row["count"], row["nan_count"], row["inf_count"], row["frobenius_norm"]) == (0, 0, 0, 0)
    for name in ("mean", "std", "kurtosis_excess", "absmax", "abs_q50", "zero_share", "row_absmax_spread", "tvr_ratio"):
        assert math.isnan(row[name]), name
    assert frame.loc["z", "std"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_without_finite_weights_is_listed(tmp_path: Path, dtype: str) -> None:
    row = measure(checkpoint_of(tmp_path, w=torch.full((3, 4), math.nan).to(DTYPES[dtype]))).loc["w"]
    assert (row["count"], row["nan_count"], row["frobenius_norm"]) == (12, 12, 0)
    for name in ("mean", "std", "absmax", "abs_q50", "outlier_share_4sigma", "zero_share", "column_absmax_spread"):
        assert math.isnan(row[name]), name


def test_integer_tensors_are_listed_and_not_analysed(tmp_path: Path) -> None:
    row = measure(checkpoint_of(tmp_path, ids=torch.arange(6).reshape(2, 3), w=weights((4, 4), "F32"))).loc["ids"]
    assert (row["dtype"], row["shape"], row["count"], row["size_bytes"]) == ("I64", "2x3", 6, 48)
    assert row[[statistic.name for statistic in STATISTICS]].isna().all()


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E5M2"])
def test_results_do_not_depend_on_blocks_or_threads(tmp_path: Path, dtype: str) -> None:
    checkpoint = checkpoint_of(
        tmp_path,
        matrix=weights((700, 37), dtype, 1),
        vector=weights((30_000,), dtype, 2),
        thin=weights((20_000, 1), dtype, 3),
        wide=weights((2, 9_001), dtype, 4),
        stack=weights((5, 30, 41), dtype, 5),
        scalar=weights((), dtype, 6),
    )
    stack = TensorRole("stack", "experts", 0, "linear", ("x", "out", "in"))
    roles = {**roles_from_names(checkpoint.tensors), "stack": stack}
    tables = [
        measure_tensors(checkpoint, roles, options=StatOptions(block_bytes=size), executor=executor)
        for size, executor in [
            (1 << 20, Serial()),
            (1 << 20, Threads(3)),
            (1_000, Serial()),
            (5_003, Threads(2)),
            (4096 * 8, Threads(4)),
        ]
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)


def test_rows_and_columns_follow_the_declared_dimensions(tmp_path: Path) -> None:
    stored = weights((3, 20, 30), "F32")
    checkpoint = checkpoint_of(tmp_path, conv1d=stored[0], experts=stored, turned=stored, table=stored[1])

    def role(name: str, *dims: str) -> TensorRole:
        return TensorRole(name, name, 0, "linear", dims)

    frame = measure(
        checkpoint,
        block_bytes=3000,
        conv1d=role("conv1d", "in", "out"),
        experts=role("experts", "x", "out", "in"),
        turned=role("turned", "x", "in", "out"),
        table=TensorRole("table", "table", None, "embed", ("vocabulary", "out")),
    )
    magnitudes = stored.abs().double().numpy()
    rows, columns = magnitudes.max(axis=2), magnitudes.max(axis=1)
    for name, out, into in [
        ("conv1d", columns[0], rows[0]),
        ("experts", rows.ravel(), columns.ravel()),
        ("turned", columns.ravel(), rows.ravel()),
        ("table", columns[1], rows[1]),
    ]:
        assert frame.loc[name, "row_absmax_spread"] == pytest.approx(spread(out), rel=1e-6), name
        assert frame.loc[name, "column_absmax_spread"] == pytest.approx(spread(into), rel=1e-6), name


@pytest.mark.parametrize("shape", [(2500,), (500, 2000)])
def test_outliers_of_weights_within_few_bins_are_counted_again(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = weights(shape, "F32", scale=0.001)
    tensor = torch.where(tensor == 0, 0.001, tensor) + 1.0  # all within a few bins
    assert_row(measure(checkpoint_of(tmp_path, w=tensor)).loc["w"], tensor, "F32")


def test_the_target_of_the_tvr_ratio_can_be_set(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, w=weights((10, 10), "BF16"))
    frame = measure_tensors(checkpoint, roles_from_names(checkpoint.tensors), options=StatOptions(target_std=0.5))
    assert frame["tvr_ratio"][0] == frame["std"][0] / 0.5


def test_columns_are_those_of_the_contract_and_all_are_described(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, w=weights((10, 10), "BF16"), n=torch.arange(3))
    for spectrum in (False, True):
        options = StatOptions(spectrum=spectrum)
        frame = measure_tensors(checkpoint, roles_from_names(checkpoint.tensors), options=options)
        assert list(frame.columns) == [column.name for column in tensor_columns(options)]
        extra = [statistic.name for statistic in SPECTRAL_STATISTICS] if spectrum else []
        assert " ".join(frame.columns) == " ".join([CONTRACT, *extra])
    for column in (*tensor_columns(options), *HISTOGRAM_COLUMNS):
        assert column.meaning.endswith("."), column.name
    assert len({column.name for column in TENSOR_COLUMNS}) == len(TENSOR_COLUMNS)


def test_the_table_survives_csv_and_json(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, **{"layers.0.w": weights((10, 10), "BF16"), "n": torch.arange(3)})
    frame = measure_tensors(checkpoint, roles_from_names(checkpoint.tensors))
    again = from_json(to_json(Report("analyze", {}, (), {"tensors": frame}, {"tensors": TENSOR_COLUMNS})))
    assert again.tables["tensors"]["std"][0] == frame["std"][0]
    assert again.tables["tensors"]["layer"][0] == 0
    assert pd.isna(again.tables["tensors"]["layer"][1])
    frame.to_csv(tmp_path / "tensors.csv", index=False)
    read = pd.read_csv(tmp_path / "tensors.csv")
    assert " ".join(read.columns) == CONTRACT
    assert read["kurtosis_excess"][0] == frame["kurtosis_excess"][0]


def test_progress_counts_bytes_to_the_total(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, a=weights((100, 10), "F32"), n=torch.arange(3), b=weights((5,), "BF16"))
    seen: list[tuple[str, int, int, str]] = []
    measure_tensors(checkpoint, {}, options=StatOptions(block_bytes=400), progress=lambda *step: seen.append(step))
    assert [step[1] for step in seen] == [*range(400, 4001, 400), 4010]
    assert {(stage, total, unit) for stage, _, total, unit in seen} == {("statistics", 4010, "bytes")}


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_histograms_are_in_standard_deviations_from_the_mean(tmp_path: Path, dtype: str) -> None:
    tensor = weights((100, 200), dtype, scale=3.0, shift=5.0)
    checkpoint = checkpoint_of(tmp_path, w=tensor, flat=torch.ones(9).to(DTYPES[dtype]), n=torch.arange(4))
    table = histograms(checkpoint, ["w", "n", "flat"]).set_index("tensor")
    assert list(table.index) == ["w", "flat"]
    assert list(table.reset_index().columns) == [column.name for column in HISTOGRAM_COLUMNS]
    edges, counts = table.loc["w", "edges"], table.loc["w", "counts"]
    plain = tensor.double().numpy().ravel()
    expected = np.histogram((plain - plain.mean()) / plain.std(), edges)[0]
    assert (edges[0], edges[-1], len(counts)) == (-8.0, 8.0, 101)
    total = sum(counts) + table.loc["w", "below_count"] + table.loc["w", "above_count"]
    assert total == plain.size
    if dtype in EXACT:
        assert np.abs(np.asarray(counts) - expected).max() <= 1  # a value may lie on an edge
    else:
        assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 0.003 * plain.size
    assert table.loc["flat", "counts"][50] == 9
    assert sum(table.loc["flat", "counts"]) == 9


def chosen(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    return dataclasses.replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in names})


@pytest.mark.real
def test_real_bf16_weights(smollm2: Path) -> None:
    checkpoint = chosen(
        open_checkpoint(smollm2),
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.12.mlp.down_proj.weight",
        "model.layers.29.input_layernorm.weight",
    )
    frame = measure_tensors(checkpoint, roles_from_names(checkpoint.tensors), executor=Threads(2)).set_index("tensor")
    for name in checkpoint.tensors:
        assert_row(frame.loc[name], checkpoint.read(name), "BF16")
    assert dict(frame["layer"]) == {name: int(name.split(".")[2]) for name in checkpoint.tensors}


@pytest.mark.real
def test_real_f32_weights(minilm: Path) -> None:
    checkpoint = chosen(
        open_checkpoint(minilm),
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.5.intermediate.dense.weight",
        "encoder.layer.3.output.LayerNorm.bias",
    )
    frame = measure_tensors(checkpoint, roles_from_names(checkpoint.tensors), executor=Threads(2)).set_index("tensor")
    for name in checkpoint.tensors:
        assert_row(frame.loc[name], checkpoint.read(name), "F32")
