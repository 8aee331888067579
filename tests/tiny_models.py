"""Tiny random models of every declared family, made from transformers configurations and saved as real checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 97
GQA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
    "dropout": 0.0,
}
# name of the test case -> (transformers config class, its arguments, model class)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", GQA | {"attention_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
    "llama-tied": ("LlamaConfig", GQA | {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", GQA | {"head_dim": 32, "sliding_window": 16}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", GQA, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", GQA, "Qwen3ForCausalLM"),
    "mixtral": ("MixtralConfig", GQA | {"num_local_experts": 4}, "MixtralForCausalLM"),
    "gemma": ("GemmaConfig", GQA, "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", GQA | {"query_pre_attn_scalar": 16}, "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", GQA | {"query_pre_attn_scalar": 16}, "Gemma3ForCausalLM"),
    "granite": ("GraniteConfig", GQA | {"residual_multiplier": 0.7, "attention_bias": True}, "GraniteForCausalLM"),
    "smollm3": ("SmolLM3Config", GQA | {"no_rope_layers": [1, 0]}, "SmolLM3ForCausalLM"),
    "seed_oss": ("SeedOssConfig", GQA | {"attention_bias": True}, "SeedOssForCausalLM"),
    "ministral": ("MinistralConfig", GQA, "MinistralForCausalLM"),
    "ministral3": ("Ministral3Config", GQA, "Ministral3ForCausalLM"),
    "cwm": ("CwmConfig", GQA, "CwmForCausalLM"),
    "ernie4_5": ("Ernie4_5Config", GQA | {"use_bias": True}, "Ernie4_5ForCausalLM"),
    "helium": ("HeliumConfig", GQA | {"attention_bias": True}, "HeliumForCausalLM"),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", GQA, "HunYuanDenseV1ForCausalLM"),
    "phi3": ("Phi3Config", GQA | {"partial_rotary_factor": 0.5}, "Phi3ForCausalLM"),
    "glm": ("GlmConfig", GQA | {"attention_bias": True}, "GlmForCausalLM"),
    "glm4": ("Glm4Config", GQA | {"attention_bias": True}, "Glm4ForCausalLM"),
    "olmo": ("OlmoConfig", GQA, "OlmoForCausalLM"),
    "olmo2": ("Olmo2Config", GQA, "Olmo2ForCausalLM"),
    "olmo3": ("Olmo3Config", GQA, "Olmo3ForCausalLM"),
    "exaone4": ("Exaone4Config", GQA | {"sliding_window": 8, "sliding_window_pattern": 2}, "Exaone4ForCausalLM"),
    "cohere": ("CohereConfig", GQA | {"use_qk_norm": False}, "CohereForCausalLM"),
    "cohere-qknorm": ("CohereConfig", GQA | {"use_qk_norm": True}, "CohereForCausalLM"),
    "cohere2": ("Cohere2Config", GQA | {"sliding_window_pattern": 2}, "Cohere2ForCausalLM"),
    "stablelm": ("StableLmConfig", GQA | {"use_qkv_bias": True}, "StableLmForCausalLM"),
    "stablelm-qknorm": (
        "StableLmConfig",
        GQA | {"qk_layernorm": True, "use_parallel_residual": True},
        "StableLmForCausalLM",
    ),
    "starcoder2": ("Starcoder2Config", GQA, "Starcoder2ForCausalLM"),
    "arcee": ("ArceeConfig", GQA | {"mlp_bias": True}, "ArceeForCausalLM"),
    "nemotron": ("NemotronConfig", GQA | {"mlp_bias": True, "attention_bias": True}, "NemotronForCausalLM"),
    "phi": ("PhiConfig", GQA, "PhiForCausalLM"),
    "phi-qknorm": ("PhiConfig", GQA | {"qk_layernorm": True}, "PhiForCausalLM"),
    "gpt2": ("GPT2Config", GPT2, "GPT2LMHeadModel"),
    "opt": ("OPTConfig", OPT, "OPTForCausalLM"),
    "opt-postln": ("OPTConfig", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, "OPTForCausalLM"),
    "bert": ("BertConfig", BERT, "BertModel"),
    "bert-mlm": ("BertConfig", BERT, "BertForMaskedLM"),
}


def make_model(case: str, seed: int = 0) -> Any:
    """Return a model in float32 whose gains and biases are perturbed, so that no rule can pass by symmetry."""
    import transformers

    config_name, arguments, model_name = MODELS[case]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**arguments)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15 * (1 + torch.rand(parameter.shape[-1])))
            elif "weight" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def save_tiny(case: str, folder: Path, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """Save a tiny model as a real checkpoint and return its folder."""
    model = make_model(case).to(dtype)
    model.save_pretrained(folder, **save)
    return folder


def outputs(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits (or last hidden state) of the checkpoint in `folder` on fixed tokens, shape (2, 24, width)."""
    import transformers

    kind: Callable[..., Any] = getattr(transformers, MODELS[case][2])
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = model(input_ids=tokens)
    logits = getattr(found, "logits", None)
    return (found.last_hidden_state if logits is None else logits).float()
