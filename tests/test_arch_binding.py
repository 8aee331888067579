"""Binding: spaces as the symmetry rules demand, and refusals that name the tensor."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, save_tiny

from vrscope.arch.binding import bind
from vrscope.arch.families import families
from vrscope.arch.spaces import by_tensor
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import CheckpointError, FamilyError, PlanError
from vrscope.rescale.plan import RescalePlan
from vrscope.rescale.scaling import tensor_scales

# Tensors that some files lack, and that no scale depends on.
OPTIONAL = {
    **dict.fromkeys(["gemma3-multimodal", "mistral3", "qwen2_vl", "qwen2_5_vl"], "vision_tower|multi_modal|visual"),
    "granite_swa": "sinks",
    **dict.fromkeys(["t5", "t5-gated", "mt5", "umt5"], "relative_attention_bias"),
    "apertus": r"act_fn\.(beta|eps)",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "model")


def edited(source, folder, change=None, **config):
    """Return a copy of a checkpoint with tensors changed by `change(dict)` and config keys replaced."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def spaces_of(folder):
    return {space.name: space for space in bind(open_checkpoint(folder)).spaces}


def test_llama_spaces_have_the_finest_exact_granularity(llama):
    spaces = spaces_of(llama)
    layer = "model.layers.1:"
    assert (spaces[layer + "q"].rule, spaces[layer + "q"].shape) == ("q.k", (2, 8))  # KV group x RoPE pair
    assert (spaces[layer + "v"].rule, spaces[layer + "v"].shape) == ("v.o", (2, 16))  # KV group x channel
    assert (spaces[layer + "up"].rule, spaces[layer + "up"].shape) == ("up.down", (96,))
    assert (spaces[layer + "x1"].rule, spaces[layer + "x1"].shape) == ("norm fold", (64,))
    assert (spaces["xf"].rule, spaces["xf"].shape) == ("norm fold", (64,))
    assert len(spaces) == 11


def test_every_reader_of_a_norm_follows_it(llama):
    readers = {term.tensor for term in spaces_of(llama)["model.layers.0:x1"].terms if term.power < 0}
    assert readers == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"}


def test_router_and_all_experts_follow_the_norm(tmp_path):
    spaces = spaces_of(save_tiny("mixtral", tmp_path / "m"))
    readers = {
        term.tensor.split("block_sparse_moe.")[-1] for term in spaces["model.layers.0:x2"].terms if term.power < 0
    }
    experts = {f"experts.{x}.{w}.weight" for x in range(4) for w in ("w1", "w3")}
    assert readers == {"gate.weight"} | experts
    assert spaces["model.layers.0:eup3"].rule == "up.down"


def test_rope_pairs_are_half_a_head_apart_and_biases_follow(llama):
    space = spaces_of(llama)["model.layers.0:q"]
    terms = {term.tensor.rsplit("self_attn.", 1)[-1]: term for term in space.terms}
    assert set(terms) == {"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"}
    rows = terms["q_proj.weight"].index.reshape(2, 2, 16)  # KV group, query head, channel
    assert np.array_equal(rows[..., :8], rows[..., 8:])
    assert np.array_equal(rows[:, 0], rows[:, 1])  # query heads of a group share
    assert (terms["q_proj.weight"].power, terms["k_proj.weight"].power) == (1, -1)
    assert terms["k_proj.bias"].index.shape == (32,)


def test_attention_output_columns_repeat_the_group_of_v(llama):
    space = spaces_of(llama)["model.layers.0:v"]
    columns = next(term for term in space.terms if term.tensor.endswith("o_proj.weight")).index.reshape(2, 2, 16)
    assert np.array_equal(columns[:, 0], columns[:, 1])
    assert np.array_equal(columns[:, 0].reshape(-1), np.arange(32))


def test_qk_norm_moves_the_pair_to_the_gains(tmp_path):
    space = spaces_of(save_tiny("qwen3", tmp_path / "m"))["model.layers.0:q"]
    assert (space.rule, space.shape) == ("q.k gains", (8,))
    assert {term.tensor.rsplit("self_attn.", 1)[-1] for term in space.terms} == {"q_norm.weight", "k_norm.weight"}


