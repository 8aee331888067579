"""Runs a function over the row blocks of many tensors, on any executor, with results in the stored order.

The executor's threads read and compute, each in memory of its own that it fills again and again. As results are merged
in the stored order, they do not depend on the number of threads. A `Companion` is other work that shares the same visit
to every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

from vrscope.checkpoint.room import Room
from vrscope.checkpoint.source import BlockPlace, Checkpoint, StoredBlock, TensorInfo
from vrscope.executors import Executor, Serial
from vrscope.progress import Progress, silent

Part = TypeVar("Part")

SERIAL: Executor = Serial()
_BATCH = 4  # blocks; what each contributes waits for the others


def _any_row(info: TensorInfo) -> int:
    del info
    return 1


class Companion(Protocol):
    """Work that another pass takes along, so that blocks are read once for both."""

    def unit(self, info: TensorInfo) -> int:
        """Return how many rows of a tensor must not be torn apart: blocks are cut at multiples of it."""
        ...

    def visit(self, info: TensorInfo, block: StoredBlock) -> Any:
        """Return what one block contributes, without keeping any of it; called on any thread."""
        ...

    def collect(self, info: TensorInfo, part: Any) -> None:
        """Merge what `visit` returned; called in the stored order of the blocks, on the calling thread."""
        ...


@dataclass(frozen=True, slots=True)
class Streaming:
    """How blocks are read and where they are worked on.

    Attributes
    ----------
    executor
        Runs the work.
    progress
        Is told of bytes read.
    stage
        What to call the work, in words.
    block_bytes
        Aimed size of a block; results do not depend on it.
    unit
        Returns how many rows of a tensor must stay together.
    """

    executor: Executor = SERIAL
    progress: Progress = silent
    stage: str = "statistics"
    block_bytes: int = 4 << 20
    unit: Callable[[TensorInfo], int] = _any_row


def stream(
    checkpoint: Checkpoint,
    names: Iterable[str],
    function: Callable[[TensorInfo, StoredBlock], Part],
    how: Streaming,
) -> Iterator[tuple[str, Iterator[Part]]]:
    """Yield each float tensor's name with the results of its blocks, first block first; none if it has no elements.

    A block that `function` is given lasts until its thread's next one, so no result may be a view of it. The results of
    one name must be used up before the next name is asked for.

    Raises
    ------
    CheckpointError
        If a tensor cannot be read.
    """
    chosen = list(names)
    total = sum(checkpoint.tensors[name].size_bytes for name in chosen)
    results = _results(checkpoint, chosen, function, how)
    ahead = next(results, None)
    done = 0

    def parts(name: str) -> Iterator[Part]:
        nonlocal ahead, done
        while ahead is not None and ahead[0] == name:
            _, size, part = ahead
            yield part
            done += size
            how.progress(how.stage, done, total, "bytes")
            ahead = next(results, None)

    for name in chosen:
        yield name, parts(name)


def _results(
    checkpoint: Checkpoint,
    names: list[str],
    function: Callable[[TensorInfo, StoredBlock], Part],
    how: Streaming,
) -> Iterator[tuple[str, int, Part]]:
    """Yield the name, size in bytes and result of every block."""
    room = Room()

    def work(batch: list[BlockPlace]) -> list[tuple[str, int, Part]]:
        return [visit(place) for place in batch]

    def visit(place: BlockPlace) -> tuple[str, int, Part]:
        block = checkpoint.read_stored(place, room)
        return place.name, block.bits.nbytes, function(checkpoint.tensors[place.name], block)

    places = (
        place
        for name in names
        for place in checkpoint.block_places(name, how.block_bytes, how.unit(checkpoint.tensors[name]))
    )
    batches = _batches(checkpoint, places, how.block_bytes)
    return chain.from_iterable(how.executor.map(work, batches))


def _batches(checkpoint: Checkpoint, places: Iterable[BlockPlace], size_bytes: int) -> Iterator[list[BlockPlace]]:
    """Yield small blocks together, up to `size_bytes`, as handing one to a thread costs more than to visit it."""
    batch: list[BlockPlace] = []
    left = size_bytes
    for place in places:
        info = checkpoint.tensors[place.name]
        size = place.rows * place.columns * info.size_bytes // info.numel
        if batch and (size > left or len(batch) == _BATCH):
            yield batch
            batch, left = [], size_bytes
        batch.append(place)
        left -= size
    if batch:
        yield batch
