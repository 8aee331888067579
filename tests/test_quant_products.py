"""Inputs rounded on their way into products with known weights: right values, every kind of layer, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import inputs, make_model
from torch.nn import functional

from vrscope.quant import simulated
from vrscope.quant.formats import get_format
from vrscope.quant.layers import QuantizedWeight, quantized, quantized_weights
from vrscope.quant.products import RoundedInputs

W8A8 = get_format("w8a8")
# One per kind of layer and of modeling code; each runs all of its quantized weights.
CASES = [
    *("llama", "llama-tied", "mixtral", "granitemoe", "gpt_oss", "llama4", "qwen2_moe", "gpt2", "bert", "opt"),
    *("whisper", "mamba2", "jamba", "qwen3_next", "deepseek_v3", "vit", "t5"),
]


def oracle(values: torch.Tensor) -> torch.Tensor:
    """Return values rounded by torch's own fake quantization, one scale for all of them."""
    scale = float(values.double().abs().max()) / 127
    return torch.fake_quantize_per_tensor_affine(values, scale or 1.0, 0, -127, 127)


def test_inputs_are_those_of_torchs_fake_quantization() -> None:
    for seed, scale in ((0, 1.0), (1, 1e-4), (2, 300.0)):
        values = scale * torch.randn(40, 33, generator=torch.Generator().manual_seed(seed))
        assert W8A8.inputs is not None
        found, expected = W8A8.inputs(values), oracle(values)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
        assert len(found.unique()) > 100 and found.abs().max() == pytest.approx(float(values.abs().max()), rel=1e-6)
    assert torch.equal(W8A8.inputs(torch.zeros(3, 4)), torch.zeros(3, 4))


@contextmanager
def by_hand(model: Any) -> Iterator[None]:
    """Quantize the linear and Conv1D layers of a model in place, with hooks for their inputs."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | Conv1D) and not name.endswith("lm_head"):
            with torch.no_grad():
                flip = isinstance(layer, Conv1D)
                matrix = layer.weight.T if flip else layer.weight
                rows = matrix.abs().amax(dim=1, keepdim=True)
                rounded = (matrix / rows * 127).round() * rows / 127
                layer.weight.copy_(rounded.T if flip else rounded)
            layer.register_forward_pre_hook(lambda _, given: (oracle(given[0]), *given[1:]))
    yield


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs(model, torch.float32))
    logits = getattr(found, "logits", None)
    return found.last_hidden_state if logits is None else logits


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt", "bert"])
def test_the_model_is_the_one_quantized_by_hand(case: str) -> None:
    model, twin = make_model(case), make_model(case)
    before = run(model)
    with quantized(model, W8A8):
        found = run(model)
    with by_hand(twin):
        expected = run(twin)
    damage = float((expected - before).abs().max())
    # A value near the middle of two codes may fall to the other one, which a few of thousands do.
    assert float((found - expected).abs().max()) < 0.2 * damage and damage > 0
    assert float((found - expected).abs().median()) < 0.02 * float((expected - before).abs().median())
    assert torch.equal(run(model), before)


def test_one_layer_in_float64() -> None:
    """Two layers with a GELU between, against numpy in float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8)).eval()
    weights = [QuantizedWeight("a", model[0].weight, False), QuantizedWeight("b", model[2].weight, False)]
    x = torch.randn(50, 24)

    def rounded(values: np.ndarray, axis: int | None) -> np.ndarray:
        step = np.abs(values).max(axis=axis, keepdims=True) / 127
        return np.rint(values / step) * step

    w, b = ([layer.detach().double().numpy() for layer in pair] for pair in zip(*_pairs(model), strict=True))
    hidden = rounded(x.double().numpy(), None) @ rounded(w[0], 1).T + b[0]
    hidden = functional.gelu(torch.from_numpy(hidden)).numpy()
    expected = rounded(hidden, None) @ rounded(w[1], 1).T + b[1]
    with quantized(model, W8A8, weights), torch.no_grad():
        found = model(x).double().numpy()
    assert found == pytest.approx(expected, abs=1e-5)


def _pairs(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.weight, layer.bias) for layer in model if isinstance(layer, torch.nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_quantized_weight_meets_rounded_inputs(case: str, dtype: torch.dtype) -> None:
    model = make_model(case).to(dtype)
    model.set_experts_implementation("eager")  # as vrscope loads models
    weights = quantized_weights(model)
    seen = set()

    def note(values: torch.Tensor, name: str) -> torch.Tensor:
        assert values.ndim == 2 and values.dtype == torch.float32
        seen.add(name)
        return values

    with ExitStack() as stack, torch.no_grad():
        for weight in weights:  # one mode for each, so that none can hide behind another
            stack.enter_context(RoundedInputs([weight.parameter], partial(note, name=weight.name)))
        model(**inputs(model, dtype))
    assert len(weights) > 3 and seen == {weight.name for weight in weights}


def test_experts_have_a_scale_each_and_other_products_none() -> None:
    """Eager experts run one by one; a stack in one product is rounded matrix by matrix."""
    shapes = []

    def note(values: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(values.shape))
        return simulated.int8_per_tensor(values)

    stack, inputs_ = torch.randn(3, 8, 5), torch.randn(3, 7, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    with RoundedInputs([stack], note):
        found = torch.bmm(inputs_, stack)
        one = inputs_[1] @ stack[1]
        turned = stack[2].T @ inputs_[2].T
        other = torch.randn(4, 8) @ torch.randn(8, 5)
    assert shapes == [(7, 8)] * 5 and other.shape == (4, 5)
    expected = torch.stack([oracle(matrix) for matrix in inputs_]) @ stack
    assert torch.allclose(found, expected, atol=1e-3)
    assert torch.allclose(one, expected[1], atol=1e-3) and torch.allclose(turned.T, expected[2], atol=1e-3)


def test_powers_of_two_on_all_columns_change_nothing_and_on_some_they_do() -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(32, 16, bias=False)
    x = torch.randn(20, 32)
    mixed = torch.exp2(torch.arange(32.0) % 3)

    def output(factor: torch.Tensor) -> torch.Tensor:
        twin = torch.nn.Linear(32, 16, bias=False)
        twin.weight.data = layer.weight.data * factor
        with quantized(twin, W8A8, [QuantizedWeight("a", twin.weight, False)]), torch.no_grad():
            return twin(x / factor)

    assert torch.equal(output(torch.full((32,), 4.0)), output(torch.ones(32)))
    assert not torch.equal(output(mixed), output(torch.ones(32)))
