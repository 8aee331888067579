"""The proof: it accepts what a plan makes and names whatever else it finds. And the writer keeps nothing unproved."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import CheckpointError, PlanError, VerificationError
from vrscope.executors import Serial
from vrscope.progress import silent
from vrscope.rescale import apply
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.plan import PLAN_FILE, RescalePlan
from vrscope.rescale.planning import make_plan
from vrscope.rescale.verify import prove


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A llama in bfloat16, its rescale by random powers of two, and the plan."""
    folder = tmp_path_factory.mktemp("pair")
    source = open_checkpoint(save_tiny("llama", folder / "a", torch.bfloat16))
    binding = bind(source)
    plan, _ = make_plan(source, binding, "random", MethodOptions(), Serial(), silent)
    return folder / "a", folder / "b", apply_plan(source, binding, plan, folder / "b", force=False, progress=silent)


def check(pair, other):
    source = open_checkpoint(pair[0])
    return prove(source, open_checkpoint(other), bind(source), pair[2], silent)


def tampered(pair, folder, change):
    shutil.copytree(pair[1], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_was_written_is_proved_element_by_element(pair):
    assert check(pair, pair[1]) == sum(info.numel for info in open_checkpoint(pair[0]).tensors.values())
    recorded = RescalePlan.load(pair[1] / PLAN_FILE)
    assert recorded.source == open_checkpoint(pair[0]).fingerprint()
    assert recorded.result == open_checkpoint(pair[1]).fingerprint() != recorded.source


def flip_last_bit(tensors, name="model.layers.1.mlp.up_proj.weight"):
    tensors[name].view(torch.int16)[-1, -1] ^= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_last_bit, "model.layers.1.mlp.up_proj.weight: is not the original times"),
        (lambda t: flip_last_bit(t, "lm_head.weight"), "lm_head.weight"),
        (lambda t: flip_last_bit(t, "model.embed_tokens.weight"), "same bytes"),
        (lambda t: t["model.layers.0.self_attn.q_proj.bias"].mul_(2), "q_proj.bias"),
        (lambda t: t["model.layers.0.self_attn.q_proj.weight"][0].neg_(), "q_proj.weight"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: only in"),
        (lambda t: t.update(extra=torch.ones(1)), "extra: only in"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}), "BF16 [64]"),
    ],
)
def test_one_changed_bit_is_found_and_named(pair, tmp_path, change, words):
    with pytest.raises(VerificationError) as caught:
        check(pair, tampered(pair, tmp_path / "b", change))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_message_says_where_and_by_how_much(pair, tmp_path):
    with pytest.raises(VerificationError, match=r"row 95, column 63: expected .*found"):
        check(pair, tampered(pair, tmp_path / "b", flip_last_bit))


def test_a_changed_config_is_found_but_not_who_saved_it(pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "0"}))
    check(pair, tmp_path / "b")
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(VerificationError, match="rms_norm_eps"):
        check(pair, tmp_path / "b")


def test_exponents_that_do_not_obey_the_spaces_are_refused(pair):
    source = open_checkpoint(pair[0])
    binding = bind(source)
    name = "model.layers.0:q"
    for spaces, words in [
        ({"model.layers.0:gate": np.ones(96, np.int64)}, "cannot be scaled: feeds the activation"),
        ({"model.layers.9:q": np.ones(16, np.int64)}, "is not a space"),
        ({name: np.ones(32, np.int64)}, "has 32 scales, expected 16"),
    ]:
        plan = RescalePlan("llama", "hand", {}, "pow2", spaces, source.fingerprint())
        with pytest.raises(PlanError, match=words):
            prove(source, open_checkpoint(pair[1]), binding, plan, silent)


def test_a_plan_for_another_checkpoint_is_refused(pair, tmp_path):
    other = open_checkpoint(save_tiny("llama", tmp_path / "other"))
    with pytest.raises(PlanError, match="made for checkpoint"):
        apply_plan(other, bind(other), pair[2], tmp_path / "out", force=False, progress=silent)
    back = open_checkpoint(pair[1])
    with pytest.raises(PlanError, match="--invert"):
        apply_plan(back, bind(back), pair[2], tmp_path / "out", force=False, progress=silent)
    assert not (tmp_path / "out").exists()


def test_a_copy_that_fails_its_proof_is_removed(pair, tmp_path, monkeypatch):
    source = open_checkpoint(pair[0])
    original = apply.scaled_bits

    def wrong(info, block, scale, room):
        bits = original(info, block, scale, room)
        return bits ^ bits.dtype.type(info.name.endswith("layers.1.mlp.down_proj.weight"))

    monkeypatch.setattr(apply, "scaled_bits", wrong)
    with pytest.raises(VerificationError, match="down_proj"):
        apply_plan(source, bind(source), pair[2], tmp_path / "out", force=False, progress=silent)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_tensor_no_space_touches_stops_the_rescale(tmp_path):
    folder = save_tiny("llama", tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(folder)
    binding = bind(source)
    plan, _ = make_plan(source, binding, "wisca", MethodOptions(), Serial(), silent)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight"):
        apply_plan(source, binding, plan, tmp_path / "out", force=False, progress=silent)
    assert not (tmp_path / "out").exists()


def test_free_scales_are_proved_to_be_rounded_once(tmp_path):
    source = open_checkpoint(save_tiny("llama", tmp_path / "a", torch.bfloat16))
    binding = bind(source)
    plan, _ = make_plan(source, binding, "random", MethodOptions(scales="free"), Serial(), silent)
    done = apply_plan(source, binding, plan, tmp_path / "b", force=False, progress=silent)
    assert prove(source, open_checkpoint(tmp_path / "b"), binding, done, silent) > 0
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    flip_last_bit(tensors)
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="rounded once"):
        prove(source, open_checkpoint(tmp_path / "b"), binding, done, silent)
