"""Scaling blocks: exact against ldexp for every type, and refusal at the edges of their ranges."""

import numpy as np
import pytest
import torch
from builders import write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from vrscope.checkpoint.source import RowBlock, TensorInfo, open_checkpoint
from vrscope.errors import CheckpointError, PlanError
from vrscope.rescale.scaling import TensorScale, require_finite, scale_block, scaled_bits

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def info_of(values, dtype):
    size = values.numel() * values.element_size()
    return TensorInfo("w", dtype, tuple(values.shape), "model.safetensors", 0, size)


def scaled(values, dtype, *exponents):
    matrix = values.reshape(values.shape[0], -1) if values.ndim > 1 else values.reshape(1, -1)
    return scale_block(info_of(values, dtype), RowBlock(0, matrix), TensorScale(tuple(exponents)))


@pytest.mark.parametrize("dtype", TYPES)
def test_exponents_shift_exactly_like_ldexp(dtype):
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.uniform(1, 4, (48, 40)) * generator.choice([-1, 1], (48, 40))).to(TYPES[dtype])
    values[0, 0] = 0.0
    values[1, 1] = -0.0
    rows, columns = generator.integers(-2, 2, (48, 1)), generator.integers(-1, 3, (1, 40))
    after = scaled(values, dtype, rows, columns).double().numpy()
    expected = np.ldexp(values.double().numpy(), (rows + columns).astype(np.int32))
    assert np.array_equal(after.view(np.int64), expected.view(np.int64))
    assert scaled(values, dtype, rows).dtype == TYPES[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("far", [5000, 20000, 2**17, 2**33])
def test_far_exponents_that_cancel_leave_the_bits(dtype, far):
    """Wider than the narrow numbers that near exponents are added in."""
    values = torch.linspace(1.0, 1.75, 40).reshape(4, 10).to(TYPES[dtype])
    after = scaled(values, dtype, np.full((4, 1), far), np.full((1, 10), -far))
    assert torch.equal(after.view(torch.uint8), values.view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TYPES)), st.integers(0, 2**32), st.integers(-12, 12))
def test_any_bits_are_scaled_exactly_or_refused(dtype, seed, exponent):
    """Random bit patterns of every type: the result is the exact product, or an error; never a silent change."""
    kind = TYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, 8 * kind.itemsize, np.uint8)
    values = torch.from_numpy(raw).view(kind).reshape(2, 4)
    values = torch.where(torch.isfinite(values.double()), values.double(), 1.0).to(kind)
    with np.errstate(over="ignore"):
        exact = np.ldexp(values.double().numpy(), exponent)
    tiny, largest = torch.finfo(kind).smallest_normal, torch.finfo(kind).max
    try:
        after = scaled(values, dtype, np.full((2, 1), exponent)).double().numpy()
    except PlanError:
        before = np.abs(values.double().numpy())
        assert ((np.abs(exact) > largest) | ((np.abs(exact) < tiny) & (exact != 0) & (before >= 0))).any()
    else:
        assert np.array_equal(after.view(np.int64), exact.view(np.int64))


@pytest.mark.parametrize(
    ("dtype", "value", "exponent"),
    [
        ("BF16", 2.0**-126, -1),  # would become subnormal, though it could be stored
        ("BF16", 2.0**127, 1),
        ("F16", 2.0**-14, -1),
        ("F16", 40000.0, 1),
        ("F32", 2.0**-126, -1),
        ("F8_E4M3", 240.0, 1),
        ("F8_E5M2", 2.0**-14, -1),
    ],
)
def test_leaving_the_normal_range_is_refused(dtype, value, exponent):
    values = torch.full((2, 2), value, dtype=torch.float64).to(TYPES[dtype])
    with pytest.raises(PlanError, match="normal range"):
        scaled(values, dtype, np.full((2, 1), exponent))


def test_subnormals_may_grow():
    values = torch.full((1, 3), 2.0**-20, dtype=torch.float16)  # subnormal
    assert torch.equal(scaled(values, "F16", np.full((1, 1), 4)), torch.full((1, 3), 2.0**-16, dtype=torch.float16))