def test_gpt2_is_transposed_and_fused_without_rope(tmp_path):
    spaces = spaces_of(save_tiny("gpt2", tmp_path / "m"))
    space = spaces["transformer.h.0:v"]
    terms = {term.tensor.split(".attn.")[-1]: term for term in space.terms}
    columns = terms["c_attn.weight"].index
    assert columns.shape == (1, 192)
    assert (columns[0, :128] == -1).all() and np.array_equal(columns[0, 128:], np.arange(64))
    assert terms["c_proj.weight"].index.shape == (64, 1)
    assert spaces["transformer.h.0:q"].size == 64  # per channel: positions are learned, not rotated
    assert not any(space.rule == "fc1.fc2" for space in spaces.values())  # GELU


def test_relu_makes_the_mlp_free(tmp_path):
    space = spaces_of(save_tiny("opt", tmp_path / "m"))["model.decoder.layers.0:fc"]
    assert space.rule == "fc1.fc2"
    assert {term.power for term in space.terms} == {1, -1}


def test_post_norm_encoders_have_no_norm_folds(tmp_path):
    binding = bind(open_checkpoint(save_tiny("bert", tmp_path / "m")))
    assert {space.rule for space in binding.spaces} == {"q.k", "v.o"}
    assert any("residual stream" in reason for _, reason in binding.rigid)


def test_a_tied_head_keeps_the_final_norm(tmp_path, llama):
    assert "xf" in spaces_of(llama)
    assert "xf" not in spaces_of(save_tiny("llama-tied", tmp_path / "tied"))
    binding = bind(open_checkpoint(edited(llama, tmp_path / "said", tie_word_embeddings=True)))
    assert "xf" not in {
        space.name for space in binding.spaces
    }  # the config is believed, though a head lies in the file
    assert dict(binding.rigid)["xf"].startswith("feeds the output head")


def test_one_plus_w_gains_are_marked_inexact(tmp_path):
    spaces = spaces_of(save_tiny("gemma2", tmp_path / "m"))
    assert not spaces["model.layers.0:x1"].exact and spaces["model.layers.0:v"].exact


