"""A rounded model's damage and slopes against plain autograd, finite differences and quantizing for real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny

from vrscope.activations.importance import calibrate
from vrscope.activations.trial import Trial
from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import ModelError
from vrscope.quant.formats import get_format
from vrscope.quant.layers import quantized
from vrscope.quant.loading import load_model
from vrscope.quant.metrics import compare_predictions, compare_states
from vrscope.quant.text import TextSample

WINDOWS = tuple(tuple((7 * i + 3 * w) % 90 + 3 for i in range(40)) for w in range(4))
SAMPLE = TextSample("made up", WINDOWS, 40, (0, 0))
NF4 = get_format("nf4")


def rounding(name: str, values: torch.Tensor) -> torch.Tensor:
    del name
    return NF4.roundtrip(values.contiguous())


def trial_of(case: str, folder: Path) -> Trial:
    checkpoint = open_checkpoint(save_tiny(case, folder))
    loaded = load_model(checkpoint, "cpu", "float32")
    trial = calibrate(loaded, checkpoint, bind(checkpoint).roles, SAMPLE, keep=True).trial
    assert trial is not None
    return trial


@pytest.mark.parametrize("case", ["llama", "bert", "qwen2"])
def test_damage_is_that_of_quantizing_the_model(case: str, tmp_path: Path) -> None:
    trial = trial_of(case, tmp_path)
    loaded = trial.loaded
    reference = [loaded.run(window) for window in WINDOWS]
    with quantized(loaded.model, NF4):
        outputs = [loaded.run(window) for window in WINDOWS]
    if loaded.causal:
        pairs = zip(reference, outputs, WINDOWS, strict=True)
        expected = np.concatenate([compare_predictions(*pair).kl for pair in pairs]).mean()
    else:
        pairs = zip(reference, outputs, strict=True)
        expected = np.concatenate([compare_states(*pair).relative_error ** 2 for pair in pairs]).mean()
    before = {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()}
    with trial.rounded(rounding):
        assert trial.losses(range(4)).mean() == pytest.approx(expected, rel=1e-4)
    assert trial.losses(range(4)).mean() == pytest.approx(0, abs=1e-6)
    assert before == {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()}
    assert all(torch.equal(loaded.run(window), kept) for window, kept in zip(WINDOWS, reference, strict=True))


def test_slopes_are_the_gradient_of_the_mean_kl_at_the_rounded_weights(tmp_path: Path) -> None:
    trial = trial_of("llama", tmp_path)
    model = trial.loaded.model
    with trial.rounded(rounding):
        found = trial.slopes([0, 2])
        parameters = {name: p for name, p in model.named_parameters() if name in found}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for number in (0, 2):
            logits = model(torch.tensor([WINDOWS[number]])).logits[0]
            expected = torch.log_softmax(trial.outputs.read(number), -1)
            kl = (expected.exp() * (expected - torch.log_softmax(logits, -1))).sum()
            (kl / 80).backward()
        for name, parameter in parameters.items():
            wanted = parameter.grad.numpy()
            np.testing.assert_allclose(found[name], wanted, rtol=2e-3, atol=2e-5 * np.abs(wanted).max())
            parameter.requires_grad_(False)
            parameter.grad = None
    assert len(parameters) == 14


@pytest.mark.parametrize("case", ["bert", "mixtral", "gpt2", "gpt_oss", "phi3"])
def test_slopes_foretell_a_small_step(case: str, tmp_path: Path) -> None:
    """Also where weights are stored transposed, stacked or joined, and for the states of an encoder."""
    trial = trial_of(case, tmp_path)
    generator = torch.Generator().manual_seed(0)
    shift: dict[str, torch.Tensor] = {}

    def moved(step: float):
        def inner(name: str, values: torch.Tensor) -> torch.Tensor:
            if name not in shift:
                shift[name] = torch.randn(values.shape, generator=generator) * values.std()
            return values * 1.15 + step * shift[name]

        return inner

    with trial.rounded(moved(0.0)):
        slopes = trial.slopes(range(4))
    foretold = sum(
        float((torch.from_numpy(slope) * shift[name].permute(trial.roles[name].order)).sum())
        for name, slope in slopes.items()
    )
    step = 1e-4  # small enough that no token is routed to another expert
    damage = []
    for sign in (-1, 1):
        with trial.rounded(moved(sign * step)):
            damage.append(trial.losses(range(4)).mean())
    assert (damage[1] - damage[0]) / (2 * step) == pytest.approx(foretold, rel=0.1)
    assert len(slopes) == len(shift)


def test_what_is_not_finite_is_named_with_the_way_around_it(tmp_path: Path) -> None:
    trial = trial_of("llama", tmp_path)

    def broken(name: str, values: torch.Tensor) -> torch.Tensor:
        return values * float("inf") if "layers.1.mlp.down_proj" in name else values

    with trial.rounded(broken):
        assert np.isinf(trial.losses([0])).any()
        with pytest.raises(ModelError, match=r"the output of the rounded model. Leave .* with --rounds 0"):
            trial.slopes([0])
    assert not any(module._forward_hooks for module in trial.loaded.model.modules())


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_of_one_window_nothing_is_kept_that_cannot_be_varied_nor_anything_unless_asked(
    case: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(save_tiny(case, tmp_path))
    loaded, roles = load_model(checkpoint, "cpu", "float32"), bind(checkpoint).roles
    one = TextSample("made up", WINDOWS[:1], 40, (0, 0))
    assert (calibrate(loaded, checkpoint, roles, one, keep=True).trial is None) == (case == "bert")
    assert calibrate(loaded, checkpoint, roles, SAMPLE).trial is None


def test_the_copy_of_the_weights_is_used_again_and_the_model_is_whole_after_an_error(tmp_path: Path) -> None:
    trial = trial_of("llama", tmp_path)
    parameters = dict(trial.loaded.model.named_parameters())
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in parameters.items()}
    places = []
    for _ in range(2):
        with trial.rounded(rounding):
            places.append([parameter.data_ptr() for parameter in parameters.values()])
    assert places[0] == places[1] != [place for place, _ in before.values()]

    def broken(name: str, values: torch.Tensor) -> torch.Tensor:
        raise ValueError(name)

    with pytest.raises(ValueError, match="proj"), trial.rounded(broken):
        pass
    assert all(
        parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
        for name, parameter in parameters.items()
    )
