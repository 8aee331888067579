"""A small sharded checkpoint to rewrite, and the ways the tests of rewriting look at folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_checkpoint

from vrscope.checkpoint.source import RowBlock, TensorInfo, open_checkpoint
from vrscope.checkpoint.writer import rewrite
from vrscope.errors import OutputError
from vrscope.progress import silent

SHARDS = {
    "model-1-of-2.safetensors": {
        "z.weight": torch.arange(600.0).view(20, 30).to(torch.bfloat16),
        "a.bias": torch.arange(7.0),
        "ids": torch.arange(9),
    },
    "model-2-of-2.safetensors": {
        "f8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "experts": torch.arange(24.0).view(2, 3, 4).to(torch.float16),
    },
}


def double(info: TensorInfo, block: RowBlock) -> torch.Tensor:
    del info
    return (block.values.double() * 2).to(block.values.dtype)


def same(info: TensorInfo, block: RowBlock) -> torch.Tensor:
    del info
    return block.values


def run(source: Path | str, out: Path, transform: Callable[..., torch.Tensor] = double, **options: Any) -> None:
    settings: dict[str, Any] = {"extra": {}, "force": False, "prove": lambda copy: None, "progress": silent}
    rewrite(open_checkpoint(source), out, transform, **(settings | options))


def refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(OutputError) as caught:
        run(source, out, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_tidy(parent: Path) -> None:
    assert not [path.name for path in parent.iterdir() if path.name.startswith(".")]


def write_model(folder: Path) -> Path:
    """Write the sharded checkpoint with a config and a tokenizer."""
    write_checkpoint(folder, SHARDS, {"model_type": "x"})
    (folder / "tokenizer.json").write_text("{}")
    return folder
