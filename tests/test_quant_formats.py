"""The table of formats, and the law every entry has to obey: a factor constant over a scale block changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrscope.errors import UnknownNameError
from vrscope.quant import roundtrip
from vrscope.quant.formats import FORMATS, Format, ScaleScope, get_format

CASES = pytest.mark.parametrize("entry", FORMATS, ids=[entry.name for entry in FORMATS])
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 200))
FILLS = st.sampled_from(["normal", "heavy", "positive", "negative", "sparse", "constant"])


def weight_of(entry: Format, shape: tuple[int, int], fill: str, seed: int) -> torch.Tensor:
    """Return a float32 weight; for `int8` with entries that stay normal numbers in float16, which it casts to."""
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.standard_normal(shape),
        "heavy": rng.standard_t(2, shape),
        "positive": rng.uniform(0.5, 1.0, shape),
        "negative": -rng.uniform(0.0, 1.0, shape),
        "sparse": rng.standard_normal(shape) * (rng.uniform(size=shape) < 0.1),
        "constant": np.full(shape, rng.standard_normal()),
    }[fill]
    if entry.name == "int8":
        values = np.where(values == 0, 0, np.sign(values) * np.clip(np.abs(values), 0.05, 50))
    return torch.from_numpy(values.astype(np.float32))


def per_block(
    scope: ScaleScope, shape: tuple[int, int], draw: np.random.Generator, low: float, high: float
) -> torch.Tensor:
    """Return exponents `(out, in)`, real numbers in low..high, constant over each scale block and free otherwise."""
    rows, columns = shape
    if scope.kind == "tensor" or scope.nested:
        values = np.broadcast_to(draw.uniform(low, high), shape)
    elif scope.kind == "row":
        values = np.broadcast_to(draw.uniform(low, high, (rows, 1)), shape)
    elif scope.kind == "group":
        groups = -(-columns // scope.size)
        values = np.repeat(draw.uniform(low, high, (rows, groups)), scope.size, axis=1)[:, :columns]
    else:
        blocks = -(-rows * columns // scope.size)
        values = np.repeat(draw.uniform(low, high, blocks), scope.size)[: rows * columns].reshape(shape)
    return torch.from_numpy(values.copy())


def relative_error(entry: Format, weight: torch.Tensor) -> float:
    return float((entry.roundtrip(weight) - weight).double().norm() / weight.double().norm())


def test_entries_are_complete() -> None:
    assert [entry.name for entry in FORMATS] == [
        "int8",
        "w8a8",
        "int8-row",
        "int8-tensor",
        "nf4",
        "nf4-dq",
        "fp4",
        "int4-g32",
        "int4-g64",
        "int4-g128",
        "int4-row",
    ]
    for entry in FORMATS:
        assert entry.meaning.endswith(".") and not entry.meaning[0].islower()
        assert (entry.scope.size is not None) == (entry.scope.kind in {"group", "block"})
        assert 4 <= entry.bits_per_weight < 6 or entry.bits_per_weight == 8
    assert [entry.name for entry in FORMATS if entry.activations] == ["int8", "w8a8"]
    assert [entry.name for entry in FORMATS if entry.replaces_layers] == ["int8"]
    assert [entry.name for entry in FORMATS if entry.scope.nested] == ["nf4-dq"]


def test_an_unknown_name_suggests_the_nearest() -> None:
    assert get_format("nf4").scope == ScaleScope("block", 64)
    with pytest.raises(UnknownNameError, match=r"unknown format 'int4-g46'.*mean 'int4-g64'.*nf4-dq"):
        get_format("int4-g46")


@CASES
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=SHAPES, fill=FILLS, seed=st.integers(0, 2**20))
def test_powers_of_two_per_scale_block_are_exact(entry: Format, shape: tuple[int, int], fill: str, seed: int) -> None:
    weight = weight_of(entry, shape, fill, seed)
    span = 4 if entry.name == "int8" else 20
    exponents = per_block(entry.scope, shape, np.random.default_rng(seed), -span, span).round()
    factors = torch.exp2(exponents).float()
    expected = entry.roundtrip(weight) * factors
    found = entry.roundtrip(weight * factors)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@CASES
@pytest.mark.parametrize("shape", [(64, 192), (33, 130)], ids=str)
def test_real_factors_per_scale_block_leave_the_relative_error_alone(entry: Format, shape: tuple[int, int]) -> None:
    weight = weight_of(entry, shape, "normal", 3)
    factors = torch.exp2(per_block(entry.scope, shape, np.random.default_rng(4), -0.1, 0.1)).float()
    scaled = weight * factors
    error = float(((entry.roundtrip(scaled) - scaled) / factors).double().norm() / weight.double().norm())
    assert error / relative_error(entry, weight) == pytest.approx(1.0, abs=1e-3)


@CASES
def test_factors_that_vary_inside_a_scale_block_are_felt(entry: Format) -> None:
    weight = weight_of(entry, (32, 256), "normal", 5)
    factors = torch.exp2(torch.arange(256.0) % 3)
    assert not torch.equal(entry.roundtrip(weight * factors), entry.roundtrip(weight) * factors)
    assert entry.scope.feels(np.ones(32), factors.numpy())


@CASES
def test_odd_formats_round_minus_a_weight_to_minus_what_it_rounds_to(entry: Format) -> None:
    """The others do not for some weight: one of equal extremes, or with values on the bounds between codes."""
    bounds = torch.tensor(roundtrip.codebook("fp4")[1])
    edge = torch.cat([torch.tensor([1.0, -1.0]), bounds, torch.zeros(64 - 2 - len(bounds))]).repeat(64, 2)
    even = torch.tensor([7.5, -7.5]).repeat(64, 64)  # whose zero point lies halfway between two integers
    plain = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    same = [torch.equal(entry.roundtrip(-weight), -entry.roundtrip(weight)) for weight in (edge, even, plain)]
    assert all(same) if entry.odd else not all(same[:2])


def test_double_quantization_feels_factors_of_single_blocks_and_plain_nf4_does_not() -> None:
    weight = weight_of(get_format("nf4"), (64, 256), "normal", 6)
    factors = torch.exp2(torch.arange(64.0) % 3)[:, None].expand(64, 256)
    for name, blind in (("nf4", True), ("nf4-dq", False)):
        entry = get_format(name)
        assert torch.equal(entry.roundtrip(weight * factors), entry.roundtrip(weight) * factors) == blind
        assert entry.scope.feels(factors[:, 0].numpy(), np.ones(256)) != blind


def test_llm_int8_feels_what_float16_cannot_hold() -> None:
    weight = weight_of(get_format("int8-row"), (8, 64), "normal", 7)
    for name, blind in (("int8-row", True), ("int8", False)):
        entry = get_format(name)
        assert torch.equal(entry.roundtrip(weight * 2.0**-20), entry.roundtrip(weight) * 2.0**-20) == blind


@CASES
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 6), st.sampled_from([1, 5, 32, 48, 64, 100, 128, 192])),
    seed=st.integers(0, 2**20),
    rows_vary=st.booleans(),
    run=st.sampled_from([0, 1, 32, 64, 128]),
)
def test_what_a_scope_does_not_feel_changes_nothing(
    entry: Format, shape: tuple[int, int], seed: int, rows_vary: bool, run: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = np.exp2(rng.integers(-3, 4, shape[0]) * rows_vary)
    columns = np.exp2(np.repeat(rng.integers(-1, 2, shape[1]), run)[: shape[1]]) if run else np.ones(shape[1])
    if entry.scope.feels(rows, columns):
        return
    weight = weight_of(entry, shape, "normal", seed)
    factors = torch.from_numpy(np.multiply.outer(rows, columns)).float()
    assert torch.equal(entry.roundtrip(weight * factors), entry.roundtrip(weight) * factors)


@pytest.mark.parametrize(
    ("scope", "rows", "columns", "felt"),
    [
        (ScaleScope("tensor"), [2, 2], [4, 4], False),
        (ScaleScope("tensor"), [2, 1], [1, 1], True),
        (ScaleScope("row"), [2, 1], [4, 4], False),
        (ScaleScope("row"), [1, 1], [4, 1], True),
        (ScaleScope("group", 2), [2, 1], [4, 4, 1], False),
        (ScaleScope("group", 2), [1, 1], [4, 1, 1], True),
        (ScaleScope("block", 2), [2, 1], [4, 4, 1, 1], False),
        (ScaleScope("block", 2), [2, 1], [1, 1, 1], True),
        (ScaleScope("block", 2), [2, 2], [1, 1, 1], False),
        (ScaleScope("block", 2, nested=True), [2, 1], [1, 1], True),
        (ScaleScope("block", 2, nested=True), [2, 2], [4, 4], False),
    ],
)
def test_scopes_by_hand(scope: ScaleScope, rows: list[float], columns: list[float], felt: bool) -> None:
    assert scope.feels(np.array(rows), np.array(columns)) is felt


@CASES
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1), (1, 2), (3, 1)], ids=str)
def test_shape_and_dtype_are_kept_and_the_input_is_untouched(entry: Format, shape: tuple[int, int]) -> None:
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)
    before = weight.clone()
    found = entry.roundtrip(weight)
    assert found.shape == shape and found.dtype == torch.float32
    assert torch.equal(weight, before)
    assert found.data_ptr() != weight.data_ptr() or not weight.numel()


@CASES
def test_zeros_stay_zeros(entry: Format) -> None:
    weight = torch.zeros(4, 96)
    weight[0, :40] = 1.0
    found = entry.roundtrip(weight)
    assert torch.equal(found[1:], weight[1:]) and torch.equal(found[0, 40:], weight[0, 40:])
