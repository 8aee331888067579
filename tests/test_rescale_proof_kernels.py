"""The proof's comparison against exact rational arithmetic, for every stored type and patterns of every kind."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrscope.rescale.proof_kernels import first_unequal
from vrscope.rescale.verify import _LAYOUTS

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def values_of(dtype: str, bits: np.ndarray) -> np.ndarray:
    """Return what torch says the patterns mean, as float64, which holds every type exactly."""
    signed = SIGNED[_LAYOUTS[dtype][0]]
    raw = torch.from_numpy(np.ascontiguousarray(bits).view(f"int{_LAYOUTS[dtype][0]}"))
    return raw.to(signed).view(TORCH[dtype]).to(torch.float64).numpy()


def is_multiple(dtype: str, before: np.ndarray, after: np.ndarray, exponent: int) -> list[bool]:
    answers = []
    pairs = zip(before, after, values_of(dtype, before), values_of(dtype, after), strict=True)
    for a, b, x, y in pairs:
        if not (np.isfinite(x) and np.isfinite(y)):
            answers.append(bool(a == b))
        else:
            equal = Fraction(float(x)) * Fraction(2) ** exponent == Fraction(float(y))
            answers.append(equal and bool(np.signbit(x) == np.signbit(y)))
    return answers


def found(dtype: str, before: np.ndarray, after: np.ndarray, exponent: int) -> list[bool]:
    answers = []
    for lane in (lane for lane in (np.int16, np.int32, np.int64) if 8 * lane().itemsize >= _LAYOUTS[dtype][0]):
        one, rows = np.zeros((1, 1), lane), np.array([exponent], lane)
        answers.append(
            [
                first_unequal(np.array([[a]]), np.array([[b]]), rows, one, _LAYOUTS[dtype]) == -1
                for a, b in zip(before, after, strict=True)
            ]
        )
    assert all(each == answers[0] for each in answers)  # the type of the exponents is a matter of speed only
    return answers[0]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("exponent", [-3, 0, 1, 12])
def test_all_pairs_of_one_byte(dtype: str, exponent: int) -> None:
    every = np.arange(256, dtype=np.uint8)
    before, after = (grid.reshape(-1) for grid in np.meshgrid(every, every))
    kept = np.random.default_rng(exponent + 5).random(before.size) < 0.1
    kept |= values_of(dtype, before) * 2.0**exponent == values_of(dtype, after)
    assert found(dtype, before[kept], after[kept], exponent) == is_multiple(dtype, before[kept], after[kept], exponent)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), exponent=st.integers(-40, 40))
def test_any_patterns_and_their_true_multiples(dtype: str, seed: int, exponent: int) -> None:
    width, mantissa, _ = _LAYOUTS[dtype]
    rng = np.random.default_rng(seed)
    kind = f"uint{width}"
    before = rng.integers(0, 1 << width, 12, dtype=np.uint64 if width == 64 else kind).astype(kind)
    before[:4] &= np.dtype(kind).type((1 << (mantissa + 2)) - 1)  # subnormal numbers and their neighbours
    before[4] = 0
    after = rng.permutation(before)
    shifted = before.copy()
    with np.errstate(all="ignore"):
        exact = torch.from_numpy(np.ldexp(values_of(dtype, before), exponent)).to(TORCH[dtype])
    shifted = exact.view(SIGNED[width]).numpy().view(kind)
    for other in (after, shifted, shifted ^ np.dtype(kind).type(1), shifted ^ np.dtype(kind).type(1 << (width - 1))):
        assert found(dtype, before, other, exponent) == is_multiple(dtype, before, other, exponent)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_the_first_wrong_element_is_named(dtype: str) -> None:
    width = _LAYOUTS[dtype][0]
    lane = np.int64 if width == 64 else np.int32
    values = torch.full((7, 33), 1.5).to(TORCH[dtype])
    values[2, 4] = 0.0
    rows, columns = np.arange(7).astype(lane) % 2, np.arange(33).astype(lane)[None] % 3 - 1
    exact = torch.from_numpy(np.ldexp(values.double().numpy(), rows[:, None] + columns)).to(TORCH[dtype])
    bits = [tensor.view(SIGNED[width]).numpy().view(f"uint{width}").copy() for tensor in (values, exact)]
    full = np.ascontiguousarray(np.broadcast_to(columns, (7, 33)))
    for shape in (columns, full):
        assert first_unequal(*bits, rows, shape, _LAYOUTS[dtype]) == -1
    wrong = bits[1].copy()
    wrong[3, 5] ^= 1
    wrong[6, 1] ^= 1
    for shape in (columns, full):
        assert first_unequal(bits[0], wrong, rows, shape, _LAYOUTS[dtype]) == 3 * 33 + 5
