"""Replayed runs against whole ones, bit by bit, for every kind of layer; and that nothing is left on the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_tiny import tiny_checkpoint, tiny_sample
from tiny_models import make_model

from vrscope.fragility.replay import Replay
from vrscope.quant.formats import get_format
from vrscope.quant.layers import quantized, quantized_weights
from vrscope.quant.loading import LoadedModel, load_model

CASES = ["llama", "llama-tied", "mixtral", "gpt2", "opt", "bert", "gemma3", "gpt_neox"]


@pytest.mark.parametrize(("case", "scheme"), [*((case, "nf4") for case in CASES), ("llama", "int8"), ("gpt2", "int8")])
def test_a_replay_is_the_whole_run_to_the_last_bit(case: str, scheme: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(case, tmp_path)
    loaded, sample, entry = load_model(checkpoint, "cpu", "float32"), tiny_sample(checkpoint), get_format(scheme)
    weights = [weight for weight in quantized_weights(loaded.model) if not weight.name.startswith("pooler")]
    replay = Replay.of(loaded, weights)
    outputs = [replay.reference(window) for window in sample.windows]
    assert replay.calls == 2
    skipped = 0
    for weight in weights:
        first = replay.first_call([weight])
        skipped += first
        with quantized(loaded.model, entry, [weight]):
            for index, window in enumerate(sample.windows):
                found = replay.run(index, window, first)
                assert torch.equal(found, loaded.run(window))
                if weight.parameter.ndim == 2 or scheme == "nf4":
                    assert not torch.equal(found, outputs[index])
    assert skipped == len(weights) / 2, "weights of the second layer start at the second call"
    assert not any("forward" in layer.__dict__ for layer in loaded.model.modules())


def test_replayed_calls_really_are_left_out(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path)
    loaded, window = load_model(checkpoint, "cpu", "float32"), tiny_sample(checkpoint).windows[0]
    replay = Replay.of(loaded, quantized_weights(loaded.model))
    replay.reference(window)
    seen: list[str] = []
    for name, layer in loaded.model.named_modules():
        if name.endswith("mlp"):
            layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    for first, expected in ((0, [0, 1]), (1, [1]), (2, [])):
        seen.clear()
        replay.run(0, window, first)
        assert seen == [f"model.layers.{layer}.mlp" for layer in expected]


def test_a_weight_outside_the_layers_takes_a_whole_run(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert", tmp_path)
    loaded = load_model(checkpoint, "cpu", "float32")
    weights = quantized_weights(loaded.model)
    replay = Replay.of(loaded, weights)
    replay.reference(tiny_sample(checkpoint).windows[0])
    pooler = next(weight for weight in weights if weight.name.startswith("pooler"))
    last = next(weight for weight in weights if ".1." in weight.name)
    assert replay.first_call([last]) == 1 and replay.first_call([last, pooler]) == 0


class Shares(torch.nn.Module):
    """A layer that hands something to a later one, beside what it returns."""

    def __init__(self, layer: torch.nn.Module, box: dict[str, torch.Tensor], last: bool) -> None:
        super().__init__()
        self.layer, self.box, self.last = layer, box, last

    def forward(self, *arguments: object, **keywords: object) -> torch.Tensor:
        output = self.layer(*arguments, **keywords)
        if self.last:
            return output + self.box["first"]
        self.box["first"] = output
        return output


def test_layers_that_keep_state_are_not_replayed() -> None:
    model, box = make_model("llama").eval().requires_grad_(False), {}
    first, last = model.model.layers
    model.model.layers = torch.nn.ModuleList([Shares(first, box, False), Shares(last, box, True)])
    replay = Replay.of(LoadedModel("stateful", model, True, "cpu"), quantized_weights(model))
    assert replay.layers == () and replay.calls == 0
    replay.reference((3, 4, 5))
    assert replay.tapes == [None] and replay.first_call(quantized_weights(model)) == 0


def test_a_layer_used_several_times_starts_at_its_first_call() -> None:
    model = make_model("llama").eval().requires_grad_(False)
    first, second = model.model.layers
    model.model.layers = torch.nn.ModuleList([first, second])
    model.model.config.num_hidden_layers = 4
    first.self_attn.layer_idx = second.self_attn.layer_idx = 0
    model.model.layers.extend([first, second])
    loaded = LoadedModel("looped", model, True, "cpu")
    weights = quantized_weights(model)
    replay = Replay.of(loaded, weights)
    expected = replay.reference((3, 4, 5))
    assert replay.calls == 4
    for weight, call in ((weights[0], 0), (weights[-1], 1)):
        assert replay.first_call([weight]) == call
        with quantized(model, get_format("nf4"), [weight]):
            found = replay.run(0, (3, 4, 5), call)
            assert torch.equal(found, loaded.run((3, 4, 5))) and not torch.equal(found, expected)


def test_windows_beyond_the_room_are_run_whole(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path)
    loaded, sample = load_model(checkpoint, "cpu", "float32"), tiny_sample(checkpoint)
    replay = Replay.of(loaded, quantized_weights(loaded.model))
    replay.room_bytes = 2 * 32 * 64 * 4  # one window: 2 layers, 32 tokens, 64 channels
    outputs = [replay.reference(window) for window in sample.windows]
    assert [tape is not None for tape in replay.tapes] == [True, False, False]
    for index, window in enumerate(sample.windows):
        assert torch.equal(replay.run(index, window, 2), outputs[index])


def test_an_error_within_a_run_leaves_the_layers_as_they_were(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path)
    loaded, window = load_model(checkpoint, "cpu", "float32"), tiny_sample(checkpoint).windows[0]
    replay = Replay.of(loaded, quantized_weights(loaded.model))
    replay.reference(window)
    handle = loaded.model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replay.run(0, window, 1)
    handle.remove()
    assert not any("forward" in layer.__dict__ for layer in loaded.model.modules())
