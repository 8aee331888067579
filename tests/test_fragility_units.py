"""Which weights are units, under which names, and what is left out and named as kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_tiny import tiny_checkpoint

from vrscope import stages
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.fragility.units import LINEAR_COLUMNS, OUTSIDE, Linear, find_linears, group, kept_modules, linear_table
from vrscope.quant.formats import get_format
from vrscope.quant.loading import LoadedModel, load_model


def found(case: str, folder: Path, scheme: str = "nf4") -> tuple[Checkpoint, LoadedModel, list[Linear]]:
    checkpoint = tiny_checkpoint(case, folder)
    loaded = load_model(checkpoint, "cpu", "float32")
    roles, _ = stages.read_roles(checkpoint)
    return checkpoint, loaded, find_linears(loaded, checkpoint, roles, get_format(scheme))


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
    assert frame["stacked"].sum() == 4
    _, _, plain = found("mixtral", tmp_path / "other", "int8")
    assert len(plain) == len(linears) - 4


def test_a_stored_name_with_a_prefix_is_found(tmp_path: Path) -> None:
    from builders import write_safetensors

    from vrscope.checkpoint.source import open_checkpoint

    checkpoint = tiny_checkpoint("bert", tmp_path)
    weights = {f"bert.{name}": checkpoint.read(name) for name in checkpoint.tensors}
    write_safetensors(tmp_path / "model.safetensors", weights, {"format": "pt"})
    renamed = open_checkpoint(tmp_path)
    loaded = load_model(renamed, "cpu", "float32")
    linears = find_linears(loaded, renamed, stages.read_roles(renamed)[0], get_format("nf4"))
    assert all(linear.stored and linear.tensor == f"bert.{linear.module}.weight" for linear in linears)


def test_what_stands_in_no_layer_has_a_unit_of_its_own_name(tmp_path: Path) -> None:
    _, _, linears = found("llama", tmp_path)
    outside = Linear("proj.weight", "proj", "proj", None, 4, True, linears[0].weight)
    assert [unit.name for unit in group([outside, *linears], "layer")] == [OUTSIDE, "layer 0", "layer 1"]


def test_a_model_without_linear_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path)
    bare = torch.nn.Module()
    bare.get_input_embeddings = bare.get_output_embeddings = lambda: None
    loaded = LoadedModel("bare", bare, True, "cpu")
    with pytest.raises(ModelError, match=r"bare: expected linear layers .* found none that nf4") as refused:
        find_linears(loaded, checkpoint, {}, get_format("nf4"))
    assert "\n" not in str(refused.value)