def test_vectors_stacks_and_windows():
    vector = torch.arange(1.0, 9.0)
    cut = RowBlock(0, vector[3:6].reshape(1, -1), first_column=3)
    out = scale_block(info_of(vector, "F32"), cut, TensorScale((np.arange(8),)))
    assert out.reshape(-1).tolist() == [4 * 2**3, 5 * 2**4, 6 * 2**5]
    stack = torch.ones(3, 2, 4)
    per_expert = np.arange(3 * 4).reshape(3, 1, 4)
    block = RowBlock(1, stack[1:].reshape(2, -1))
    out = scale_block(info_of(stack, "F32"), block, TensorScale((per_expert,)))
    assert np.array_equal(out.reshape(2, 2, 4).numpy(), np.ldexp(np.ones((2, 2, 4)), per_expert[1:].astype(np.int32)))


def test_gains_stored_minus_one():
    gains = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    scale = TensorScale(factors=(np.array([2.0, 4.0, 0.5]),), one_plus=True)
    out = scale_block(info_of(gains, "F64"), RowBlock(0, gains.reshape(1, -1)), scale)
    assert out.reshape(-1).tolist() == [1.5 * 2 - 1, 0.75 * 4 - 1, 2.0 * 0.5 - 1]


def test_free_factors_are_rounded_once():
    values = torch.linspace(0.1, 3, 64).to(torch.bfloat16).reshape(4, 16)
    factors = (np.linspace(0.3, 1.7, 4).reshape(4, 1), np.linspace(0.5, 2, 16).reshape(1, 16))
    out = scale_block(info_of(values, "BF16"), RowBlock(0, values), TensorScale(factors=factors))
    exact = values.double().numpy() * factors[0] * factors[1]
    assert np.all(np.abs(out.double().numpy() - exact) <= np.abs(exact) * 2.0**-8)
    half = torch.full((1, 2), 6e4, dtype=torch.float16)
    with pytest.raises(PlanError, match="overflows F16"):
        scale_block(info_of(half, "F16"), RowBlock(0, half), TensorScale(factors=(np.full((1, 1), 3.0),)))


@pytest.mark.parametrize("dtype", TYPES)
def test_not_a_number_is_refused_with_the_tensor_named(tmp_path, dtype):
    values = torch.ones(3, 4).to(TYPES[dtype])
    require_finite(info_of(values, dtype), RowBlock(0, values))
    values = torch.where(torch.eye(3, 4) > 0, torch.nan, 1.0).to(TYPES[dtype])
    checkpoint = open_checkpoint(write_safetensors(tmp_path / "model.safetensors", {"some.weight": values}))
    (block,) = checkpoint.row_blocks("some.weight")
    with pytest.raises(CheckpointError, match=r"some\.weight"):
        require_finite(checkpoint.tensors["some.weight"], block)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exponent", [-3, 0, 2])
@pytest.mark.parametrize("last", ["bits", "rows", "factors"])
def test_scaling_refuses_what_is_not_finite_however_it_moves(tmp_path, dtype, exponent, last):
    """Infinity must not become a number when its exponent falls, nor pass where it stays."""
    worst = [torch.nan] if dtype == "F8_E4M3" else [torch.nan, torch.inf, -torch.inf]
    for value in worst:
        values = torch.ones(3, 4)
        values[2, 3] = value
        info = info_of(values.to(TYPES[dtype]), dtype)
        path = write_safetensors(tmp_path / "model.safetensors", {"w": values.to(TYPES[dtype])})
        checkpoint = open_checkpoint(path)
        (place,) = checkpoint.block_places("w")
        scale = {
            "bits": TensorScale((np.full((1, 4), exponent),)),
            "rows": TensorScale((np.array([[1], [1], [exponent]]),)),
            "factors": TensorScale(factors=(np.full((1, 1), 2.0**exponent),)),
        }[last]
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            scaled_bits(info, checkpoint.read_stored(place), scale)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_negative_scale_turns_every_sign_also_of_zero(dtype):
    generator = np.random.default_rng(1)
    values = torch.from_numpy(generator.uniform(1, 4, (12, 10)) * generator.choice([-1, 1], (12, 10))).to(TYPES[dtype])
    values[0, 0], values[1, 1] = 0.0, -0.0
    rows, columns = generator.random((12, 1)) < 0.5, generator.random((1, 10)) < 0.5
    for exponents in (np.zeros((12, 1), np.int64), np.ones((12, 10), np.int64)):  # bits alone, and multiplied
        scale = TensorScale((exponents,), negative=(rows, columns))
        after = scale_block(info_of(values, dtype), RowBlock(0, values), scale).double().numpy()
        expected = np.ldexp(values.double().numpy(), exponents.astype(np.int32)) * np.where(rows ^ columns, -1.0, 1.0)
        assert np.array_equal(after.view(np.int64), expected.view(np.int64))
