"""Whether a model fits into memory, asked before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}  # what a model can be run in


def require_memory(checkpoint: Checkpoint, device: str, dtype: str, copies: int = 2) -> None:
    """Refuse a model that would not fit `copies` times: by default itself, and its quantized weights beside it.

    Raises
    ------
    ModelError
        If less memory is free than that.
    """
    needed = copies * _weight_bytes(checkpoint, dtype)
    free = free_memory(device)
    if free is not None and needed > free:
        message = (
            f"{checkpoint.name}: expected {needed / 1e9:.1f} GB of free memory to run it in {dtype}, found "
            f"{free / 1e9:.1f} GB. Use --dtype bfloat16 if the command has it, or a larger machine."
        )
        raise ModelError(message)


def require_run_memory(checkpoint: Checkpoint, device: str, dtype: str, window: int, *, compared: bool = False) -> None:
    """Refuse to run windows of so many tokens if the model, its activations and its output would not fit.

    Parameters
    ----------
    checkpoint, device
        The model, and where it is to run.
    dtype
        "float32" or "bfloat16"; others are left to `load_model` to refuse.
    window
        Tokens of the longest window.
    compared
        Whether weights are quantized beside the original ones, and outputs compared with the original's.

    Raises
    ------
    ModelError
        If less memory is free than that.
    """
    if dtype not in DTYPE_BYTES:
        return
    needed = _weight_bytes(checkpoint, dtype) + run_bytes(checkpoint.config, window, DTYPE_BYTES[dtype])
    if compared:
        needed += _weight_bytes(checkpoint, dtype) + 4 * window * _size(checkpoint.config, "vocab_size")
    free = free_memory(device)
    if free is not None and needed > free:
        message = (
            f"{checkpoint.name}: expected {needed / 1e9:.1f} GB of free memory to run {window:,} tokens at once in "
            f"{dtype}, found {free / 1e9:.1f} GB. Use --dtype bfloat16 if the command has it, fewer --tokens, or a "
            "larger machine."
        )
        raise ModelError(message)


def require_calibration_memory(checkpoint: Checkpoint, device: str, window: int, *, tried: bool = False) -> None:
    """Refuse to calibrate a loaded model if gradients and the importance of every weight would not fit beside it.

    Counted are two float32 figures per weight, or four if the model is to be `tried` with rounded weights afterwards,
    and the activations of all layers, which a backward pass keeps.

    Raises
    ------
    ModelError
        If less memory is free than that.
    """
    config = checkpoint.config
    layers = next((config[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if name in config), 1)
    run = run_bytes(config, window, DTYPE_BYTES["float32"]) * max(1, int(layers) // 4)
    needed = (4 if tried else 2) * _weight_bytes(checkpoint, "float32") + run
    free = free_memory("cpu")
    if free is not None and needed > free:
        message = (
            f"{checkpoint.name}: expected {needed / 1e9:.1f} GB of free memory to calibrate on windows of {window:,} "
            f"tokens, found {free / 1e9:.1f} GB. Use a larger machine, {'--rounds 0, ' if tried else ''}or a method "
            "without calibration (wisca, cle)."
        )
        raise ModelError(message)


def run_bytes(config: Mapping[str, Any], window: int, width: int) -> int:
    """Return about how many bytes one window needs while it runs, from a model's configuration; `width` per value.

    Counted are the output and its float32 copy, the scores of one attention layer, mask and softmax included, and the
    inputs and outputs of one layer with the float32 copies that statistics take, and a quarter more for what the
    allocator holds back. What a configuration does not say counts nothing.
    """
    hidden = _size(config, "hidden_size", "n_embd", "d_model", "dim")
    inner = _size(config, "intermediate_size", "ffn_dim", "n_inner", "hidden_dim") or 4 * hidden
    heads = _size(config, "num_attention_heads", "n_head", "n_heads")
    output = window * _size(config, "vocab_size") * (width + 4)
    scores = heads * window * window * (2 * width + 4)
    layer = window * (8 * hidden + 3 * inner) * (width + 8)
    return (output + scores + layer) * 5 // 4


def _size(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of these entries that a configuration, or its part on text, has as a number, else 0."""
    own = config.get("text_config")
    own = own if isinstance(own, Mapping) else config
    return next((own[name] for name in names if isinstance(own.get(name), int)), 0)


def _weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    return DTYPE_BYTES[dtype] * sum(info.numel for info in checkpoint.tensors.values())


def free_memory(device: str) -> int | None:
    """Return the bytes that can still be allocated, None if the system does not tell."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    known = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known.append(int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024)
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))  # a container's limit
    except (OSError, StopIteration, ValueError):  # another system, or "max"
        pass
    return min(known, default=None)
