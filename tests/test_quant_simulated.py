"""Simulated formats equal bitsandbytes, torch's fake quantization and plain numpy to the last bit, at any magnitude."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vrscope.quant.simulated import int4_per_group, int8_per_row, int8_per_tensor

Floats = NDArray[np.float32]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 150))
FILLS = st.sampled_from(["normal", "uniform", "positive", "negative", "sparse", "constant", "integers"])


def weight_of(shape: tuple[int, int], fill: str, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.standard_normal(shape),
        "uniform": rng.uniform(-1, 1, shape),
        "positive": rng.uniform(0.5, 1.0, shape),
        "negative": -rng.uniform(0.5, 1.0, shape),
        "sparse": rng.standard_normal(shape) * (rng.uniform(size=shape) < 0.05),
        "constant": np.full(shape, rng.standard_normal()),
        "integers": rng.integers(-30, 31, shape) / 4,  # many ties
    }[fill]
    return np.asarray(values * 0.02 if fill == "normal" else values, dtype=np.float32)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.int32), expected.view(torch.int32))


def groups_of(columns: int, group: int | None) -> list[slice]:
    size = group or columns
    return [slice(first, min(first + size, columns)) for first in range(0, columns, size)]


def int4_scales(part: Floats) -> tuple[Floats, Floats]:
    """Return scale and zero point of one group of every row, each `(rows, 1)`."""
    low = np.minimum(part.min(axis=1, keepdims=True), np.float32(0))
    high = np.maximum(part.max(axis=1, keepdims=True), np.float32(0))
    scale = (high - low) / np.float32(15)
    scale[scale == 0] = 1
    return scale, np.clip(np.rint(-low / scale), 0, 15)


def int4_oracle(weight: Floats, group: int | None) -> Floats:
    out = np.empty_like(weight)
    for columns in groups_of(weight.shape[1], group):
        part = weight[:, columns]
        scale, zero = int4_scales(part)
        codes = np.clip(np.rint(part / scale) + zero, 0, 15)
        out[:, columns] = (codes - zero) * scale
    assert out.dtype == np.float32
    return out


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shape=SHAPES, fill=FILLS, seed=st.integers(0, 2**20), half=st.booleans())
def test_int8_row_equals_bitsandbytes(shape: tuple[int, int], fill: str, seed: int, half: bool) -> None:
    weight = torch.from_numpy(weight_of(shape, fill, seed))
    if half:  # as LLM.int8 has it, which casts first
        weight = weight.to(torch.float16).float()
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16) if half else weight.clone())
    assert same_bits(int8_per_row(weight), functional.int8_vectorwise_dequant(codes, absmax))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=SHAPES, fill=FILLS, seed=st.integers(0, 2**20))
def test_int8_tensor_equals_bitsandbytes_on_one_long_row(shape: tuple[int, int], fill: str, seed: int) -> None:
    weight = torch.from_numpy(weight_of(shape, fill, seed))
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.reshape(1, -1).clone())
    expected = functional.int8_vectorwise_dequant(codes, absmax).reshape(shape)
    assert same_bits(int8_per_tensor(weight), expected)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(shape=SHAPES, group=st.sampled_from([1, 2, 7, 32, 64, 128, None]), fill=FILLS, seed=st.integers(0, 2**20))
def test_int4_equals_numpy(shape: tuple[int, int], group: int | None, fill: str, seed: int) -> None:
    weight = weight_of(shape, fill, seed)
    found = int4_per_group(torch.from_numpy(weight), group)
    assert same_bits(found + 0.0, torch.from_numpy(int4_oracle(weight, group)) + 0.0)


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("fill", ["normal", "uniform", "positive", "negative", "sparse", "constant"])
def test_int4_equals_torch_fake_quantization(group: int | None, fill: str) -> None:
    weight = weight_of((48, 300), fill, 9)
    found = int4_per_group(torch.from_numpy(weight), group)
    for columns in groups_of(300, group):
        part = np.ascontiguousarray(weight[:, columns])
        scale, zero = int4_scales(part)
        expected = torch.fake_quantize_per_channel_affine(
            torch.from_numpy(part),
            torch.from_numpy(scale[:, 0]),
            torch.from_numpy(zero[:, 0].astype(np.int32)),
            0,
            0,
            15,
        )
        assert same_bits(found[:, columns].contiguous() + 0.0, expected + 0.0)


def test_codes_stay_in_range_and_zero_is_exact() -> None:
    weight = torch.from_numpy(weight_of((64, 64), "uniform", 11))
    weight[:, 3] = 0.0
    found = int4_per_group(weight, 64)
    assert torch.equal(found[:, 3], weight[:, 3])
    assert max(len(row.unique()) for row in found) <= 16
    assert max(len(row.unique()) for row in int8_per_row(weight.repeat(1, 20))) <= 255


def test_int4_rounds_half_to_even() -> None:
    # Range -0..15, so scale 1 and zero point 0: 0.5, 1.5, 2.5 are ties.
    weight = torch.tensor([[0.5, 1.5, 2.5, 15.0]])
    assert int4_per_group(weight, None).tolist() == [[0.0, 2.0, 2.0, 15.0]]


@pytest.mark.parametrize("magnitude", [1e-38, 1e-36, 1e-20, 1.0, 1e20, 1e36, 1e38, 3e38])
@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
@pytest.mark.parametrize("method", ["int8-row", "int8-tensor", "int4"])
def test_the_ends_of_float32_are_as_accurate_as_the_middle(magnitude: float, sign: str, method: str) -> None:
    rng = np.random.default_rng(13)
    unit = rng.uniform(-1 if sign != "positive" else 0, 1 if sign != "negative" else 0, (6, 100))
    unit[0] = np.abs(unit).max() * np.sign(unit[0] if sign == "both" else unit.sum())  # a row of constant magnitude
    weight = (unit * magnitude).astype(np.float32)
    rounded = {
        "int8-row": int8_per_row,
        "int8-tensor": int8_per_tensor,
        "int4": lambda tensor: int4_per_group(tensor, 64),
    }[method](torch.from_numpy(weight))
    wide = weight.astype(np.float64)
    low, high = np.minimum(wide, 0), np.maximum(wide, 0)
    step = np.empty_like(wide)
    if method == "int4":
        for columns in groups_of(100, 64):
            reach = high[:, columns].max(axis=1, keepdims=True) - low[:, columns].min(axis=1, keepdims=True)
            step[:, columns] = reach / 15
    else:
        step[:] = np.abs(wide).max(axis=1 if method == "int8-row" else None, keepdims=True) / 127
    error = np.abs(rounded.numpy().astype(np.float64) - wide)
    # Half a step, or up to a whole one at an end that the integer zero point cut off; plus float32's own grid.
    allowed = step * (1.0 if method == "int4" and sign == "both" else 0.5) + 1e-6 * step * 127 + 2e-45
    assert np.isfinite(rounded.numpy()).all()
    assert (error <= allowed).all()
    assert error.max() >= step.max() / 10


def test_rows_of_very_different_magnitude_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(17)
    weight = torch.from_numpy(rng.standard_normal((3, 64)).astype(np.float32))
    mixed = weight * torch.tensor([[2.0**-120], [1.0], [2.0**120]])
    for roundtrip in (int8_per_row, lambda tensor: int4_per_group(tensor, 32)):
        assert same_bits(roundtrip(mixed)[1:2], roundtrip(weight)[1:2])
        assert same_bits(roundtrip(mixed)[2:], roundtrip(weight)[2:] * 2.0**120)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_group_only(bad: float) -> None:
    weight = torch.from_numpy(weight_of((4, 128), "normal", 19))
    weight[1, 70] = bad
    found = int4_per_group(weight, 64)
    clean = weight.clone()
    clean[1, 70] = 0.0
    expected = int4_per_group(clean, 64)
    assert same_bits(found[[0, 2, 3]], expected[[0, 2, 3]]) and same_bits(found[1, :64], expected[1, :64])
    assert found[1, 64:].isnan().any()
    assert int8_per_row(weight)[1].isnan().any() and same_bits(int8_per_row(weight)[2], int8_per_row(clean)[2])
