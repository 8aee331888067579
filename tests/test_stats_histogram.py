"""Histograms of bit patterns: exact where a bin is a value, within the width of a bin elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stats_oracle import DTYPES, EXACT, bits_of

from vrscope.stats import kernels
from vrscope.stats.encoding import encoding
from vrscope.stats.histogram import Histogram, histogram_of, magnitude_of


def histogram(values: torch.Tensor, dtype: str) -> Histogram:
    code = encoding(dtype)
    counts = np.zeros(code.bins, np.uint32)
    kernels.count_patterns(bits_of(values).reshape(-1), np.uint64(code.shift), counts)
    finite = values.to(torch.float64).numpy()
    finite = np.abs(finite[np.isfinite(finite)])
    return histogram_of(code, counts.astype(np.int64), float(finite.max(initial=0)))


def sample(dtype: str, count: int = 20_001, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    values = np.random.default_rng(0).standard_t(3, count) * scale + shift
    return torch.from_numpy(values).clamp(-400, 400).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.99, 0.9999, 1.0])
def test_quantiles_are_those_of_numpy(dtype: str, share: float) -> None:
    values = sample(dtype)
    expected = float(np.quantile(values.to(torch.float64).abs().numpy(), share))
    bound = 1e-12 if dtype in EXACT else {"F32": 2**-8, "F64": 2**-7}[dtype]
    assert histogram(values, dtype).abs_quantile(share) == pytest.approx(expected, rel=bound, abs=1e-300)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_bin_is_not_wider_than_promised(dtype: str) -> None:
    code = encoding(dtype)
    normal = code.lower >= float(np.finfo(f"float{code.width}").tiny)
    width = (code.upper[normal] - code.lower[normal]) / code.lower[normal]
    assert width.max() <= {"F32": 0.004, "F64": 0.008}[dtype]
    np.testing.assert_array_equal(code.lower[1:], code.upper[:-1])


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("mean", "distance"), [(0.0, 2.0), (0.25, 1.7), (-3.0, 0.5), (0.0, 1e9)])
def test_counts_beyond_are_exact_where_a_bin_is_a_value(dtype: str, mean: float, distance: float) -> None:
    values = sample(dtype)
    expected = int((np.abs(values.to(torch.float64).numpy() - mean) > distance).sum())
    assert histogram(values, dtype).count_beyond(mean, distance) == expected


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("count", [5, 200_001])
def test_counts_beyond_are_exact_or_left_open_where_bins_are_wide(dtype: str, count: int) -> None:
    values = sample(dtype, count)
    decided = 0
    for mean, distance in [(0.0, 2.0), (0.25, 1.7), (-3.0, 0.5), (0.0, 300.0), (0.0, 1e9), (500.0, 1.0)]:
        beyond = histogram(values, dtype).count_beyond(mean, distance)
        if beyond is not None:
            assert beyond == int((np.abs(values.to(torch.float64).numpy() - mean) > distance).sum())
            decided += 1
    assert decided >= (5 if count == 5 else 2)


@pytest.mark.parametrize("dtype", EXACT)
def test_counts_between_edges_are_those_of_numpy(dtype: str) -> None:
    values = sample(dtype, scale=2.0)
    edges = np.linspace(-3.1, 3.3, 42)
    plain = values.to(torch.float64).numpy()
    counts, below, above = histogram(values, dtype).over(edges)
    np.testing.assert_array_equal(counts, np.histogram(plain, edges)[0])
    assert (below, above) == (int((plain < edges[0]).sum()), int((plain > edges[-1]).sum()))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_counts_between_edges_are_close_where_bins_are_wide(dtype: str) -> None:
    values = sample(dtype, 200_000)
    edges = np.linspace(-3.1, 3.3, 42)
    plain = values.to(torch.float64).numpy()
    counts, below, above = histogram(values, dtype).over(edges)
    assert below + counts.sum() + above == plain.size
    np.testing.assert_allclose(counts, np.histogram(plain, edges)[0], rtol=0.02, atol=20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_finite_gives_nothing(dtype: str) -> None:
    empty = histogram(torch.full((3,), torch.nan).to(DTYPES[dtype]), dtype)
    assert empty.count == 0
    assert np.isnan(empty.abs_quantile(0.5))
    assert empty.count_beyond(0.0, 1.0) == 0
    counts, below, above = empty.over(np.linspace(-1, 1, 4))
    assert (counts.tolist(), below, above) == ([0, 0, 0], 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_are_read_back_from_their_patterns(dtype: str) -> None:
    values = sample(dtype, 50).abs()
    tops = np.append(bits_of(values) + encoding(dtype).unsigned.type(1), encoding(dtype).unsigned.type(0))
    found = magnitude_of(encoding(dtype), tops)
    np.testing.assert_array_equal(found[:-1], values.to(torch.float64).numpy())
    assert np.isnan(found[-1])


@pytest.mark.parametrize("dtype", EXACT)
def test_every_pattern_decodes_as_torch_decodes_it(dtype: str) -> None:
    code = encoding(dtype)
    signed = torch.int8 if code.width == 8 else torch.int16
    every = torch.arange(code.bins, dtype=torch.int32).to(signed).view(DTYPES[dtype])
    expected = every.to(torch.float64).numpy()
    np.testing.assert_array_equal(code.floats(bits_of(every)), expected)
    finite = np.isfinite(expected[: code.bins // 2])
    np.testing.assert_array_equal(code.lower, expected[: code.bins // 2][finite])
    infinite = np.flatnonzero(np.isinf(expected[: code.bins // 2]))
    assert infinite.tolist() == ([] if code.infinity is None else [code.infinity])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_limits_of_a_type_are_those_that_torch_names(dtype: str) -> None:
    limits = torch.finfo(DTYPES[dtype])
    assert (encoding(dtype).largest, encoding(dtype).smallest_normal) == (limits.max, limits.smallest_normal)
