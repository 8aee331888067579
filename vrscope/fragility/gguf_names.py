"""What llama.cpp calls the modules of a transformers model, from the name map of its own package `gguf`."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from vrscope.errors import PlanError

_LAYERS = 256  # the map lists names layer by layer; more than any model has
# Model types of transformers that llama.cpp runs as another architecture's.
_ALIASES = {
    "mistral": "llama",
    "mixtral": "llama",
    "ministral": "llama",
    "cohere": "command-r",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "phi": "phi2",
    "phi3_small": "phi3",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "granite": "granite",
    "gemma3_text": "gemma3",
    "seed_oss": "seed_oss",
}


def gguf_patterns(model_type: str, module: str) -> list[str]:
    """Return regular expressions, for `--tensor-type`, of the tensors that a module becomes: one, or gate and up.

    Raises
    ------
    PlanError
        If the package is not installed, or llama.cpp has no such architecture or tensor.
    """
    names = _name_map(model_type)
    joint = module.endswith("gate_up_proj") and names.get_name(module) is None
    parts = [module.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")] if joint else [module]
    found = [names.get_name(part) for part in parts]
    if None in found:
        message = (
            f"llama.cpp: expected a name for {module!r} in architecture {model_type!r}, found none in its name map. "
            "Leave llama.cpp out of --for."
        )
        raise PlanError(message)
    return [f"^{re.escape(name)}\\.weight$" for name in found]


@lru_cache(maxsize=4)
def _name_map(model_type: str) -> Any:
    try:
        from gguf.constants import MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map
    except ImportError as error:
        message = "llama.cpp: its tensor names need the package gguf, which is not installed. `pip install gguf`."
        raise PlanError(message) from error
    architectures = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    for name in (_ALIASES.get(model_type, model_type), model_type.replace("_", ""), model_type.replace("_", "-")):
        if name in architectures:
            return get_tensor_name_map(architectures[name], _LAYERS)
    message = (
        f"llama.cpp: expected an architecture it knows, found model_type {model_type!r}. Leave llama.cpp out of --for."
    )
    raise PlanError(message)
