"""Write a checkpoint again with other values: same shards, names, order, dtypes and metadata, streamed block by block.

In: an opened checkpoint and a function from row block to row block. Out: a complete folder, synced to disk and proved
by the caller before it takes its place, or nothing at all. Each block is read back and proved as soon as it is written,
while it and its source are still in the caches of the processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vrscope.checkpoint.companions import companion_files
from vrscope.checkpoint.header import read_header
from vrscope.checkpoint.layout import printable
from vrscope.checkpoint.pieces import (
    PIECE_BYTES,
    changed,
    flush_and_close,
    open_source,
    read_at,
    source_errors,
    stretches,
    write_all,
    write_at,
)
from vrscope.checkpoint.room import Room
from vrscope.checkpoint.source import BlockPlace, Checkpoint, StoredBlock, TensorInfo, open_checkpoint
from vrscope.checkpoint.staging import check_replaceable, output_errors, reserve, staged, sync_folders
from vrscope.errors import OutputError, VerificationError
from vrscope.executors import default_executor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vrscope.progress import Progress

Transform = Callable[[TensorInfo, StoredBlock], "torch.Tensor | NDArray[np.unsignedinteger]"]
Proof = Callable[[Checkpoint, BlockPlace, StoredBlock], object]

WRITING = "writing"
_BLOCK_BYTES = 4 << 20
_FLUSH_BYTES = 1 << 28  # so that the disk has little left to do in the end
_SLACK_BYTES = 4 << 20  # for folders and rounding to file system blocks


def rewrite(
    source: Checkpoint,
    out: Path,
    transform: Transform,
    *,
    extra: Mapping[str, str],
    force: bool,
    prove: Callable[[Checkpoint], None],
    progress: Progress,
    prove_block: Proof | None = None,
    room: Room | None = None,
) -> None:
    """Write `source` to the folder `out` with the values that `transform` gives.

    The folder is built hidden beside `out`, synced, proved, and put in place in one step. If anything fails, also by an
    interrupt, nothing is left and `out` is as before. An empty folder counts as free.

    Parameters
    ----------
    source
        The checkpoint to copy. If it is a single file, `out` holds that file, config and tokenizer.
    out
        Folder to write; missing parents are made.
    transform
        Called for each block of each float tensor, on any thread; returns its new values in the same dtype and shape,
        as a tensor or as stored bits. The block, and what is returned, must last only until that thread's next call.
        Other tensors are copied byte for byte.
    extra
        File name to text, written beside the weights; goes before a copied file of that name.
    force
        Replace an earlier checkpoint at `out`.
    prove
        Called with the finished copy while it is still hidden; raises to reject it.
    progress
        Told of the bytes written (and proved).
    prove_block
        Called with the copy, a place and the source's block there, on any thread, for each block of each tensor as soon
        as it is written; raises to reject the copy. It may change the block.
    room
        Memory for the blocks that `transform` is given; None: of its own.

    Raises
    ------
    OutputError
        If `out` may not or cannot be written.
    CheckpointError
        If the source changes while it is read.
    VerificationError
        If `transform` returns another dtype or shape.
    """
    target, files, total = _checked(source, out, extra, force=force)
    with staged(target, force=force) as folder, ThreadPoolExecutor(1) as background:
        copied = dataclasses.replace(source, name=str(out), folder=folder)
        writer = _Writer(source, copied, folder, target, progress, total, background, prove_block, room or Room())
        for shard in source.shards:
            writer.shard(shard, transform)
        for name in files:
            writer.file(name)
        for name, text in extra.items():
            writer.text(name, text)
        copy = open_checkpoint(folder / (source.index or source.shards[0]))
        if copy.tensors != source.tensors:  # by these places it was written and proved
            raise changed(source.folder)
        prove(dataclasses.replace(copy, name=str(out)))
        writer.sync()


@dataclass(slots=True)
class _Writer:
    """Writes the files of one copy, has them proved, and counts their bytes."""

    source: Checkpoint
    copied: Checkpoint  # headers are copied as they are, so the tensors lie where they do in the source
    folder: Path
    target: Path
    progress: Progress
    total: int
    background: Executor
    prove_block: Proof | None
    room: Room
    done: int = 0
    flushing: list[Future[None]] = field(default_factory=list)

    def shard(self, shard: str, transform: Transform) -> None:
        """Write one shard: its header as it is, then the transformed tensors, each block proved once it is written."""
        path = self.source.folder / shard
        header = read_header(path, shard)
        tensors = tuple(info for info in self.source.tensors.values() if info.shard == shard)
        if header.tensors != tensors:
            raise changed(path)
        with open_source(path) as original, self._new(shard) as file:
            with output_errors(self.target):
                reserve(file.fileno(), max((info.end for info in tensors), default=header.data_start))
            self._stretch(file, original, header.data_start)
            flushed = self.done
            for count in default_executor().map(_call, self._moves(original, file, transform, tensors)):
                self._count(count)
                if self.done - flushed >= _FLUSH_BYTES:
                    self._flush(file)
                    flushed = self.done
            self._finish(file, path)

    def _moves(
        self, original: IO[bytes], file: IO[bytes], transform: Transform, tensors: Sequence[TensorInfo]
    ) -> Iterator[Callable[[], int]]:
        """Yield what writes and proves one piece, and returns its bytes: a block of floats, or another tensor."""
        for info in tensors:
            if info.is_float:
                for place in self.source.block_places(info.name, _BLOCK_BYTES):
                    yield partial(self._move, info, place, file, transform)
            else:
                yield partial(self._copy, info, original, file)

    def _move(self, info: TensorInfo, place: BlockPlace, file: IO[bytes], transform: Transform) -> int:
        block = self.source.read_stored(place, self.room)
        data = _checked_bytes(info, block, transform(info, block))
        with output_errors(self.target):
            write_at(file, data, self.source.position(place))
        if self.prove_block is not None:
            self.prove_block(self.copied, place, block)
        return len(data)

    def _copy(self, info: TensorInfo, original: IO[bytes], file: IO[bytes]) -> int:
        for first in range(info.start, info.end, PIECE_BYTES):
            data = read_at(original, range(first, min(first + PIECE_BYTES, info.end)))
            with output_errors(self.target):
                write_at(file, data, first)
        if self.prove_block is not None:
            for place in self.source.block_places(info.name, _BLOCK_BYTES):
                self.prove_block(self.copied, place, self.source.read_stored(place, self.room))
        return info.size_bytes

    def _flush(self, file: IO[bytes]) -> None:
        """Begin to flush a file to the disk, beside the work that follows."""
        self.flushing.append(self.background.submit(flush_and_close, os.dup(file.fileno())))

    def file(self, name: str) -> None:
        """Copy one file by content, also where it is a link."""
        path = self.source.folder / name
        with open_source(path) as original, self._new(name) as file:
            self._stretch(file, original, os.fstat(original.fileno()).st_size)
            self._finish(file, path)

    def text(self, name: str, text: str) -> None:
        """Write one file of text."""
        with self._new(name) as file, output_errors(self.target):
            write_all(file, text.encode("utf-8"))
            self._flush(file)

    def sync(self) -> None:
        """Wait until all files are on the disk, then flush the folders."""
        with output_errors(self.target):
            for future in self.flushing:
                future.result()
            sync_folders(self.folder)

    def _new(self, name: str) -> IO[bytes]:
        with output_errors(self.target):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb", buffering=0)

    def _put(self, file: IO[bytes], data: bytes | memoryview) -> None:
        with output_errors(self.target):
            write_all(file, data)
        self._count(len(data))

    def _count(self, count: int) -> None:
        self.done += count
        self.progress(WRITING, self.done, self.total, "bytes")

    def _stretch(self, file: IO[bytes], original: IO[bytes], count: int, start: int = 0) -> None:
        """Copy `count` bytes from byte `start` of `original`."""
        for data in stretches(original, start, count):
            self._put(file, data)

    def _finish(self, file: IO[bytes], original: Path) -> None:
        """Begin to flush a copy to the disk, with the permissions of its original (and writable by its owner)."""
        with output_errors(self.target):
            with contextlib.suppress(PermissionError):  # some file systems have no permissions
                os.fchmod(file.fileno(), stat.S_IMODE(original.stat().st_mode) | stat.S_IWUSR)
            self._flush(file)


def _call(job: Callable[[], int]) -> int:
    return job()


def check_target(source: Checkpoint, out: Path, *, force: bool) -> None:
    """Refuse a folder that `rewrite` would refuse, before any work is done for it.

    Raises
    ------
    OutputError
        If `out` may not or cannot be written.
    """
    _checked(source, out, {}, force=force)


def _checked(
    source: Checkpoint, out: Path, extra: Mapping[str, str], *, force: bool
) -> tuple[Path, tuple[str, ...], int]:
    """Return the folder to write, the files to copy beside the weights, and the bytes of it all."""
    target = Path(os.path.realpath(out))
    with source_errors(source.folder):
        files = companion_files(source, without={*extra, "vrscope_plan.json"})
        total = sum((source.folder / name).stat().st_size for name in (*source.shards, *files))
    _check_apart(source, target, files, out)
    check_replaceable(target, force=force)
    _check_space(target, total + sum(len(text.encode()) for text in extra.values()))
    return target, files, total


def _checked_bytes(
    info: TensorInfo, block: StoredBlock, values: torch.Tensor | NDArray[np.unsignedinteger]
) -> memoryview:
    """Return the bytes of transformed values, if they fit where the block was."""
    import numpy as np

    expected = block.bits if isinstance(values, np.ndarray) else block.values
    if values.dtype != expected.dtype or values.shape != expected.shape:
        message = (
            f"{printable(info.name)} ({printable(info.shard)}): expected {expected.dtype} of shape "
            f"{tuple(expected.shape)} from the transform, found {values.dtype} of shape {tuple(values.shape)}. "
            "Nothing was written; keep dtype and shape."
        )
        raise VerificationError(message)
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    import torch

    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _check_apart(source: Checkpoint, target: Path, files: tuple[str, ...], out: Path) -> None:
    """Check that writing `target` cannot touch the source, nor land inside it."""
    folder = source.folder.resolve()
    where = printable(out)
    single_file = source.index is None and Path(source.name).name == source.shards[0]
    alone = single_file and not (folder / "config.json").exists()
    if target == folder:
        message = f"{where}: is the checkpoint itself. Choose another folder."
    elif target.is_relative_to(folder) and not alone:
        message = f"{where}: lies inside the checkpoint {printable(folder)}. Choose a folder outside it."
    elif any((folder / name).resolve().is_relative_to(target) for name in (*source.shards, *files)):
        message = f"{where}: holds the checkpoint {printable(folder)} or files it links to. Choose another folder."
    else:
        return
    raise OutputError(message)


def _check_space(target: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes beside `target`."""
    with output_errors(target):
        place = next(folder for folder in target.parents if folder.exists())
        disk = shutil.disk_usage(place)
    # A size of 0 means that the file system does not tell.
    if disk.total and needed + _SLACK_BYTES > disk.free:
        message = (
            f"{printable(target)}: expected {needed + _SLACK_BYTES:,} free bytes on its disk, found {disk.free:,}. "
            "Free some space or choose another disk."
        )
        raise OutputError(message)
