"""Write a checkpoint again with other values: same shards, names, order, dtypes and metadata, streamed block by block.

In: an opened checkpoint and a function from row block to row block. Out: a complete folder, synced to disk and proved
by the caller before it takes its place, or nothing at all.
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
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vrscope.checkpoint.companions import companion_files
from vrscope.checkpoint.header import read_header
from vrscope.checkpoint.layout import printable
from vrscope.checkpoint.room import Room
from vrscope.checkpoint.source import BlockPlace, Checkpoint, StoredBlock, TensorInfo, open_checkpoint
from vrscope.checkpoint.staging import check_replaceable, output_errors, staged, sync_folders
from vrscope.errors import CheckpointError, OutputError, VerificationError
from vrscope.executors import default_executor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vrscope.progress import Progress

Transform = Callable[[TensorInfo, StoredBlock], "torch.Tensor | NDArray[np.unsignedinteger]"]

_COPY_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20
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
        Told of the bytes written.

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
        writer = _Writer(source, folder, target, progress, total, background)
        for shard in source.shards:
            writer.shard(shard, transform)
        for name in files:
            writer.copy(name)
        for name, text in extra.items():
            writer.text(name, text)
        copy = open_checkpoint(folder / (source.index or source.shards[0]))
        prove(dataclasses.replace(copy, name=str(out)))
        writer.sync()


@dataclass(slots=True)
class _Writer:
    """Writes the files of one copy and counts their bytes."""

    source: Checkpoint
    folder: Path
    target: Path
    progress: Progress
    total: int
    background: Executor
    done: int = 0
    flushing: list[Future[None]] = field(default_factory=list)

    def shard(self, shard: str, transform: Transform) -> None:
        """Write one shard: its header as it is, then the transformed tensors."""
        path = self.source.folder / shard
        header = read_header(path, shard)
        tensors = tuple(info for info in self.source.tensors.values() if info.shard == shard)
        if header.tensors != tensors:
            message = f"{printable(path)}: was changed while it was read. Start again when nothing writes to it."
            raise CheckpointError(message)
        with _open_source(path) as original, self._new(shard) as file:
            self._stretch(file, original, header.data_start)
            for count in default_executor().map(self._mover(original, file, transform), self._pieces(tensors)):
                self._count(count)
            self._finish(file, path)

    def _pieces(self, tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, BlockPlace | range]]:
        """Yield what to write in order: blocks of float tensors, and stretches of bytes of the others."""
        for info in tensors:
            if info.is_float:
                yield from ((info, place) for place in self.source.block_places(info.name, _BLOCK_BYTES))
            else:
                for first in range(info.start, info.end, _COPY_BYTES):
                    yield info, range(first, min(first + _COPY_BYTES, info.end))

    def _mover(
        self, original: IO[bytes], file: IO[bytes], transform: Transform
    ) -> Callable[[tuple[TensorInfo, BlockPlace | range]], int]:
        """Return the function that reads, transforms and writes one piece, on any thread, and returns its bytes."""
        room = Room()

        def move(piece: tuple[TensorInfo, BlockPlace | range]) -> int:
            info, place = piece
            data: bytes | memoryview
            if isinstance(place, range):
                data, position = _read_at(original, place), place.start
            else:
                block = self.source.read_stored(place, room)
                data, position = _checked_bytes(info, block, transform(info, block)), self.source.position(place)
            with output_errors(self.target):
                _write_at(file, data, position)
            return len(data)

        return move

    def copy(self, name: str) -> None:
        """Copy one file by content, also where it is a link."""
        path = self.source.folder / name
        with _open_source(path) as original, self._new(name) as file:
            self._stretch(file, original, os.fstat(original.fileno()).st_size)
            self._finish(file, path)

    def text(self, name: str, text: str) -> None:
        """Write one file of text."""
        with self._new(name) as file, output_errors(self.target):
            _write_all(file, text.encode("utf-8"))
            os.fsync(file.fileno())

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
            _write_all(file, data)
        self._count(len(data))

    def _count(self, count: int) -> None:
        self.done += count
        self.progress("writing", self.done, self.total, "bytes")

    def _stretch(self, file: IO[bytes], original: IO[bytes], count: int, start: int = 0) -> None:
        """Copy `count` bytes from byte `start` of `original`."""
        for data in _stretches(original, start, count):
            self._put(file, data)

    def _finish(self, file: IO[bytes], original: Path) -> None:
        """Begin to flush a copy to the disk, with the permissions of its original (and writable by its owner)."""
        with output_errors(self.target):
            with contextlib.suppress(PermissionError):  # some file systems have no permissions
                os.fchmod(file.fileno(), stat.S_IMODE(original.stat().st_mode) | stat.S_IWUSR)
            self.flushing.append(self.background.submit(_flush, os.dup(file.fileno())))  # beside the work that follows


def _flush(handle: int) -> None:
    """Flush a file to the disk and close this handle of it."""
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    with _source_errors(source.folder):
        files = companion_files(source, without={*extra, "vrscope_plan.json"})
        total = sum((source.folder / name).stat().st_size for name in (*source.shards, *files))
    _check_apart(source, target, files, out)
    check_replaceable(target, force=force)
    _check_space(target, total + sum(len(text.encode()) for text in extra.values()))
    return target, files, total


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write all bytes to an unbuffered file, in calls of a size that file systems take at full speed."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest[:_COPY_BYTES]) :]


def _write_at(file: IO[bytes], data: bytes | memoryview, position: int) -> None:
    """Write all bytes at `position` without moving the file's own; may be called on any thread."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file.fileno(), rest[:_COPY_BYTES], position)
        position += count
        rest = rest[count:]


@contextlib.contextmanager
def _source_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error of the block into a CheckpointError about `path`."""
    try:
        yield
    except OSError as error:
        message = f"{printable(path)}: cannot be read ({error.strerror or error}). Check the file and its permissions."
        raise CheckpointError(message) from error


def _open_source(path: Path) -> IO[bytes]:
    with _source_errors(path):
        return path.open("rb")


def _read_at(file: IO[bytes], place: range) -> bytes:
    """Return the bytes at `place` without moving the file's position."""
    with _source_errors(Path(file.name)):
        data = os.pread(file.fileno(), len(place), place.start)
    if len(data) < len(place):
        message = f"{printable(file.name)}: was changed while it was read. Start again when nothing writes to it."
        raise CheckpointError(message)
    return data


def _stretches(file: IO[bytes], start: int, count: int) -> Iterator[bytes]:
    """Yield `count` bytes from `start` on, in pieces."""
    file.seek(start)
    while count > 0:
        with _source_errors(Path(file.name)):
            data = file.read(min(count, _COPY_BYTES))
        if not data:
            message = f"{printable(file.name)}: was changed while it was read. Start again when nothing writes to it."
            raise CheckpointError(message)
        count -= len(data)
        yield data


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
