"""Recipes as files, read by the tools they are for: bitsandbytes, compressed-tensors, llm-compressor, torchao, gguf."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_tiny import save_tokenizer
from tiny_models import make_model, save_tiny

from vrscope.errors import PlanError, UnknownNameError
from vrscope.fragility.gguf_names import gguf_patterns
from vrscope.fragility.targets import FULL, TARGETS, Choice, check_high, get_target
from vrscope.quant.formats import FORMATS
from vrscope.quant.layers import quantized_weights

KEPT = ("lm_head",)
# llmcompressor 0.14 asks for transformers <= 5.17 and compressed-tensors 0.19; torchao complains at every import.
ELSEWHERE = "is not installed with the other packages, which it does not fit: `make test-tools` runs this"


def choice_for(model: Any, low: str, high: str = FULL, kept: tuple[str, ...] = KEPT, every: int = 3) -> Choice:
    """Keep every third linear module of a model."""
    names = [weight.name.removesuffix(".weight") for weight in quantized_weights(model)]
    formats = {name: "low" if place % every else "high" for place, name in enumerate(names)}
    return Choice(low, high, formats, (), kept, model.config.model_type)


def written(target: str, choice: Choice) -> str:
    return get_target(target).write(choice)[0]


@pytest.mark.parametrize("target", [entry.name for entry in TARGETS])
def test_every_format_has_words_in_every_tool(target: str) -> None:
    model = make_model("llama")
    for entry in FORMATS:
        for high in (FULL, "int8", "int8-row"):
            text, notes = get_target(target).write(choice_for(model, entry.name, high))
            assert text.endswith("\n")
            assert all("\n" not in note and note.startswith(get_target(target).file) for note in notes)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'bitsandbytes'"):
        get_target("bitsandbyte")
    with pytest.raises(PlanError, match="expected bfloat16"):
        check_high("nf4")


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_transformers_loads_what_bitsandbytes_is_given(case: str, scheme: str, tmp_path: Path) -> None:
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny(case, tmp_path)
    choice = choice_for(make_model(case), scheme)
    arguments = json.loads(written("bitsandbytes", choice))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**arguments), device_map="cpu"
    )
    kind = bnb.nn.Linear8bitLt if scheme == "int8" else bnb.nn.Linear4bit
    modules = dict(model.named_modules())
    assert choice.modules("low") and choice.modules("high")
    for name in choice.modules("low"):
        assert isinstance(modules[name], kind), name
        assert scheme == "int8" or modules[name].weight.quant_type == scheme
    for name in (*choice.modules("high"), *KEPT):
        assert not isinstance(modules[name], bnb.nn.Linear8bitLt | bnb.nn.Linear4bit), name


def test_layers_whose_numbers_begin_alike_are_not_confused() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    formats = {f"model.layers.{k}.mlp.down_proj": "high" if k == 1 else "low" for k in range(25)}
    choice = Choice("nf4", FULL, formats, (), KEPT, "llama")
    skip = json.loads(written("bitsandbytes", choice))["llm_int8_skip_modules"]
    converted = [name for name in (*formats, *KEPT) if should_convert_module(name, skip)]
    assert converted == choice.modules("low")


def test_yaml_holds_hostile_names_as_they_are() -> None:
    yaml = pytest.importorskip("yaml")
    names = ['a"b', "c: d # e", "- f", "g\n  ignore: []", "\u2028h\\"]
    choice = Choice("int4-g64", FULL, dict(zip(names, ["low", "high"] * 3, strict=False)), (), ("x: y",), "llama")
    found = yaml.safe_load(written("llm-compressor", choice))["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    assert found["ignore"] == ["x: y", "c: d # e", "g\n  ignore: []"]
    assert found["config_groups"]["low"]["targets"] == ['a"b', "- f", "\u2028h\\"]


@pytest.mark.parametrize(
    ("low", "high"), [("int4-g32", FULL), ("int4-g32", "int8-row"), ("int8", FULL), ("w8a8", FULL)]
)
def test_compressed_tensors_applies_the_schemes_to_the_right_modules(low: str, high: str) -> None:
    yaml = pytest.importorskip("yaml")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = make_model("llama")
    choice = choice_for(model, low, high)
    read = yaml.safe_load(written("llm-compressor", choice))["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    config = quantization.QuantizationConfig(config_groups=read["config_groups"], ignore=read["ignore"])
    quantization.apply_quantization_config(model, config)
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    bits = {name: scheme.weights.num_bits for name, scheme in schemes.items() if scheme is not None}
    inputs = {"int8": "token", "w8a8": "tensor"}.get(low)
    expected = dict.fromkeys(choice.modules("low"), 8 if inputs else 4)
    assert bits == expected | (dict.fromkeys(choice.modules("high"), 8) if high != FULL else {})
    first = schemes[choice.modules("low")[0]]
    if inputs:
        assert first.input_activations.dynamic and first.input_activations.strategy == inputs
        assert first.weights.strategy == "channel"
    else:
        assert (first.weights.group_size, first.weights.symmetric, first.input_activations) == (32, False, None)


def test_llm_compressor_runs_the_recipe(tmp_path: Path) -> None:
    compressor = pytest.importorskip("llmcompressor", reason=f"llmcompressor {ELSEWHERE}")
    folder = tmp_path / "model"
    save_tiny("llama", folder)
    save_tokenizer(folder)
    before = make_model("llama").state_dict()
    choice = choice_for(make_model("llama"), "int4-g32", "int8-row")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(written("llm-compressor", choice))
    model = compressor.oneshot(model=str(folder), recipe=str(recipe))
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        which = choice.formats.get(name)
        assert (None if scheme is None else scheme.weights.num_bits) == {None: None, "low": 4, "high": 8}[which], name
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"].to(model.dtype))


def test_torchao_quantizes_the_modules_that_are_named() -> None:
    core = pytest.importorskip("torchao.core.config", reason=f"torchao {ELSEWHERE}")
    from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    model = make_model("llama")
    four = TorchAoConfig.from_dict(json.loads(written("torchao", choice_for(model, "int4-g64", "int8-row"))))
    assert isinstance(four.quant_type, FqnToConfig)
    choice = choice_for(model, "int8-row")
    for name, which in choice.formats.items():
        chosen = four.quant_type.fqn_to_config[name]
        assert isinstance(chosen, Int4WeightOnlyConfig if which == "low" else Int8WeightOnlyConfig)
        assert which == "high" or chosen.group_size == 64
    eight = core.config_from_dict(json.loads(written("torchao", choice))["quant_type"]["default"])
    before = {name: type(module.weight) for name, module in model.named_modules() if name in choice.formats}
    quantize_(model, eight, filter_fn=None)
    moved = [name for name in before if type(model.get_submodule(name).weight.data) is not torch.Tensor]
    assert moved == choice.modules("low")
    assert type(model.lm_head.weight.data) is torch.Tensor


@pytest.mark.parametrize("case", ["llama", "mixtral", "gpt2"])
def test_llama_cpp_is_called_with_one_type_for_every_tensor(case: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = make_model(case)
    choice = choice_for(model, "int4-g32", "int8-row")
    script, stand_in = tmp_path / "llama-cpp.sh", tmp_path / "quantize"
    script.write_text(written("llama.cpp", choice))
    stand_in.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["sh", script, "in put.gguf", "out.gguf"],
        env={**os.environ, "LLAMA_QUANTIZE": str(stand_in)},
        capture_output=True,
        text=True,
        check=True,
    )
    *flags, first, second, kind = done.stdout.splitlines()
    assert (first, second, kind) == ("in put.gguf", "out.gguf", "Q4_1")
    assert set(flags[::2]) == {"--tensor-type"}
    pairs = [flag.rsplit("=", 1) for flag in flags[1::2]]
    joint = sum(name.endswith("gate_up_proj") for name in choice.formats)
    assert len(pairs) == len(choice.formats) + joint
    plain = [re.sub(r"[\^\\$]", "", pattern) for pattern, _ in pairs]
    for pattern, _ in pairs:
        assert sum(re.search(pattern, name) is not None for name in plain) == 1, "each matches its own tensor only"
    assert sum(kind == "q8_0" for _, kind in pairs) >= len(choice.modules("high"))
    assert {kind for _, kind in pairs} == {"q8_0", "q4_1"}


def test_names_of_llama_cpp_are_those_of_its_own_map() -> None:
    pytest.importorskip("gguf")
    assert gguf_patterns("llama", "model.layers.12.mlp.down_proj") == [r"^blk\.12\.ffn_down\.weight$"]
    assert gguf_patterns("mistral", "model.layers.0.self_attn.q_proj") == [r"^blk\.0\.attn_q\.weight$"]
    assert len(gguf_patterns("mixtral", "model.layers.0.mlp.experts.gate_up_proj")) == 2
    assert re.search(gguf_patterns("qwen3_moe", "model.layers.1.self_attn.q_proj")[0], "blk.1.attn_q.weight")
    for other in ("blk.1.attn_q_norm.weight", "blk.11.attn_q.weight", "blk.1.attn_q.bias"):
        assert not re.search(gguf_patterns("qwen3_moe", "model.layers.1.self_attn.q_proj")[0], other)
    with pytest.raises(PlanError, match="found none in its name map"):
        gguf_patterns("llama", "model.layers.0.colour")
    with pytest.raises(PlanError, match=r"Leave llama\.cpp out of --for"):
        gguf_patterns("no_such_type", "model.layers.0.mlp.down_proj")
