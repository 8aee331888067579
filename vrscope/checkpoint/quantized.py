"""Recognise checkpoints whose weights are already quantized, from their configuration and their tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vrscope.checkpoint.layout import TensorInfo, printable

# A name ending that only quantized checkpoints have, and what it means.
_SIGNS: tuple[tuple[str, str], ...] = (
    (r"\.qweight$", "packed integer weights of GPTQ or AWQ"),
    (r"\.qzeros$", "packed zero points of GPTQ or AWQ"),
    (r"\.weight_packed$", "packed weights of compressed-tensors"),
    (r"\.weight_scale_inv$", "inverse scales of block-wise FP8 weights"),
    (r"\.weight_scales?(_2)?$", "scales of FP8, FP4 or integer weights"),
    (r"\.weight_global_scale$", "scales of FP4 weights"),
    (r"\.quant_state\.", "a bitsandbytes 4-bit state"),
    (r"\.(nested_)?absmax$", "bitsandbytes block scales"),
    (r"\.(nested_)?quant_map$", "a bitsandbytes code book"),
    (r"\.SCB$", "bitsandbytes int8 row scales"),
    (r"\.W_q$", "packed weights of HQQ"),
    (r"\.weight\._(data|scale)$", "quanto weights"),
    (r"\.(codebooks|Qidxs|trellis|q_weight)$", "code-book weights"),
    (r"(^|\.)[kv]_scale$", "scales of a quantized KV cache"),
)


def describe_quantization(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return one sentence why the checkpoint counts as already quantized, or None if nothing says so.

    Parameters
    ----------
    config
        The contents of config.json.
    tensors
        Every tensor by name.
    """
    return _from_config(config) or _from_names(tensors)


def _from_config(config: Mapping[str, Any]) -> str | None:
    sections = [("", config)] + [(f"{key}.", value) for key, value in config.items() if isinstance(value, Mapping)]
    for prefix, section in sections:
        for key in ("quantization_config", "compression_config"):
            settings = section.get(key)
            if not isinstance(settings, Mapping) or not settings or _switched_off(settings):
                continue
            method = settings.get("quant_method") or settings.get("quant_algo") or settings.get("format")
            bits = settings.get("bits") or settings.get("w_bit")
            detail = f" ({printable(method)}{f', {bits} bits' if isinstance(bits, int) else ''})" if method else ""
            return f"config.json declares {prefix}{key}{detail}, so the weights are already quantized."
    return None


def _switched_off(settings: Mapping[str, Any]) -> bool:
    """Whether this is a bitsandbytes section that loads nothing in low precision."""
    if settings.get("quant_method") not in (None, "bitsandbytes"):
        return False
    switches = [settings[key] for key in ("load_in_4bit", "load_in_8bit") if key in settings]
    return bool(switches) and not any(switches)


def _from_names(tensors: Mapping[str, TensorInfo]) -> str | None:
    for name, info in tensors.items():
        for pattern, meaning in _SIGNS:
            if re.search(pattern, name):
                return f"it holds {printable(name)}, {meaning}, so the weights are already quantized."
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
            return f"it holds {printable(name)} with scales of its own (MXFP4), so the weights are already quantized."
        if name.endswith(".weight") and len(info.shape) >= 2 and _packed(info):
            return f"{printable(name)} is stored as {printable(info.dtype)}, so the weights are already quantized."
    return None


def _packed(info: TensorInfo) -> bool:
    return info.dtype[:1] in "IU" or info.dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
