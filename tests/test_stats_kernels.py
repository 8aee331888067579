"""The compiled loops against numpy, and against exact fractions where floats would hide an error."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vrscope.stats import kernels

LIMIT32 = np.uint32(0x7F7F_FFFF)
LIMIT64 = np.uint64(0x7FEF_FFFF_FFFF_FFFF)


def moments(values: np.ndarray, chunk: int | None = None) -> np.ndarray:
    chunk = chunk or max(1, values.size)
    out = np.zeros((-(-values.size // chunk), kernels.MOMENT_FIELDS))
    wide = values.dtype == np.float64
    bits, limit = values.view(np.uint64 if wide else np.uint32), LIMIT64 if wide else LIMIT32
    kernels.chunk_moments(values, bits, chunk, limit, out)
    return out


def assert_exact_moments(state: np.ndarray, values: np.ndarray) -> None:
    """Compare with exact rational arithmetic; errors count relative to the sums of magnitudes."""
    exact = [Fraction(float(value)) for value in values]
    mean = sum(exact, Fraction(0)) / len(exact)
    unit = Fraction(2) ** int(state[kernels.EXPONENT])
    largest = float(max(abs(value) for value in exact) / unit)
    assert state[kernels.COUNT] == len(exact)
    assert state[kernels.ABSMAX] == float(max(abs(value) for value in exact))
    assert state[kernels.MEAN] == pytest.approx(float(mean / unit), rel=1e-12, abs=1e-14 * largest)
    for order, field in ((2, kernels.M2), (3, kernels.M3), (4, kernels.M4)):
        power = float(sum((value - mean) ** order for value in exact) / unit**order)
        size = float(sum(abs(value - mean) ** order for value in exact) / unit**order)
        rounding = len(exact) * (1e-14 * largest) ** order
        assert state[field] == pytest.approx(power, rel=1e-10, abs=1e-10 * size + rounding + 1e-280)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_patterns_are_counted_by_their_top_bits(kind: type) -> None:
    width = 8 * np.dtype(kind).itemsize
    shift = max(0, width - 16)
    bits = np.random.default_rng(1).integers(0, 1 << width, 5000, dtype=kind)
    counts = np.zeros(1 << (width - shift), np.uint32)
    kernels.count_patterns(bits, np.uint64(shift), counts)
    np.testing.assert_array_equal(counts, np.bincount((bits >> kind(shift)).astype(np.int64), minlength=counts.size))
    total = np.full(counts.size, 3, np.int64)
    kernels.add_counts(total, counts)
    np.testing.assert_array_equal(total, counts.astype(np.int64) + 3)
    np.testing.assert_array_equal(kernels.used_bins(counts.astype(np.int64)), np.flatnonzero(counts))


@pytest.mark.parametrize(
    ("rows", "columns", "matrices"), [(6, 5, 1), (6, 5, 3), (1, 9, 1), (9, 1, 1), (9, 1, 9), (6, 40, 2)]
)
def test_top_magnitudes_are_those_of_the_finite_values(rows: int, columns: int, matrices: int) -> None:
    values = np.random.default_rng(2).normal(size=(rows, columns)).astype(np.float16)
    values[0, 0], values[-1, -1] = np.nan, -np.inf
    row_top, column_top = np.zeros(rows, np.uint16), np.zeros((matrices, columns), np.uint16)
    per = rows // matrices
    kernels.top_magnitudes(values.view(np.uint16), np.uint16(0x7BFF), per, row_top, column_top)
    magnitudes = np.where(np.isfinite(values), np.abs(values), np.float16(-1)).astype(np.float64)
    for top, expected in (
        (row_top, magnitudes.max(axis=1)),
        (column_top, magnitudes.reshape(matrices, per, columns).max(axis=1)),
    ):
        assert ((top == 0) == (expected == -1)).all()
        found = (np.maximum(top, 1) - np.uint16(1)).view(np.float16).astype(np.float64)
        np.testing.assert_array_equal(found[top > 0], expected[top > 0])


FLOATS32 = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
FLOATS64 = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(values=FLOATS32 | FLOATS64, chunk=st.integers(1, 20))
def test_moments_are_exact_for_any_values_and_any_cut(values: np.ndarray, chunk: int) -> None:
    parts = moments(values, chunk)
    state = np.zeros(kernels.MOMENT_FIELDS)
    kernels.fold(state, parts)
    assert_exact_moments(state, values)
    assert state[kernels.ZEROS] == np.sum(values == 0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shift=st.floats(-1e6, 1e6), scale=st.floats(1e-30, 1e30), seed=st.integers(0, 1000), cut=st.integers(0, 300))
def test_merging_two_parts_is_the_same_as_taking_both_at_once(shift: float, scale: float, seed: int, cut: int) -> None:
    values = (np.random.default_rng(seed).normal(size=300) + shift) * scale
    left, right = moments(values[:cut])[:1], moments(values[cut:])[:1]
    states = left if cut else np.zeros((1, kernels.MOMENT_FIELDS))
    if cut < 300:
        kernels.merge_each(states, right)
    assert_exact_moments(states[0], values)


def test_merging_with_nothing_changes_nothing_either_way() -> None:
    whole, nothing = moments(np.arange(5.0)), np.zeros((1, kernels.MOMENT_FIELDS))
    merged = whole.copy()
    kernels.merge_each(merged, nothing)
    np.testing.assert_array_equal(merged, whole)
    kernels.merge_each(nothing, whole)
    np.testing.assert_array_equal(nothing, whole)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_nan_and_infinity_are_counted_and_left_out(kind: type) -> None:
    values = np.array([1, np.nan, -2, np.inf, 0, -np.inf, -np.nan, 3, -0.0], kind)
    state = moments(values)[0]
    assert (state[kernels.NANS], state[kernels.INFS], state[kernels.ZEROS]) == (2, 2, 2)
    assert_exact_moments(state, values[np.isfinite(values)])
    nothing = moments(np.array([np.nan, np.inf], kind))[0]
    assert (nothing[kernels.COUNT], nothing[kernels.NANS], nothing[kernels.INFS]) == (0, 1, 1)


@pytest.mark.parametrize("value", [0.1, 1e-300, -1e300, 5e-324, 1 / 3])
def test_equal_values_have_no_spread_at_all(value: float) -> None:
    state = np.zeros(kernels.MOMENT_FIELDS)
    kernels.fold(state, moments(np.full(10_001, value), 4096))
    assert (state[kernels.M2], state[kernels.M3], state[kernels.M4]) == (0, 0, 0)
    assert np.ldexp(state[kernels.MEAN], int(state[kernels.EXPONENT])) == pytest.approx(value, rel=1e-15)


def test_moments_from_counts_are_those_of_the_values_counted() -> None:
    rng = np.random.default_rng(3)
    magnitudes = np.sort(rng.random(50)) * 1e3
    magnitudes[0] = 0
    positive, negative = rng.integers(0, 9, (2, 50))
    state = np.zeros(kernels.MOMENT_FIELDS)
    kernels.pattern_moments(magnitudes, positive, negative, state)
    values = np.concatenate([np.repeat(magnitudes, positive), -np.repeat(magnitudes, negative)])
    assert_exact_moments(state, values)
    assert state[kernels.ZEROS] == positive[0] + negative[0]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_values_far_from_the_mean_are_counted_and_infinity_is_not(kind: type) -> None:
    values = np.array([0, 1, 2, -3, np.inf, np.nan, 2.5], kind)
    assert kernels.count_beyond(values, 0.5, 1.5) == 2
