"""Synthetic checkpoints of any size: a bfloat16 Llama, and a mixture of experts with very many small tensors.

    python benchmarks/synthetic.py llama FOLDER BYTES
    python benchmarks/synthetic.py moe FOLDER TENSORS

The weights are stretches of one pool of normal numbers, scaled per tensor, so that writing is as fast as the disk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

SHARD_BYTES = 1 << 30
_POOL = 1 << 25
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
_MOE = _LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
}

Shapes = dict[str, tuple[int, ...]]


def make_llama(folder: Path, size_bytes: float) -> Path:
    """Write a Llama of about `size_bytes`, as many layers as it takes, and return its folder."""
    layer = sum(2 * _count(shape) for shape in _llama_layer(0).values())
    embed = 2 * _LLAMA["vocab_size"] * _LLAMA["hidden_size"]
    layers = max(1, round((size_bytes - embed) / layer))
    shapes = _outside(_LLAMA)
    for number in range(layers):
        shapes |= _llama_layer(number)
    return _write(folder, _LLAMA | {"num_hidden_layers": layers}, shapes)


def make_moe(folder: Path, tensors: float) -> Path:
    """Write a mixture of experts of about `tensors` tensors of 16 KB and return its folder."""
    layers = max(1, round(tensors / (3 * _MOE["num_experts"])))
    hidden, inner, experts = _MOE["hidden_size"], _MOE["moe_intermediate_size"], _MOE["num_experts"]
    shapes = _outside(_MOE)
    for number in range(layers):
        prefix = f"model.layers.{number}"
        shapes |= _attention(_MOE, prefix)
        shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (_MOE["head_dim"],) for name in ("q", "k")}
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= _mlp(f"{prefix}.mlp.experts.{expert}", hidden, inner)
    return _write(folder, _MOE | {"num_hidden_layers": layers}, shapes)


def _outside(config: dict) -> Shapes:
    return {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
    }


def _llama_layer(number: int) -> Shapes:
    prefix = f"model.layers.{number}"
    return _attention(_LLAMA, prefix) | _mlp(f"{prefix}.mlp", _LLAMA["hidden_size"], _LLAMA["intermediate_size"])


def _attention(config: dict, prefix: str) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    query, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        f"{prefix}.self_attn.q_proj.weight": (query, hidden),
        f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, query),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


def _mlp(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _write(folder: Path, config: dict, shapes: Shapes) -> Path:
    """Write shards, index and configuration."""
    folder.mkdir(parents=True)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    shards = list(_shards(shapes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_shard(folder / file, {name: shapes[name] for name in names}, pool)
    total = sum(2 * _count(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _shards(shapes: Shapes) -> Iterator[list[str]]:
    names, size = [], 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * _count(shape)
        if size >= SHARD_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _write_shard(path: Path, shapes: Shapes, pool: torch.Tensor) -> None:
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * _count(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values()):
            first = number * 4096 % (_POOL - 1)
            left = _count(shape)
            while left:
                part = pool[first : first + min(left, _POOL - first)]
                values = 1 + 0.1 * part if len(shape) == 1 else part * (0.02 * 2.0 ** (number % 5 - 2))
                file.write(values.bfloat16().view(torch.uint8).numpy().data)
                left, first = left - len(part), 0


if __name__ == "__main__":
    {"llama": make_llama, "moe": make_moe}[sys.argv[1]](Path(sys.argv[2]), float(sys.argv[3]))
