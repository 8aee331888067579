"""Streaming keeps order, stays flat and passes errors on."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stats_oracle import checkpoint_of, weights

from vrscope.checkpoint.source import StoredBlock, TensorInfo
from vrscope.checkpoint.stream import Streaming, stream
from vrscope.errors import CheckpointError
from vrscope.executors import Executor, Serial, Threads


@pytest.mark.parametrize("executor", [Serial(), Threads(3)], ids=str)
def test_results_come_in_the_stored_order_with_every_name(tmp_path: Path, executor: Executor) -> None:
    checkpoint = checkpoint_of(tmp_path, a=weights((9, 4), "F32"), none=torch.zeros(0, 4), b=weights((50,), "F32"))

    def first(info: TensorInfo, block: StoredBlock) -> tuple[str, int, int]:
        return info.name, block.first_row, block.first_column

    results = {
        name: list(parts)
        for name, parts in stream(checkpoint, ["b", "none", "a"], first, Streaming(executor, block_bytes=64))
    }
    assert list(results) == ["b", "none", "a"]
    assert results["a"] == [("a", 0, 0), ("a", 4, 0), ("a", 8, 0)]
    assert results["b"] == [("b", 0, 0), ("b", 0, 16), ("b", 0, 32), ("b", 0, 48)]
    assert results["none"] == []


@pytest.mark.parametrize(("executor", "bound"), [(Serial(), 2), (Threads(2), 6)], ids=str)
def test_only_a_few_blocks_are_alive_at_a_time(tmp_path: Path, executor: Executor, bound: int) -> None:
    checkpoint = checkpoint_of(tmp_path, a=weights((500, 4), "F32"))
    alive: set[int] = set()
    most = 0

    def watch(info: TensorInfo, block: StoredBlock) -> int:
        nonlocal most
        alive.add(id(block))
        weakref.finalize(block.bits, alive.discard, id(block))
        most = max(most, len(alive))
        return block.first_row

    for _, parts in stream(checkpoint, ["a"], watch, Streaming(executor, block_bytes=16)):
        assert list(parts) == list(range(500))
    assert 1 <= most <= bound


@pytest.mark.parametrize("executor", [Serial(), Threads(2)], ids=str)
def test_a_file_that_shrank_is_reported(tmp_path: Path, executor: Executor) -> None:
    checkpoint = checkpoint_of(tmp_path, a=weights((500, 4), "F32"))
    path = tmp_path / checkpoint.shards[0]
    path.write_bytes(path.read_bytes()[:-100])
    ((_, parts),) = stream(checkpoint, ["a"], lambda info, block: None, Streaming(executor, block_bytes=64))
    with pytest.raises(CheckpointError, match="a"):
        list(parts)


class Watched:
    """Runs serially and notes how many blocks each item holds."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.sizes.append(len(item))
            yield function(item)


@pytest.mark.parametrize(("block_bytes", "sizes"), [(1 << 20, [4, 4, 2]), (40, [2, 2, 2, 2, 2]), (1, [1] * 40)])
def test_small_blocks_are_handed_over_together(tmp_path: Path, block_bytes: int, sizes: list[int]) -> None:
    checkpoint = checkpoint_of(tmp_path, **{f"t{number}": weights((4,), "F32") for number in range(10)})
    watched = Watched()
    how = Streaming(watched, block_bytes=block_bytes)
    found = [(name, len(list(parts))) for name, parts in stream(checkpoint, checkpoint.tensors, _nothing, how)]
    assert found == [(name, sum(sizes) // 10) for name in checkpoint.tensors]
    assert watched.sizes == sizes


def _nothing(info: TensorInfo, block: StoredBlock) -> None:
    del info, block


def test_streaming_is_a_value() -> None:
    assert dataclasses.replace(Streaming(), stage="x") == Streaming(stage="x")
