"""Bytes of open files, read and written at their places, with errors that name the file. Used by the writer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vrscope.checkpoint.layout import printable
from vrscope.errors import CheckpointError

PIECE_BYTES = 1 << 20


def flush_and_close(handle: int) -> None:
    """Flush a file to the disk and close this handle of it."""
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write all bytes to an unbuffered file, in calls of a size that file systems take at full speed."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest[:PIECE_BYTES]) :]


def write_at(file: IO[bytes], data: bytes | memoryview, position: int) -> None:
    """Write all bytes at `position` without moving the file's own; may be called on any thread."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file.fileno(), rest[:PIECE_BYTES], position)
        position += count
        rest = rest[count:]


@contextlib.contextmanager
def source_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error of the block into a CheckpointError about `path`."""
    try:
        yield
    except OSError as error:
        message = f"{printable(path)}: cannot be read ({error.strerror or error}). Check the file and its permissions."
        raise CheckpointError(message) from error


def changed(path: Path) -> CheckpointError:
    """Return the error that says that a file was changed while it was read."""
    return CheckpointError(f"{printable(path)}: was changed while it was read. Start again when nothing writes to it.")


def open_source(path: Path) -> IO[bytes]:
    """Open a file for reading.

    Raises
    ------
    CheckpointError
        If it cannot be opened.
    """
    with source_errors(path):
        return path.open("rb")


def read_at(file: IO[bytes], place: range) -> bytes:
    """Return the bytes at `place` without moving the file's position.

    Raises
    ------
    CheckpointError
        If they cannot be read, or are not there any more.
    """
    with source_errors(Path(file.name)):
        data = os.pread(file.fileno(), len(place), place.start)
    if len(data) < len(place):
        raise changed(Path(file.name))
    return data


def stretches(file: IO[bytes], start: int, count: int) -> Iterator[bytes]:
    """Yield `count` bytes from `start` on, in pieces.

    Raises
    ------
    CheckpointError
        As `read_at`.
    """
    file.seek(start)
    while count > 0:
        with source_errors(Path(file.name)):
            data = file.read(min(count, PIECE_BYTES))
        if not data:
            raise changed(Path(file.name))
        count -= len(data)
        yield data
