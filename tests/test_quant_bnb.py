"""bitsandbytes through vrscope: the same figures as its own API gives, and none of its messages."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes import nn as bnb_nn
from scipy import stats

from vrscope.quant import bnb


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.05)


def normal_float_codes() -> np.ndarray:
    """Return the 16 values of NF4: quantiles of the normal distribution, scaled to -1..1 (QLoRA, appendix E)."""
    offset = 0.9677083
    positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    codes = np.sort(np.concatenate([negative, [0.0], positive]))
    return codes / codes.max()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (10, 100), (7, 66), (300, 256)], ids=str)
def test_four_bit_is_what_bitsandbytes_makes_of_the_matrix(kind: str, nested: bool, shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    assert torch.equal(bnb.four_bit(weight, kind, nested), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(5, 3), (7, 9), (64, 65), (1, 1), (3, 128)], ids=str)
def test_nf4_equals_its_definition_for_odd_widths_and_incomplete_blocks(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    found = bnb.four_bit(weight, "nf4").reshape(-1).numpy()
    flat, codes = weight.reshape(-1).numpy(), normal_float_codes()
    for first in range(0, flat.size, 64):
        block = flat[first : first + 64].astype(np.float64)
        absmax = np.abs(block).max()
        nearest = codes[np.abs(block[:, None] / absmax - codes).argmin(axis=1)]
        np.testing.assert_allclose(found[first : first + 64], nearest * absmax, rtol=2e-6, atol=0)


def test_fp4_has_its_eight_magnitudes() -> None:
    found = bnb.four_bit(weight_of(64, 64), "fp4").reshape(-1, 64)
    shares = (found.abs() / found.abs().amax(dim=1, keepdim=True)).unique()
    expected = np.array([0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0])  # e2m1 over its maximum, 12
    assert all(np.isclose(expected, share, atol=1e-3).any() for share in shares.tolist())
    assert len(shares) >= 7


def test_int8_rows_are_what_the_layer_stores() -> None:
    weight = weight_of(40, 96)
    layer = bnb.int8_linear(weight, None)
    layer(torch.zeros(1, 96))
    stored = functional.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
    assert layer.state.CB.dtype == torch.int8
    assert torch.equal(bnb.int8_rows(weight), stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outliers", [False, True])
def test_the_layer_is_bitsandbytes_own(dtype: torch.dtype, outliers: bool) -> None:
    plain = torch.nn.Linear(96, 40)
    theirs = bnb_nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu").eval()
    ours = bnb.int8_linear(plain.weight.to(dtype), plain.bias.to(dtype))
    inputs = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    if outliers:
        inputs[..., 5] *= 30
    with torch.no_grad(), bnb.quiet():
        found, expected = ours(inputs), theirs(inputs)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    assert found.dtype == dtype and found.shape == (2, 17, 40)
    exact = inputs.float() @ plain.weight.T + plain.bias
    error = (found.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


def test_outliers_are_kept_in_floating_point() -> None:
    weight = weight_of(40, 96, seed=2)
    inputs = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    inputs[:, 7] = 100.0
    exact = inputs @ weight.T
    layer = bnb.int8_linear(weight, None)
    with torch.no_grad(), bnb.quiet():
        error = (layer(inputs) - exact).norm() / exact.norm()
        layer.state.threshold = 0.0
        without = (layer(inputs) - exact).norm() / exact.norm()
    assert error < 0.4 * without


def test_only_the_message_about_casts_is_held_back(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(bnb.CAST_LOGGER)
    layer = bnb.int8_linear(weight_of(8, 16), None)
    with torch.no_grad(), bnb.quiet():
        layer(torch.ones(2, 16))
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    with torch.no_grad():
        layer(torch.ones(2, 16))
    assert len(caplog.records) == 2 and "cast" in caplog.records[-1].getMessage()
    assert not logger.filters


def test_bitsandbytes_is_imported_without_a_word() -> None:
    code = "import torch\nfrom vrscope.quant import bnb\nprint(bnb.four_bit(torch.ones(2, 64), 'nf4').sum().item())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("128.0\n", "")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("magnitude", [1e-36, 1e-20, 1e20, 1e38])
def test_four_bit_holds_near_the_ends_of_float32(kind: str, magnitude: float) -> None:
    weight = weight_of(20, 90).double()
    weight = (weight / weight.abs().max() * magnitude).float()
    error = (bnb.four_bit(weight, kind) - weight).double().norm() / weight.double().norm()
    assert 0.05 < error < 0.2