def test_roles_name_heads_and_orientation(tmp_path, llama):
    roles = bind(open_checkpoint(llama)).roles
    q, k = (roles[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert (q.role, q.layer, q.kind, q.dims) == ("self_attn.q_proj", 0, "linear", ("out", "in"))
    assert (q.heads[0].unit, q.heads[0].count) == ("head", 4)
    assert (k.heads[0].unit, k.heads[0].count) == ("kv group", 2)
    assert roles["lm_head.weight"].kind == "head" and roles["model.embed_tokens.weight"].kind == "embed"
    fused = bind(open_checkpoint(save_tiny("gpt2", tmp_path / "m"))).roles["transformer.h.0.attn.c_attn.weight"]
    assert fused.dims == ("in", "out") and [split.part for split in fused.heads] == ["q", "k", "v"]


@pytest.mark.parametrize("case", MODELS)
def test_every_tensor_has_a_role_and_every_index_fits(case, tmp_path):
    checkpoint = open_checkpoint(save_tiny(case, tmp_path / "m"))
    binding = bind(checkpoint)
    assert set(binding.roles) == set(checkpoint.tensors)
    for tensor, uses in by_tensor(binding.spaces).items():
        for space, term in uses:
            assert (
                np.broadcast_shapes(term.index.shape, checkpoint.tensors[tensor].shape)
                == checkpoint.tensors[tensor].shape
            )
            assert term.index.max() < space.size and term.index.min() >= -1


def test_a_layer_with_a_dense_and_an_expert_mlp_is_refused(tmp_path):
    folder = save_tiny("qwen3_moe", tmp_path / "m")
    dense = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]

    def both(tensors):
        tensors.update({f"model.layers.1.{name}": tensors[f"model.layers.0.{name}"].clone() for name in dense})

    with pytest.raises(FamilyError, match=r"one of mlp\.gate_proj, mlp\.gate, found several"):
        bind(open_checkpoint(edited(folder, tmp_path / "both", both)))

    def neither(tensors):
        for name in dense:
            del tensors[f"model.layers.0.{name}"]

    with pytest.raises(FamilyError, match="found none"):
        bind(open_checkpoint(edited(folder, tmp_path / "neither", neither)))


@pytest.mark.parametrize(("case", "free"), [("gpt_neox", 14), ("stablelm", 14), ("glm", 12), ("phi", 12), ("llama", 8)])
def test_a_config_silent_on_the_rotated_share_means_the_default_of_its_class(case, free, tmp_path):
    """Quarter, quarter, half, half and all of 16 channels are rotated in pairs."""
    folder = save_tiny(case, tmp_path / "m")
    spaces = spaces_of(edited(folder, tmp_path / "silent", rope_parameters=None, partial_rotary_factor=None))
    assert {space.shape[-1] for space in spaces.values() if space.rule == "q.k"} == {free}


def test_latent_attention_has_three_kinds_of_scales(tmp_path):
    spaces = spaces_of(save_tiny("deepseek_v3", tmp_path / "m"))
    layer = "model.layers.0:"
    assert spaces[layer + "qn"].shape == (4, 16)  # per head and channel: not rotated
    assert spaces[layer + "qr"].shape == (4,)  # the rotated key is one for all heads
    assert spaces[layer + "v"].shape == (4, 12)
    rows = next(t for t in spaces[layer + "qr"].terms if t.tensor.endswith("q_b_proj.weight")).index.reshape(4, 24)
    assert (rows[:, :16] == -1).all() and rows[:, 16:].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 4
    latent = {term.tensor.rsplit(".", 2)[-2] for term in spaces[layer + "xc"].terms}
    assert latent == {"kv_a_layernorm", "kv_b_proj"}


def test_every_cross_attention_follows_the_encoder(tmp_path):
    readers = {term.tensor for term in spaces_of(save_tiny("whisper", tmp_path / "m"))["mem"].terms if term.power < 0}
    assert readers == {f"model.decoder.layers.{n}.encoder_attn.{kv}_proj.weight" for n in range(3) for kv in "kv"}


def test_what_a_clamp_or_an_unknown_function_touches_is_named(tmp_path):
    rigid = dict(bind(open_checkpoint(save_tiny("gpt_oss", tmp_path / "m"))).rigid)
    assert rigid["model.layers.0:eup"] == "at the clamped gate, which no scale passes through"
    assert rigid["res"].startswith("the residual stream")


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name, shape=(4,)):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add("model.layers.0.self_attn.stray.weight"), "'model.layers.0.self_attn.stray.weight'"),
        (add("model.layers.00.self_attn.q_proj.weight"), "not claimed"),
        (add("model.layers.2.input_layernorm.weight", (64,)), "one more"),
        (add("model.layers.0.self_attn.q_norm.weight", (16,)), "not claimed"),
        (add("model.layers.0.input_layernorm.bias", (64,)), "not claimed"),
        (drop("model.layers.1.mlp.gate_proj.weight"), "model.layers.1.mlp.gate_proj"),
        (drop("model.norm.weight"), "model.norm"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(95, 64)}), "expects"),
        (lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(48, 64)}), "self_attn.k_proj"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(96)}), "dimensions"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, llama, change, words):
    folder = edited(llama, tmp_path / "edited", change)
    with pytest.raises(FamilyError) as caught:
        bind(open_checkpoint(folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


HEADS = r"lm_head|embed_out|proj_out|vocab_|pooler|classifier|cls\."


@pytest.mark.parametrize("case", MODELS)
def test_a_missing_tensor_is_refused_by_every_family(case, tmp_path):
    """Every weight of the body in turn: a declaration that does not miss it could be of another architecture."""
    checkpoint = open_checkpoint(save_tiny(case, tmp_path / "m"))
    for name in checkpoint.tensors:
        if name.endswith("bias") or re.search(HEADS, name) or re.search(OPTIONAL.get(case, "^$"), name):
            continue
        if re.search(r"\.experts\.[0-2]\.", name) or re.search(r"layers?\.[1-9]\.(?!.*(attn|mamba))", name):
            continue  # enough of them
        kept = {other: info for other, info in checkpoint.tensors.items() if other != name}
        with pytest.raises(FamilyError):
            bind(dataclasses.replace(checkpoint, tensors=kept))


@pytest.mark.parametrize("case", MODELS)
def test_a_stray_tensor_is_refused_by_every_family(case, tmp_path):
    checkpoint = open_checkpoint(save_tiny(case, tmp_path / "m"))
    first = next(iter(checkpoint.tensors.values()))
    stray = dataclasses.replace(first, name="model.layers.0.mlp.extra_proj.weight")
    with pytest.raises(FamilyError, match="extra_proj"):
        bind(dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, stray.name: stray}))


