"""Writers of small checkpoint files, whole or damaged, byte by byte: independent of the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the stored bytes of a tensor, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a whole safetensors file, tensors in the order given, header padded with spaces to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor_bytes(tensor)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return raw_safetensors(json.dumps(header, ensure_ascii=False), data)


def raw_safetensors(header: str | bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Return the bytes of a safetensors file with this header text and data, sensible or not; `length` may lie."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode("utf-8") if isinstance(header, str) else header
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors, metadata))
    return path


def write_checkpoint(
    folder: Path,
    shards: Mapping[str, Mapping[str, torch.Tensor]] | Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder and return it.

    `shards` is either tensor name to tensor (one model.safetensors) or shard name to such a mapping (with an index).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if all(isinstance(value, torch.Tensor) for value in shards.values()):
        write_safetensors(folder / "model.safetensors", shards, {"format": "pt"})  # type: ignore[arg-type]
        return folder
    weight_map = {}
    for shard, tensors in shards.items():
        write_safetensors(folder / shard, tensors, {"format": "pt"})  # type: ignore[arg-type]
        weight_map.update(dict.fromkeys(tensors, shard))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
