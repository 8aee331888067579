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
NEOX = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FALCON = NEOX | {"new_decoder_architecture": False, "bias": True}
EXPERTS = GQA | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {key: value for key, value in SHARED.items() if key != "head_dim"} | {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
}
VIT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
MAMBA2 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "head_dim": 16,
    "num_heads": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
JAMBA = EXPERTS | {
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 6,
}
QWEN3_NEXT = EXPERTS | {
    "shared_expert_intermediate_size": 48,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "partial_rotary_factor": 0.5,
}
PATCHES = VIT | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DENSE_FIRST = EXPERTS | {"mlp_only_layers": [0]}
# name of the test case -> (transformers config class, its arguments, model class)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", GQA | {"attention_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
    "llama-tied": ("LlamaConfig", GQA | {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", GQA | {"head_dim": 32, "sliding_window": 16}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", GQA, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", GQA, "Qwen3ForCausalLM"),
    "mixtral": ("MixtralConfig", GQA | {"num_local_experts": 4}, "MixtralForCausalLM"),
    "minimax_m2": ("MiniMaxM2Config", EXPERTS | {"rotary_dim": 8}, "MiniMaxM2ForCausalLM"),
    "phimoe": ("PhimoeConfig", EXPERTS | {"attention_bias": True, "lm_head_bias": True}, "PhimoeForCausalLM"),
    "granitemoe": ("GraniteMoeConfig", EXPERTS, "GraniteMoeForCausalLM"),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        EXPERTS | {"shared_intermediate_size": 48},
        "GraniteMoeSharedForCausalLM",
    ),
    "gpt_oss": ("GptOssConfig", EXPERTS, "GptOssForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", DENSE_FIRST, "Qwen3MoeForCausalLM"),
    "olmoe": ("OlmoeConfig", EXPERTS, "OlmoeForCausalLM"),
    "qwen2_moe": ("Qwen2MoeConfig", DENSE_FIRST | {"shared_expert_intermediate_size": 48}, "Qwen2MoeForCausalLM"),
    "dots1": ("Dots1Config", SHARED, "Dots1ForCausalLM"),
    "solar_open": ("SolarOpenConfig", SHARED, "SolarOpenForCausalLM"),
    "glm4_moe": ("Glm4MoeConfig", SHARED | {"use_qk_norm": True}, "Glm4MoeForCausalLM"),
    "glm4_moe-plain": ("Glm4MoeConfig", SHARED | {"attention_bias": True}, "Glm4MoeForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", MLA, "DeepseekV3ForCausalLM"),
    "deepseek_v3-direct": (
        "DeepseekV3Config",
        MLA | {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
        "DeepseekV3ForCausalLM",
    ),
    "deepseek_v2": ("DeepseekV2Config", MLA, "DeepseekV2ForCausalLM"),
    "gemma": ("GemmaConfig", GQA, "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", GQA | {"query_pre_attn_scalar": 16}, "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", GQA | {"query_pre_attn_scalar": 16}, "Gemma3ForCausalLM"),
    "granite": ("GraniteConfig", GQA | {"residual_multiplier": 0.7, "attention_bias": True}, "GraniteForCausalLM"),
    "smollm3": ("SmolLM3Config", GQA | {"no_rope_layers": [1, 0]}, "SmolLM3ForCausalLM"),
    "seed_oss": ("SeedOssConfig", GQA | {"attention_bias": True}, "SeedOssForCausalLM"),
    "internlm3": ("InternLM3Config", GQA | {"attention_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
    "iquestcoder": ("IQuestCoderConfig", GQA, "LlamaForCausalLM"),
    "granite_swa": ("GraniteSWAConfig", GQA, "GraniteSWAForCausalLM"),
    "jais2": ("Jais2Config", GQA, "Jais2ForCausalLM"),
    "vaultgemma": ("VaultGemmaConfig", GQA | {"query_pre_attn_scalar": 16}, "VaultGemmaForCausalLM"),
    "mellum": ("MellumConfig", EXPERTS, "MellumForCausalLM"),
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
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2, "GPTBigCodeForCausalLM"),
    "gpt_bigcode-mha": ("GPTBigCodeConfig", GPT2 | {"multi_query": False}, "GPTBigCodeForCausalLM"),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 8}, "GPTJForCausalLM"),
    "gpt_neox": ("GPTNeoXConfig", NEOX, "GPTNeoXForCausalLM"),
    "gpt_neox-sequential": (
        "GPTNeoXConfig",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 0.5},
        "GPTNeoXForCausalLM",
    ),
    "persimmon": ("PersimmonConfig", NEOX, "PersimmonForCausalLM"),
    "falcon": ("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "FalconForCausalLM"),
    "falcon-one-norm": (
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "FalconForCausalLM",
    ),
    "falcon-mqa": ("FalconConfig", FALCON, "FalconForCausalLM"),
    "falcon-mha": (
        "FalconConfig",
        FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True},
        "FalconForCausalLM",
    ),
    "bloom": ("BloomConfig", NEOX | {"n_layer": 2, "n_head": 4}, "BloomForCausalLM"),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        "MptForCausalLM",
    ),
    "opt": ("OPTConfig", OPT, "OPTForCausalLM"),
    "opt-postln": ("OPTConfig", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, "OPTForCausalLM"),
    "bert": ("BertConfig", BERT, "BertModel"),
    "bert-mlm": ("BertConfig", BERT, "BertForMaskedLM"),
    "bert-classifier": ("BertConfig", BERT, "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", BERT, "RobertaForMaskedLM"),
    "roberta-classifier": ("RobertaConfig", BERT, "RobertaForSequenceClassification"),
    "xlm-roberta": ("XLMRobertaConfig", BERT, "XLMRobertaModel"),
    "camembert": ("CamembertConfig", BERT, "CamembertForMaskedLM"),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
        "DistilBertForMaskedLM",
    ),
    "vit": ("ViTConfig", VIT, "ViTForImageClassification"),
    "vit-features": ("ViTConfig", VIT, "ViTModel"),
    "deit": ("DeiTConfig", VIT, "DeiTForImageClassificationWithTeacher"),
    "t5": ("T5Config", T5, "T5ForConditionalGeneration"),
    "t5-gated": ("T5Config", T5 | {"feed_forward_proj": "gated-gelu"}, "T5ForConditionalGeneration"),
    "mt5": ("MT5Config", T5, "MT5ForConditionalGeneration"),
    "umt5": ("UMT5Config", T5, "UMT5ForConditionalGeneration"),
    "whisper": ("WhisperConfig", WHISPER, "WhisperForConditionalGeneration"),
    "mamba2": ("Mamba2Config", MAMBA2, "Mamba2ForCausalLM"),
    "jamba": ("JambaConfig", JAMBA, "JambaForCausalLM"),
    "qwen3_next": ("Qwen3NextConfig", QWEN3_NEXT, "Qwen3NextForCausalLM"),
    "qwen3_5": ("Qwen3_5TextConfig", QWEN3_NEXT, "Qwen3_5ForCausalLM"),
    "qwen3_5-moe": ("Qwen3_5MoeTextConfig", QWEN3_NEXT, "Qwen3_5MoeForCausalLM"),
    "llama4": (
        "Llama4TextConfig",
        EXPERTS | {"intermediate_size_mlp": 80, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
        "Llama4ForCausalLM",
    ),
    "gemma3-multimodal": (
        "Gemma3Config",
        {"text_config": GQA | {"query_pre_attn_scalar": 16}, "vision_config": PATCHES, "mm_tokens_per_image": 4},
        "Gemma3ForConditionalGeneration",
    ),
    "mistral3": (
        "Mistral3Config",
        {"text_config": GQA | {"model_type": "mistral"}, "vision_config": PATCHES, "tie_word_embeddings": False},
        "Mistral3ForConditionalGeneration",
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "text_config": GQA | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        },
        "Qwen2VLForConditionalGeneration",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": GQA | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            "vision_config": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2},
        },
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "bitnet": ("BitNetConfig", GQA, "BitNetForCausalLM"),
    "apertus": ("ApertusConfig", GQA, "ApertusForCausalLM"),
}


def make_model(case: str, seed: int = 0, **changes: Any) -> Any:
    """Return a model in float32 whose gains and biases are perturbed, so that no rule can pass by symmetry.

    `changes` go over the case's configuration.
    """
    import transformers

    config_name, arguments, model_name = MODELS[case]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**arguments | changes)
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


def inputs(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return fixed inputs of the kind a model takes: 2 x 24 tokens, images or spectrograms."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=generator)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator).to(dtype)}
    if model.main_input_name == "input_features":
        frames = torch.randn(2, model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=generator)
        return {"input_features": frames.to(dtype), "decoder_input_ids": tokens}
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


def outputs(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits (or last hidden state) of the checkpoint in `folder` on fixed inputs."""
    import transformers

    kind: Callable[..., Any] = getattr(transformers, MODELS[case][2])
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        found = model(**inputs(model, dtype))
    logits = getattr(found, "logits", None)
    return (found.last_hidden_state if logits is None else logits).float()
