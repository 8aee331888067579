"""Which weights of a running model are quantized, that each gets the right figures, and that all come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from tiny_models import make_model

from vrscope.quant import bnb
from vrscope.quant.formats import FORMATS, get_format
from vrscope.quant.layers import kept_note, quantized, quantized_weights

TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])
CASES = ["llama", "llama-tied", "mixtral", "gpt2", "opt", "bert"]
FORMAT_NAMES = [entry.name for entry in FORMATS]


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=TOKENS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("case", "per_layer", "elsewhere"),
    [
        ("llama", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
         | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}, set()),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, set()),
        ("mixtral", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
         | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}, set()),
        ("opt", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}
         | {"fc1", "fc2"}, set()),
        ("bert", {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}
         | {"intermediate.dense", "output.dense"}, {"pooler.dense"}),
    ],
)  # fmt: skip
def test_all_linear_weights_but_the_head_are_found(case: str, per_layer: set[str], elsewhere: set[str]) -> None:
    found = [weight.name.removesuffix(".weight") for weight in quantized_weights(make_model(case))]
    short = {name.split(".0.")[-1] if ".0." in name else name.split(".1.")[-1] for name in found}
    assert short == per_layer | elsewhere
    assert len(found) == len(set(found)) == 2 * len(per_layer) + len(elsewhere)


def test_a_linear_layer_that_shares_the_embedding_is_left_alone() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.extra = torch.nn.Linear(64, 97, bias=False)
    model.model.layers[0].mlp.extra.weight = model.model.embed_tokens.weight
    assert not any("extra" in weight.name for weight in quantized_weights(model))


def test_stacked_parameters_of_unknown_orientation_are_left_alone() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.stack = torch.nn.Parameter(torch.ones(2, 8, 8))
    assert not any("stack" in weight.name for weight in quantized_weights(model))


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_change_while_quantized_and_everything_comes_back(case: str, name: str) -> None:
    model = make_model(case)
    before, weights, modules = run(model), state(model), dict(model.named_modules())
    with quantized(model, get_format(name)):
        assert not torch.equal(run(model), before)
    assert all(model.get_submodule(path) is module for path, module in modules.items())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model), before)
    with pytest.raises(KeyError), quantized(model, get_format(name)):
        raise KeyError
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("name", [entry.name for entry in FORMATS if not entry.activations])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_weight_is_its_round_trip_in_the_dtype_of_the_model(name: str, dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    layer = model.model.layers[1].mlp.down_proj
    expected = get_format(name).roundtrip(layer.weight.float()).to(dtype)
    kept = {key: value.clone() for key, value in model.state_dict().items() if not key.endswith("proj.weight")}
    with quantized(model, get_format(name)):
        assert torch.equal(layer.weight, expected)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())


def test_a_transposed_weight_is_quantized_along_its_inputs() -> None:
    model = make_model("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight  # (in, out)
    expected = get_format("int4-g32").roundtrip(weight.T.contiguous()).T
    with quantized(model, get_format("int4-g32")):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("joint", ["halves", "pairs"])
def test_every_expert_and_each_of_gate_and_up_has_its_own_scale(joint: str) -> None:
    model = make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.is_concatenated = joint == "halves"
    entry = get_format("int8-tensor")
    stored = experts.gate_up_proj.data.clone()
    expected = torch.empty_like(stored)
    for expert in range(4):
        for part in (slice(0, 96), slice(96, 192)) if joint == "halves" else (slice(0, None, 2), slice(1, None, 2)):
            expected[expert, part] = entry.roundtrip(stored[expert, part].contiguous())
    down = torch.stack([entry.roundtrip(matrix) for matrix in experts.down_proj.data])
    with quantized(model, entry):
        assert torch.equal(experts.gate_up_proj, expected) and torch.equal(experts.down_proj, down)


def test_transposed_experts_are_quantized_along_their_inputs() -> None:
    model = make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.is_transposed = True  # as if (in, out): what is stored is then read the other way round
    entry = get_format("int8-row")
    expected = torch.stack([entry.roundtrip(matrix.T.contiguous()).T for matrix in experts.down_proj.data])
    with quantized(model, entry):
        assert torch.equal(experts.down_proj, expected)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_llm_int8_runs_bitsandbytes_layers_with_biases(case: str) -> None:
    from bitsandbytes.nn import Linear8bitLt

    model = make_model(case)
    count = len(quantized_weights(model))
    with quantized(model, get_format("int8")):
        layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
        assert len(layers) == count and {layer.state.threshold for layer in layers} == {6.0}
        assert any(layer.bias is not None for layer in layers)
        layer = layers[-1]
        with bnb.quiet(), torch.no_grad():
            layer(torch.ones(1, layer.in_features))
    original = quantized_weights(model)[-1]
    (matrix,) = original.matrices(original.parameter.data)
    codes, absmax, _ = functional.int8_vectorwise_quant(matrix.contiguous().half())
    assert torch.equal(layer.state.CB, codes) and torch.equal(layer.state.SCB, absmax)


def test_llm_int8_replaces_a_layer_under_all_its_names() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp.again = model.model.layers[0].mlp.up_proj
    original = model.model.layers[0].mlp.up_proj
    with quantized(model, get_format("int8")):
        assert model.model.layers[0].mlp.again is model.model.layers[1].mlp.up_proj is not original
    assert model.model.layers[0].mlp.again is model.model.layers[1].mlp.up_proj is original


def test_llm_int8_leaves_stacked_experts_alone_and_says_so() -> None:
    model = make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.clone()
    with quantized(model, get_format("int8")):
        assert torch.equal(experts.gate_up_proj, before)
    assert "leaves the stacked experts unquantized" in str(kept_note(model, get_format("int8")))
    assert kept_note(model, get_format("nf4")) is None
    assert kept_note(make_model("llama"), get_format("int8")) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("nf4-dq", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("int8", {"load_in_8bit": True}),
    ],
)
@pytest.mark.parametrize(("case", "width"), [("llama", "intermediate_size"), ("opt", "ffn_dim")])
def test_logits_equal_those_of_transformers_with_bitsandbytes(
    case: str, width: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """On processors with AVX-512, bitsandbytes 0.50 goes other ways, which are left out here.

    It loses track of blocks where a row is no whole number of them, and multiplies in bfloat16.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = make_model(case, **{width: 128})
    model.save_pretrained(tmp_path)
    compute = {"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in options else {}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**options, **compute),
        device_map="cpu",
        attn_implementation="eager",
    )
    entry = get_format(name)
    layers = {path: layer for path, layer in theirs.named_modules() if isinstance(layer, Linear4bit | Linear8bitLt)}
    assert {f"{path}.weight" for path in layers} == {weight.name for weight in quantized_weights(model)}
    for path, layer in layers.items():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            stored = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(stored, entry.roundtrip(model.get_submodule(path).weight.data))
    with bnb.quiet():
        expected = run(theirs)
        with quantized(model, entry):
            assert torch.equal(run(model), expected)