def test_missing_expert_is_refused(tmp_path):
    folder = save_tiny("mixtral", tmp_path / "m")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    with pytest.raises(FamilyError, match="same experts"):
        bind(open_checkpoint(edited(folder, tmp_path / "edited", drop(name))))


def test_config_without_layer_count_or_with_too_few_is_refused(tmp_path, llama):
    with pytest.raises(FamilyError, match="number of layers"):
        bind(open_checkpoint(edited(llama, tmp_path / "a", num_hidden_layers=None)))
    with pytest.raises(FamilyError, match="one more"):
        bind(open_checkpoint(edited(llama, tmp_path / "b", num_hidden_layers=1)))


def test_a_rotary_share_that_the_model_does_not_read_changes_nothing(tmp_path, llama):
    """Llama rotates the whole head whatever its config says; believing the key would free channels that are tied."""
    for number, more in enumerate(
        [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}]
    ):
        spaces = spaces_of(edited(llama, tmp_path / str(number), **more))
        assert spaces["model.layers.0:q"].shape == (2, 8)


@pytest.mark.parametrize(
    ("case", "config", "words"),
    [
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("bert", {"position_embedding_type": "relative_key_query"}, "position_embedding_type"),
        ("mixtral", {"num_local_experts": 2}, "experts"),
        ("phi3", {"partial_rotary_factor": 2.0, "rope_parameters": None}, "share"),
    ],
)
def test_a_config_that_means_another_model_is_refused(tmp_path, case, config, words):
    folder = save_tiny(case, tmp_path / "m")
    with pytest.raises(FamilyError, match=words):
        bind(open_checkpoint(edited(folder, tmp_path / "edited", **config)))


def test_one_tensor_under_two_names_is_refused(tmp_path):
    folder = save_tiny("bert", tmp_path / "m")
    name = "embeddings.LayerNorm"
    with pytest.raises(FamilyError, match="expects one weight"):
        bind(open_checkpoint(edited(folder, tmp_path / "edited", add(f"{name}.gamma", (64,)))))


def test_quantized_checkpoints_are_refused(tmp_path, llama):
    folder = edited(llama, tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="already quantized"):
        bind(open_checkpoint(folder))


def test_bert_binds_with_and_without_prefix_and_with_old_norm_names(tmp_path):
    folder = save_tiny("bert", tmp_path / "m")

    def rename(rule):
        def change(tensors):
            for name in list(tensors):
                tensors[rule(name)] = tensors.pop(name)

        return change

    bare = bind(open_checkpoint(folder))
    prefixed = bind(open_checkpoint(edited(folder, tmp_path / "p", rename(lambda name: f"bert.{name}"))))
    old = rename(lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    aged = bind(open_checkpoint(edited(folder, tmp_path / "o", old)))
    assert len(bare.spaces) == len(prefixed.spaces) == len(aged.spaces) == 4
    assert prefixed.spaces[0].name.startswith("bert.encoder")


def test_families_cover_the_rules():
    assert {family.name for family in families()} >= {
        "llama", "qwen2", "qwen3", "mixtral", "gemma2", "gemma3", "gpt2", "opt", "opt_postln", "bert",
    }  # fmt: skip


def test_scales_may_be_negative_where_everything_between_is_linear(tmp_path):
    llama, opt = (bind(open_checkpoint(save_tiny(case, tmp_path / case))) for case in ("llama", "opt"))
    assert {space.rule for space in llama.spaces if space.signed} == {"q.k", "v.o", "up.down", "norm fold"}
    assert all(space.signed for space in llama.spaces)
    assert {space.rule for space in opt.spaces if not space.signed} == {"fc1.fc2"}  # behind a ReLU
    loose = bind(open_checkpoint(tmp_path / "llama"), approximate=True)
    assert not any(space.signed for space in loose.spaces if space.limit is not None)


def test_a_plan_with_a_sign_behind_a_relu_is_refused(tmp_path):
    checkpoint = open_checkpoint(save_tiny("opt", tmp_path / "opt"))
    binding = bind(checkpoint)
    space = next(space for space in binding.spaces if space.rule == "fc1.fc2")
    signs = {space.name: np.ones(space.size, bool)}
    plan = RescalePlan("gpt2", "none", {}, "pow2", {space.name: np.zeros(space.size, np.int64)}, "", negative=signs)
    with pytest.raises(PlanError, match="negative scales, but a ReLU"):
        tensor_scales(binding, plan)
