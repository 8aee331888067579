"""Importance against gradients taken by plain hooks, and predicted damage against what quantizing really costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny

from vrscope.activations.importance import SEED, calibrate
from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.demo import demo_model
from vrscope.errors import ModelError
from vrscope.quant.loading import load_model
from vrscope.quant.text import TextSample
from vrscope.stages import read_sample

WINDOWS = tuple(tuple((7 * i + 3 * w) % 90 + 3 for i in range(40)) for w in range(5))
SAMPLE = TextSample("made up", WINDOWS, 40, (0, 0))


def calibrated(case: str, folder: Path, sample: TextSample = SAMPLE):
    checkpoint = open_checkpoint(save_tiny(case, folder))
    loaded = load_model(checkpoint, "cpu", "float32")
    return checkpoint, loaded, calibrate(loaded, checkpoint, bind(checkpoint).roles, sample)


def test_importance_is_the_mean_of_squared_gradients_times_squared_inputs(tmp_path: Path) -> None:
    _, loaded, found = calibrated("llama", tmp_path)
    model = loaded.model
    layer = model.model.layers[0].mlp.up_proj
    seen: list[torch.Tensor] = []

    def keep(module, given, output):
        output.retain_grad()
        seen.extend((given[0], output))

    layer.register_forward_hook(keep)
    generator = torch.Generator().manual_seed(SEED)
    sums = {"search": np.zeros(layer.weight.shape), "held": np.zeros(layer.weight.shape)}
    largest = np.zeros(layer.weight.shape[1])
    for number, window in enumerate(WINDOWS):
        seen.clear()
        embedded = model.get_input_embeddings()(torch.tensor([window])).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[0]
        reached = torch.softmax(logits.detach().double(), -1).cumsum(-1).numpy()
        drawn = torch.rand((len(reached), 1), generator=generator).double().numpy()
        labels = torch.tensor([np.searchsorted(row, at, side="right") for row, at in zip(reached, drawn, strict=True)])
        torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
        inputs, gradient = seen[0][0].detach().double().numpy(), seen[1].grad[0].double().numpy()
        sums["held" if number in {3, 4} else "search"] += (gradient**2).T @ inputs**2
        largest = np.maximum(largest, np.abs(inputs).max(axis=0))
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(found.importance[name], sums["search"] / 120, rtol=2e-3, atol=1e-12)
    np.testing.assert_allclose(found.held_out[name], sums["held"] / 80, rtol=2e-3, atol=1e-12)
    np.testing.assert_allclose(found.absmax[name], largest, rtol=1e-5)
    assert (found.tokens, found.held_out_tokens, found.causal, found.unseen) == (120, 80, True, ())


def test_half_of_importance_times_squared_error_is_the_kl_that_noise_costs() -> None:
    """On the trained demo model, with noise on all linear weights: mean KL of the whole against the prediction."""
    checkpoint = open_checkpoint(demo_model())
    sample = read_sample(checkpoint, None, 2048)
    loaded = load_model(checkpoint, "cpu", "float32")
    found = calibrate(loaded, checkpoint, bind(checkpoint).roles, sample)
    reference = [torch.log_softmax(loaded.run(window), -1) for window in sample.windows]
    torch.manual_seed(1)
    predicted = 0.0
    parameters = dict(loaded.model.named_parameters())
    for name, importance in found.importance.items():
        noise = 0.02 * checkpoint.read(name).float().std() * torch.randn(importance.shape)
        parameters[name].data += noise
        both = 0.75 * importance + 0.25 * found.held_out[name]
        predicted += float((both * noise.numpy() ** 2).sum()) / 2
    kl = [
        (before.exp() * (before - torch.log_softmax(loaded.run(window), -1))).sum(-1)
        for before, window in zip(reference, sample.windows, strict=True)
    ]
    measured = float(torch.cat(kl).mean())
    assert predicted == pytest.approx(measured, rel=0.25)


def test_for_encoders_it_is_the_mean_squared_relative_error_of_the_last_state(tmp_path: Path) -> None:
    many = TextSample("made up", tuple(tuple((5 * i + w) % 90 + 3 for i in range(30)) for w in range(60)), 30, (0, 0))
    checkpoint, loaded, found = calibrated("bert", tmp_path, many)
    name = next(name for name in found.importance if name.endswith("layer.1.output.dense.weight"))
    states = [loaded.run(window) for window in many.windows]
    weight = next(
        p for n, p in loaded.model.named_parameters() if n.endswith("layer.1.output.dense.weight") and p.ndim == 2
    )
    assert torch.equal(weight, checkpoint.read(name))
    torch.manual_seed(0)
    noise = 1e-3 * torch.randn(weight.shape)
    weight.data += noise
    changes = [loaded.run(window) - before for before, window in zip(states, many.windows, strict=True)]
    relative = [((c.norm(dim=1) / s.norm(dim=1)) ** 2).mean() for c, s in zip(changes, states, strict=True)]
    both = (found.importance[name] * found.tokens + found.held_out[name] * found.held_out_tokens) / many.tokens
    assert float((both * noise.numpy() ** 2).sum()) / 2 == pytest.approx(float(torch.stack(relative).mean()), rel=0.2)
    assert not found.causal


def test_experts_are_told_apart_and_one_window_serves_as_both(tmp_path: Path) -> None:
    checkpoint, _, found = calibrated("mixtral", tmp_path, TextSample("made up", WINDOWS[:1], 40, (0, 0)))
    experts = [name for name in found.importance if "experts" in name]
    assert len(experts) == sum("experts" in name for name in checkpoint.tensors)
    assert len({found.importance[name].sum() for name in experts}) == len(experts)
    assert all(found.held_out[name] is found.importance[name] for name in experts)
    assert found.tokens == found.held_out_tokens == 40


def test_nothing_stays_installed_and_parameters_have_no_gradients(tmp_path: Path) -> None:
    _, loaded, _ = calibrated("gpt2", tmp_path)
    assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_gradients_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    loaded = load_model(checkpoint, "cpu", "float32")
    loaded.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"found NaN or infinity in the hidden state at layer 2"):
        calibrate(loaded, checkpoint, bind(open_checkpoint(tmp_path)).roles, SAMPLE)
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_too_little_memory_is_said_before_it_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vrscope.quant import memory

    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    loaded = load_model(checkpoint, "cpu", "float32")
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(ModelError, match=r"to calibrate on windows of 40 tokens, found 0.0 GB"):
        calibrate(loaded, checkpoint, bind(checkpoint).roles, SAMPLE)
