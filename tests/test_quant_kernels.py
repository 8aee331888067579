"""Compiled round trips against bitsandbytes and the torch reference, element for element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrscope.quant import kernels, roundtrip
from vrscope.quant.formats import FORMATS, Format

CASES = pytest.mark.parametrize("entry", FORMATS, ids=[entry.name for entry in FORMATS])
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = [(1, 1), (1, 64), (7, 9), (5, 63), (64, 65), (3, 128), (33, 130), (96, 256), (40, 1), (2, 1000)]


def assert_same(entry: Format, weight: torch.Tensor) -> None:
    """Check all bits; the sign of a zero of FP4 depends on the order in which torch sorts its two zeros."""
    found, expected = entry.roundtrip(weight), entry.by_engine(weight)
    assert entry.reference is not None and entry.values is not None
    assert found.dtype == expected.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if entry.name != "fp4":
        kept = ~expected.isnan()
        assert torch.equal(found.view(torch.int32)[kept], expected.view(torch.int32)[kept])


def random_weight(shape: tuple[int, int], scale: float = 0.05, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return torch.from_numpy(np.clip(values, -3e38, 3e38).astype(np.float32))


@CASES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_weights_of_every_shape(entry: Format, shape: tuple[int, int]) -> None:
    assert_same(entry, random_weight(shape))


@CASES
@pytest.mark.parametrize("scale", [1e-45, 1e-41, 1e-38, 1e-36, 1e-27, 1e-5, 1e3, 1e30, 1e38])
def test_tiny_and_huge_weights(entry: Format, scale: float) -> None:
    for shape in ((16, 128), (5, 77)):
        assert_same(entry, random_weight(shape, scale))


@CASES
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_weights_of_every_stored_dtype(entry: Format, dtype: torch.dtype) -> None:
    assert_same(entry, random_weight((32, 192)).to(dtype).float())
    assert_same(entry, (random_weight((20, 100)) * 100).to(dtype).float())


@CASES
def test_blocks_of_zeros_beside_blocks_of_extremes(entry: Format) -> None:
    weight = random_weight((12, 128))
    weight[0], weight[1, :64], weight[2, 64:] = 0.0, -0.0, 1e-44
    weight[3], weight[4, 5], weight[5, 6] = 3e38, 3e38, -1e-40
    weight[6], weight[7] = weight[6].abs(), -weight[7].abs()
    weight[8] *= torch.exp2(torch.arange(128.0) - 64)
    assert_same(entry, weight)


@CASES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_spoil_what_they_spoil_in_the_reference(entry: Format, value: float) -> None:
    for shape in ((6, 128), (6, 100)):
        weight = random_weight(shape)
        weight[1, 3] = weight[-1, -1] = value
        if entry.scope.nested:  # the mean of all scales is gone, and what 8 bits make of NaN is not defined
            continue
        assert_same(entry, weight)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_on_and_beside_every_bound_fall_on_the_same_side(kind: roundtrip.FourBit) -> None:
    entry = next(entry for entry in FORMATS if entry.name == kind)
    _, bounds = roundtrip.codebook(kind)
    around = np.concatenate([bounds, np.nextafter(bounds, -2), np.nextafter(bounds, 2)]).astype(np.float32)
    rows = [np.pad(around * np.float32(scale), (0, 128 - around.size)) for scale in (1, 0.37, 3e-5, 2.0**-130, 7e33)]
    weight = torch.from_numpy(np.stack(rows).astype(np.float32))
    weight[:, 63] = weight[:, 127] = torch.tensor([1, 0.37, 3e-5, 2.0**-130, 7e33])
    assert_same(entry, weight)
    assert_same(entry, weight[:, :100])


@CASES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(1, 6), columns=st.integers(1, 150), exponent=st.integers(-149, 127), seed=st.integers(0, 2**20))
def test_any_size_at_any_magnitude(entry: Format, rows: int, columns: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (rows, columns)) * np.exp2(rng.integers(-6, 1, (rows, columns)))
    with np.errstate(over="ignore", under="ignore"):
        weight = torch.from_numpy(np.ldexp(values, exponent).astype(np.float32))
    assert_same(entry, weight)


@CASES
def test_views_that_are_not_contiguous(entry: Format) -> None:
    assert_same(entry, random_weight((128, 96)).T)


def test_a_round_trip_may_overwrite_its_input() -> None:
    code, bounds = roundtrip.codebook("nf4")
    for weight in (random_weight((8, 130)), random_weight((8, 130), 1e-36)):
        values = weight.numpy()
        for name, run in {
            "nf4": lambda x: kernels.roundtrip_codebook_blocks(
                x.reshape(-1), 64, code, bounds, np.empty(0, np.float32), x.reshape(-1)
            ),
            "int8-row": lambda x: kernels.roundtrip_int8_rows(x, x),
            "int4-g64": lambda x: kernels.roundtrip_int4_groups(x, 64, x),
        }.items():
            expected = next(entry for entry in FORMATS if entry.name == name).roundtrip(weight).numpy()
            mine = values.copy()
            run(mine)
            np.testing.assert_array_equal(mine, expected)


def test_errors_are_summed_as_in_float64() -> None:
    weight = random_weight((37, 131)).numpy().reshape(-1)
    other = (weight * np.float32(1.01)).astype(np.float32)
    sums = np.zeros(3)
    kernels.add_errors(weight[:2000], other[:2000], sums)
    kernels.add_errors(weight[2000:], other[2000:], sums)
    difference = (other - weight).astype(np.float64)
    expected = [0, np.square(difference).sum(), np.abs(difference).max()]
    np.testing.assert_allclose(sums, expected, rtol=1e-13)
    assert sums[kernels.LARGEST] == expected[kernels.LARGEST]


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("shape", [(37, 131), (1, 1), (0, 64), (5, 0)], ids=str)
def test_stored_bits_are_read_and_their_squares_summed_as_in_float64(kind: type, shape: tuple[int, int]) -> None:
    weight = stored(random_weight(shape), kind)
    assert np.array_equal(kernels.singles(weight), singles(weight))
    np.testing.assert_allclose(kernels.signal(weight), np.square(singles(weight).astype(np.float64)).sum(), rtol=1e-13)


def stored(weight: torch.Tensor, kind: type) -> np.ndarray:
    """Return the bits of a weight in bfloat16 (uint16) or float32 (uint32)."""
    if kind is np.uint16:
        return weight.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return weight.numpy().view(np.uint32)


def singles(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(32 - 8 * bits.itemsize)).view(np.float32)


FUSED = pytest.mark.parametrize("entry", [e for e in FORMATS if e.errors], ids=lambda entry: entry.name)


def assert_same_errors(entry: Format, weight: torch.Tensor, kind: type) -> None:
    """Check that the fused loops find the errors of the reference; overflow of a square is an infinite sum in both."""
    bits = stored(weight, kind)
    values = torch.from_numpy(singles(bits))
    off = (entry.by_engine(values) - values).numpy()
    with np.errstate(over="ignore"):
        power = np.square(off.astype(np.float64)).sum()
    sums = np.array([7.0, 0.0, 0.0])
    assert entry.errors is not None
    entry.errors(bits, sums)
    assert sums[kernels.SIGNAL] == 7
    np.testing.assert_allclose(sums[kernels.ERROR], power, rtol=1e-12)
    largest = np.abs(off).max(initial=0.0)
    assert sums[kernels.LARGEST] == largest or np.isnan([sums[kernels.LARGEST], largest]).all()


@FUSED
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_fused_loops_find_the_errors_of_the_round_trip(entry: Format, kind: type) -> None:
    pieces = [(5, 4095), (3, 4096), (2, 4097), (4097, 1), (9, 1000), (200, 100), (130, 64)]
    for shape in [*SHAPES, *pieces, (0, 64), (64, 0), (0, 0)]:
        assert_same_errors(entry, random_weight(shape), kind)
    for scale in (1e-45, 1e-41, 1e-38, 1e-27, 1e3, 1e30, 1e38):
        assert_same_errors(entry, random_weight((20, 300), scale), kind)


@FUSED
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fused_loops_find_the_errors_where_there_is_no_value(entry: Format, kind: type, value: float) -> None:
    for shape, places in {(6, 100): [(1, 3), (5, 99)], (50, 128): [(49, 127)], (1, 5000): [(0, 4990)]}.items():
        weight = random_weight(shape)
        for place in places:
            weight[place] = value
        assert_same_errors(entry, weight, kind)


def test_the_largest_error_is_nan_if_one_error_is() -> None:
    sums = np.zeros(3)
    for value in (1.0, np.nan, 5.0):
        kernels.add_errors(np.zeros(3, np.float32), np.array([0, value, 0], np.float32), sums)
    assert np.isnan(sums[kernels.LARGEST]) and np.isnan(sums[kernels.ERROR])
    sums[:] = 0
    kernels.add_errors(np.zeros(1, np.float32), np.array([np.inf], np.float32), sums)
    assert sums[kernels.LARGEST] == np.inf
