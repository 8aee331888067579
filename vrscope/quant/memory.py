"""Whether a model fits into memory, asked before it is loaded."""

from __future__ import annotations

from pathlib import Path

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}  # what a model can be run in


def require_memory(checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """Refuse a model that would not fit twice: itself, and its quantized weights beside the original ones.

    Raises
    ------
    ModelError
        If less memory is free than that.
    """
    needed = 2 * DTYPE_BYTES[dtype] * sum(info.numel for info in checkpoint.tensors.values())
    free = _free_memory(device)
    if free is not None and needed > free:
        message = (
            f"{checkpoint.name}: expected {needed / 1e9:.1f} GB of free memory to run it in {dtype}, found "
            f"{free / 1e9:.1f} GB. Use --dtype bfloat16, or a larger machine."
        )
        raise ModelError(message)


def _free_memory(device: str) -> int | None:
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
