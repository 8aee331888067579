"""Statistics of channels, heads and KV groups against numpy and scipy in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from stats_oracle import DTYPES, checkpoint_of, weights

from vrscope.arch.roles import HeadSplit, TensorRole, roles_from_names
from vrscope.errors import UnknownNameError
from vrscope.executors import Serial, Threads
from vrscope.stats.parts import CHANNEL_COLUMNS, HEAD_COLUMNS, measure_parts


def assert_part(row: pd.Series, values: np.ndarray) -> None:
    x = values.astype(np.float64).ravel()
    x = x[np.isfinite(x)]
    assert row["count"] == x.size
    for name, value in [
        ("mean", x.mean()),
        ("std", x.std()),
        ("absmax", np.abs(x).max()),
        ("kurtosis_excess", scipy.stats.kurtosis(x)),
        ("frobenius_norm", np.linalg.norm(x)),
    ]:
        assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name


def role(name: str, *dims: str, heads: tuple[HeadSplit, ...] = ()) -> TensorRole:
    return TensorRole(name, name, 2, "linear", dims, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_bytes", [1 << 20, 333])
def test_channels_are_rows_and_columns_of_the_weight(tmp_path: Path, dtype: str, block_bytes: int) -> None:
    stored = weights((23, 17), dtype)
    checkpoint = checkpoint_of(tmp_path, plain=stored, conv1d=stored, vector=stored[0], n=torch.arange(4))
    roles = {"plain": role("plain", "out", "in"), "conv1d": role("conv1d", "in", "out")}
    frame = measure_parts(checkpoint, roles, "channel", block_bytes=block_bytes)
    assert list(frame.columns) == [column.name for column in CHANNEL_COLUMNS]
    assert set(frame["tensor"]) == {"plain", "conv1d"}
    assert (frame["layer"] == 2).all()
    frame = frame.set_index(["tensor", "axis", "channel"])
    assert len(frame) == 2 * (23 + 17)
    values = stored.double().numpy()
    for name, weight in (("plain", values), ("conv1d", values.T)):
        for number, row in enumerate(weight):
            assert_part(frame.loc[(name, "out", number)], row)
        for number, column in enumerate(weight.T):
            assert_part(frame.loc[(name, "in", number)], column)


@pytest.mark.parametrize("block_bytes", [1 << 20, 120])
def test_channels_of_stacked_experts_count_on(tmp_path: Path, block_bytes: int) -> None:
    stored = weights((4, 6, 9), "BF16")
    checkpoint = checkpoint_of(tmp_path, w=stored)
    roles = {"w": role("w", "x", "out", "in")}
    frame = measure_parts(checkpoint, roles, "channel", block_bytes=block_bytes).set_index(["axis", "channel"])
    values = stored.double().numpy()
    for number, row in enumerate(values.reshape(24, 9)):
        assert_part(frame.loc[("out", number)], row)
    for number, column in enumerate(values.transpose(0, 2, 1).reshape(36, 6)):
        assert_part(frame.loc[("in", number)], column)


def test_channels_with_nan_and_constant_channels(tmp_path: Path) -> None:
    stored = weights((5, 6), "F16")
    stored[1, 2], stored[2], stored[3] = math.nan, math.inf, 0.5
    checkpoint = checkpoint_of(tmp_path, w=stored)
    frame = measure_parts(checkpoint, roles_from_names(checkpoint.tensors), "channel").set_index(["axis", "channel"])
    assert_part(frame.loc[("out", 1)], stored[1].double().numpy())
    assert frame.loc[("out", 2), "count"] == 0
    assert math.isnan(frame.loc[("out", 2), "absmax"])
    assert (frame.loc[("out", 3), "std"], frame.loc[("out", 3), "absmax"]) == (0, 0.5)
    assert math.isnan(frame.loc[("out", 3), "kurtosis_excess"])
    assert_part(frame.loc[("in", 2)], stored[:, 2].double().numpy())


@pytest.mark.parametrize("block_bytes", [1 << 20, 100])
def test_heads_and_groups_of_rows_columns_biases_and_fused_tensors(tmp_path: Path, block_bytes: int) -> None:
    heads = np.repeat(np.arange(4), 3)
    groups = np.repeat(np.arange(2), 3)
    none = np.full(6, -1)
    tensors = {
        "q": weights((12, 10), "BF16", 1),
        "k": weights((6, 10), "BF16", 2),
        "o": weights((10, 12), "BF16", 3),
        "bias": weights((12,), "F32", 4),
        "fused": weights((10, 24), "F32", 5),
        "stack": weights((3, 12, 5), "F32", 6),
        "other": weights((5, 5), "F32", 7),
    }
    roles = {
        "q": role("q", "out", "in", heads=(HeadSplit("q", "head", 4, 0, heads),)),
        "k": role("k", "out", "in", heads=(HeadSplit("k", "kv group", 2, 0, groups),)),
        "o": role("o", "out", "in", heads=(HeadSplit("attention", "head", 4, 1, heads),)),
        "bias": role("bias", "out", heads=(HeadSplit("q", "head", 4, 0, heads),)),
        "fused": role(
            "fused",
            "in",
            "out",
            heads=(
                HeadSplit("q", "head", 4, 1, np.concatenate([heads, none, none])),
                HeadSplit("k", "kv group", 2, 1, np.concatenate([none, none, groups, none])),
            ),
        ),
        "stack": role("stack", "x", "out", "in", heads=(HeadSplit("q", "head", 4, 1, heads),)),
    }
    checkpoint = checkpoint_of(tmp_path, **tensors)
    frame = measure_parts(checkpoint, roles, "head", block_bytes=block_bytes)
    assert list(frame.columns) == [column.name for column in HEAD_COLUMNS]
    assert len(frame) == 4 + 2 + 4 + 4 + 4 + 2 + 4
    for _, row in frame.iterrows():
        split = next(split for split in roles[row["tensor"]].heads if split.part == row["part"])
        assert row["unit"] == split.unit
        values = tensors[row["tensor"]].double().numpy()
        assert_part(row, np.take(values, np.flatnonzero(split.index == row["head"]), axis=split.dim))


def test_parts_do_not_depend_on_threads(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, a=weights((300, 50), "F32"), b=weights((70, 90), "BF16"))
    roles = roles_from_names(checkpoint.tensors)
    one, many = (
        measure_parts(checkpoint, roles, "channel", executor=executor, block_bytes=2000)
        for executor in (Serial(), Threads(3))
    )
    pd.testing.assert_frame_equal(one, many, check_exact=True)


def test_nothing_to_show_is_an_empty_table(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, w=weights((4, 4), "F32"), empty=torch.zeros(0, 4))
    frame = measure_parts(checkpoint, roles_from_names(checkpoint.tensors), "head")
    assert frame.empty
    assert list(frame.columns) == [column.name for column in HEAD_COLUMNS]
    channels = measure_parts(checkpoint, roles_from_names(checkpoint.tensors), "channel")
    assert list(channels[channels["tensor"] == "empty"]["count"]) == [0] * 4


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, w=weights((4, 4), "F32"))
    with pytest.raises(UnknownNameError, match=r"'heads'.*head"):
        measure_parts(checkpoint, {}, "heads")  # type: ignore[arg-type]
