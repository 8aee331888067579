"""Which weights are units, under which names, and what is left out and named as kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_tiny import tiny_checkpoint

from vrscope import stages
from vrscope.activations.capture import SiteMap, find_sites
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.fragility.units import LINEAR_COLUMNS, OUTSIDE, Linear, find_linears, group, kept_modules, linear_table
from vrscope.quant.formats import get_format
from vrscope.quant.loading import LoadedModel, load_model


def found(case: str, folder: Path, scheme: str = "nf4") -> tuple[Checkpoint, LoadedModel, list[Linear]]:
    checkpoint = tiny_checkpoint(case, folder)
    loaded = load_model(checkpoint, "cpu", "float32")
    return checkpoint, loaded, linears_of(checkpoint, loaded, scheme)


def linears_of(checkpoint: Checkpoint, loaded: LoadedModel, scheme: str = "nf4") -> list[Linear]:
    roles, _ = stages.read_roles(checkpoint)
    return find_linears(loaded, checkpoint, roles, get_format(scheme), find_sites(loaded, checkpoint, roles))


def test_each_linear_weight_of_a_llama_is_a_unit_with_role_layer_and_size(tmp_path: Path) -> None:
    checkpoint, loaded, linears = found("llama", tmp_path)
    assert len(linears) == 14 and all(linear.stored for linear in linears)
    for linear in linears:
        info = checkpoint.tensors[linear.tensor]
        assert linear.tensor == f"{linear.module}.weight"
        assert (linear.size_bytes, linear.count) == (info.size_bytes, info.numel)
        assert linear.columns == info.shape[1]
        assert linear.tensor == f"model.layers.{linear.layer}.{linear.role}.weight"
    assert kept_modules(loaded.model, linears) == ["lm_head"]


def test_units_by_layer_and_role_hold_every_weight_once(tmp_path: Path) -> None:
    _, _, linears = found("llama", tmp_path)
    layers, roles = group(linears, "layer"), group(linears, "role")
    assert [unit.name for unit in layers] == ["layer 0", "layer 1"] and [unit.layer for unit in layers] == [0, 1]
    assert len(roles) == 7 and all(unit.layer is None and unit.role == unit.name for unit in roles)
    for units in (layers, roles, group(linears, "tensor")):
        assert sorted(linear.tensor for unit in units for linear in unit.linears) == sorted(x.tensor for x in linears)


def test_the_pooler_of_an_encoder_is_kept_as_nothing_measured_reads_it(tmp_path: Path) -> None:
    _, loaded, linears = found("bert", tmp_path)
    assert not any("pooler" in linear.tensor for linear in linears)
    assert kept_modules(loaded.model, linears) == ["pooler.dense"]


def test_transposed_weights_have_their_inputs_as_columns(tmp_path: Path) -> None:
    _, _, linears = found("gpt2", tmp_path)
    shapes = {linear.role: linear.columns for linear in linears}
    assert shapes["mlp.c_proj"] == 4 * shapes["mlp.c_fc"]


def test_stacked_experts_are_one_unit_each_and_none_for_a_format_that_leaves_them(tmp_path: Path) -> None:
    _, _, linears = found("mixtral", tmp_path)
    stacked = [linear for linear in linears if linear.stacked]
    assert {linear.layer for linear in stacked} == {0, 1} and len(stacked) == 4
    assert all(linear.size_bytes == 4 * linear.count for linear in stacked)
    frame = linear_table(group(linears, "tensor"))
    assert list(frame.columns) == [column.name for column in LINEAR_COLUMNS]
    assert frame["stacked"].sum() == 4 and (frame.loc[frame["stacked"], "parts"] > 1).all()
    _, _, plain = found("mixtral", tmp_path / "other", "int8")
    assert len(plain) == len(linears) - 4


def test_a_stack_of_experts_is_made_of_the_tensors_on_disk_that_hold_it(tmp_path: Path) -> None:
    checkpoint, _, linears = found("mixtral", tmp_path)
    stacks = {linear.tensor: linear for linear in linears if linear.stacked}
    assert stacks.keys() == {
        f"model.layers.{k}.mlp.experts.{end}" for k in (0, 1) for end in ("gate_up_proj", "down_proj")
    }
    for layer in (0, 1):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        joint, down = (stacks[f"model.layers.{layer}.mlp.experts.{end}"] for end in ("gate_up_proj", "down_proj"))
        assert set(joint.sources) == {f"{experts}.{k}.{end}.weight" for k in range(4) for end in ("w1", "w3")}
        assert set(down.sources) == {f"{experts}.{k}.w2.weight" for k in range(4)}
        assert joint.size_bytes == sum(checkpoint.tensors[name].size_bytes for name in joint.sources)
        assert not joint.stored and joint.layer == layer
    plain = [linear for linear in linears if not linear.stacked]
    assert all(linear.sources == (linear.tensor,) and linear.tensor in checkpoint.tensors for linear in plain)


@pytest.mark.parametrize(("case", "ending"), [("phi3", "qkv_proj.weight"), ("gpt2", "c_attn.weight")])
def test_fused_tensors_are_found_under_their_names_on_disk(case: str, ending: str, tmp_path: Path) -> None:
    checkpoint, _, linears = found(case, tmp_path)
    assert all(linear.sources == (linear.tensor,) and linear.tensor in checkpoint.tensors for linear in linears)
    assert sum(linear.tensor.endswith(ending) for linear in linears) == 2


def test_stacks_that_are_stored_as_such_keep_their_names(tmp_path: Path) -> None:
    checkpoint, _, linears = found("gpt_oss", tmp_path)
    stacked = [linear for linear in linears if linear.stacked]
    assert len(stacked) == 4 and all(linear.stored and linear.tensor in checkpoint.tensors for linear in stacked)


def test_weights_that_differ_from_those_on_disk_are_not_taken_for_them(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("mixtral", tmp_path)
    loaded = load_model(checkpoint, "cpu", "float32")
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.experts.gate_up_proj[2, 5:9] += 1.0
        loaded.model.model.layers[1].self_attn.q_proj.weight += 1.0
    linears = {linear.tensor: linear for linear in linears_of(checkpoint, loaded)}
    changed = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj.weight"]
    assert [name for name, linear in linears.items() if not linear.sources] == sorted(changed)
    for name in changed:
        assert linears[name].size_bytes == 4 * linears[name].count, "taken to be stored as the other weights are"


def test_a_stored_name_with_a_prefix_is_found(tmp_path: Path) -> None:
    from builders import write_safetensors

    from vrscope.checkpoint.source import open_checkpoint

    checkpoint = tiny_checkpoint("bert", tmp_path)
    weights = {f"bert.{name}": checkpoint.read(name) for name in checkpoint.tensors}
    write_safetensors(tmp_path / "model.safetensors", weights, {"format": "pt"})
    renamed = open_checkpoint(tmp_path)
    loaded = load_model(renamed, "cpu", "float32")
    linears = linears_of(renamed, loaded)
    assert all(linear.stored and linear.tensor == f"bert.{linear.module}.weight" for linear in linears)


def test_what_stands_in_no_layer_has_a_unit_of_its_own_name(tmp_path: Path) -> None:
    _, _, linears = found("llama", tmp_path)
    outside = Linear("proj.weight", "proj", "proj", None, 4, ("proj.weight",), linears[0].weight)
    assert [unit.name for unit in group([outside, *linears], "layer")] == [OUTSIDE, "layer 0", "layer 1"]


def test_a_model_without_linear_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path)
    bare = torch.nn.Module()
    bare.get_input_embeddings = bare.get_output_embeddings = lambda: None
    loaded = LoadedModel("bare", bare, True, "cpu")
    with pytest.raises(ModelError, match=r"bare: expected linear layers .* found none that nf4") as refused:
        find_linears(loaded, checkpoint, {}, get_format("nf4"), SiteMap((), (), frozenset(), ()))
    assert "\n" not in str(refused.value)
