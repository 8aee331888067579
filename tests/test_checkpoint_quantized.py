"""Checkpoints that are already quantized are recognised, still open, and no ordinary one is taken for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_checkpoint

from vrscope.checkpoint.source import open_checkpoint

ORDINARY = {
    "model.embed_tokens.weight": torch.ones(4, 2),
    "model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "model.layers.0.input_layernorm.weight": torch.ones(2),
    "embeddings.position_ids": torch.arange(4).view(1, 4),
    "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
    "logit_scale": torch.ones(()),
    "layer_scale.lambda1": torch.ones(2),
    "norm.weight": torch.ones(2),
    "x_blocks": torch.ones(2),
    "rel_scales": torch.ones(2),
    "native.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
}


def _quantization(tmp_path: Path, config: dict[str, Any], **tensors: torch.Tensor) -> str | None:
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", ORDINARY | tensors, config))
    assert torch.equal(opened.read("norm.weight"), torch.ones(2))  # reading works all the same
    return opened.quantization


def _assert_sentence(found: str | None, *words: str) -> None:
    assert found is not None and found.endswith("already quantized.")
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["gptq", "4 bits"]),
        ({"quant_method": "awq", "w_bit": 4}, ["awq", "4 bits"]),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ["compressed-tensors"]),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ["fp8"]),
        ({"quant_method": "mxfp4"}, ["mxfp4"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, ["bitsandbytes"]),
        ({"load_in_8bit": True}, ["quantization_config"]),
        ({"quant_algo": "FP8"}, ["FP8"]),
    ],
)
def test_the_config_says_so(tmp_path: Path, settings: dict[str, Any], words: list[str]) -> None:
    _assert_sentence(_quantization(tmp_path / "a", {"quantization_config": settings}), "config.json", *words)
    nested = _quantization(tmp_path / "b", {"text_config": {"quantization_config": settings}})
    _assert_sentence(nested, "text_config.quantization_config")


def test_an_older_section_of_compressed_tensors_counts(tmp_path: Path) -> None:
    _assert_sentence(_quantization(tmp_path, {"compression_config": {"format": "int-quantized"}}), "int-quantized")


@pytest.mark.parametrize(
    "name",
    ["qweight", "qzeros", "weight_packed", "weight_scale_inv", "weight_scale", "weight_global_scale", "SCB",
     "weight.absmax", "weight.nested_absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "W_q",
     "k_scale", "v_scale", "weight._data"],
)  # fmt: skip
def test_a_tensor_name_says_so(tmp_path: Path, name: str) -> None:
    full = f"model.layers.0.self_attn.q_proj.{name}"
    _assert_sentence(_quantization(tmp_path, {}, **{full: torch.ones(2)}), full)


def test_blocks_with_scales_say_so(tmp_path: Path) -> None:
    pair = {
        "experts.up_blocks": torch.ones(2, dtype=torch.uint8),
        "experts.up_scales": torch.ones(2, dtype=torch.uint8),
    }
    _assert_sentence(_quantization(tmp_path, {}, **pair), "experts.up_blocks", "MXFP4")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integer_weight_matrices_say_so(tmp_path: Path, dtype: torch.dtype) -> None:
    _assert_sentence(_quantization(tmp_path, {}, **{"fc.weight": torch.ones(2, 2, dtype=dtype)}), "fc.weight")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}},
        {"vision_config": {"hidden_size": 3}},
    ],
)
def test_ordinary_checkpoints_are_not_taken_for_quantized(tmp_path: Path, config: dict[str, Any]) -> None:
    assert _quantization(tmp_path, config) is None


def test_the_sentence_is_printable(tmp_path: Path) -> None:
    found = _quantization(tmp_path, {"quantization_config": {"quant_method": "x\n\x1b[31m"}})
    assert found is not None and found.isprintable()
