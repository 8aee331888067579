"""Replace a folder as a whole: build it hidden beside its place, sync it, then put it there in one step.

Whatever happens in between, also the sudden end of the process, the place holds what it held before or the complete
new folder. Used by `vrscope.checkpoint.writer`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from vrscope.checkpoint.layout import printable
from vrscope.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error of the block into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free some space or choose another disk" if full else "Choose a folder you may write to"
        message = f"{printable(path)}: cannot be written ({error.strerror or error}). {remedy}."
        raise OutputError(message) from error


def check_replaceable(target: Path, *, force: bool) -> None:
    """Check that `target` is free, an empty folder, or (with `force`) an earlier checkpoint that may be replaced.

    Raises
    ------
    OutputError
        If it is anything else; `force` does not delete a folder that holds no checkpoint.
    """
    where = printable(target)
    with output_errors(target):
        if target.exists() and not target.is_dir():
            message = f"{where}: expected a new folder, found a file. Choose another name."
            raise OutputError(message)
        names = {entry.name for entry in target.iterdir()} if target.exists() else set()
    if target.exists() and target.is_mount():
        message = f"{where}: is a mount point, which cannot be replaced in one step. Choose a folder inside it."
        raise OutputError(message)
    if not names:
        return
    if not force:
        message = f"{where}: exists already. Choose another folder, or replace it with --force."
        raise OutputError(message)
    for place in _places_in_use():
        if place.is_relative_to(target):
            message = f"{where}: holds {printable(place)}, so --force does not replace it. Choose another folder."
            raise OutputError(message)
    if ".git" in names or not any(name.endswith(".safetensors") or name == "vrscope_plan.json" for name in names):
        message = (
            f"{where}: expected an earlier checkpoint to replace, found a folder without .safetensors files or under "
            "version control. Choose another folder, or remove it yourself."
        )
        raise OutputError(message)


@contextlib.contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """Give a new hidden folder beside `target`; when the block ends well it takes the place of `target`.

    The caller syncs what it writes. When the block raises, also KeyboardInterrupt, the hidden folder is removed and
    `target` is as before.

    Raises
    ------
    OutputError
        If the folder cannot be made, or cannot be put in place.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    temporary = target.with_name(_hidden_name(target, "new"))
    try:
        with output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
        check_replaceable(target, force=force)
        with output_errors(target):
            temporary.mkdir()
        yield temporary
        check_replaceable(target, force=force)
        with output_errors(target):
            _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def reserve(handle: int, size_bytes: int) -> None:
    """Give an open file its size and its place on the disk; nothing where the system or the file system cannot.

    Writing then takes half the time, as the file system has not to find a place for every page, and a full disk is
    found before the work. `os.posix_fallocate` is not used, as it writes all blocks where the file system cannot.

    Raises
    ------
    OSError
        If the disk is full.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if os.name == "posix" else None
    if allocate is None or not size_bytes or ctypes.sizeof(ctypes.c_long) < 8:  # where offsets may have other types
        return
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    if allocate(handle, 0, 0, size_bytes) != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def sync_folders(folder: Path) -> None:
    """Flush the entries of `folder` and of all folders below it to the disk."""
    for place, _, _ in os.walk(folder):
        _sync_folder(Path(place))


def remove_leftovers(target: Path) -> None:
    """Remove the hidden folders that killed runs on this machine left beside `target`.

    If such a run had moved the old folder away and not yet put the new one in place, the old one is put back.
    """
    pattern = re.compile(re.escape(f".{target.name}.vrscope-") + r"(new|old)-([0-9a-f]{8})-(\d+)-[0-9a-f]+")
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match is None or match[2] != _machine() or _alive(int(match[3])):
            continue
        if match[1] == "old" and not target.exists():
            entry.rename(target)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _places_in_use() -> list[Path]:
    """Return the current folder and the home folder, as far as they exist."""
    places = []
    for name in (".", "~"):
        with contextlib.suppress(OSError, RuntimeError):
            places.append(Path(name).expanduser().resolve())
    return places


def _publish(temporary: Path, target: Path) -> None:
    """Put `temporary` at `target` in one step, then remove what was there.

    Where two folders cannot be exchanged in one step, a kill between two renames leaves the old one hidden; the next
    run puts it back.
    """
    old = temporary
    if not target.exists() or not any(target.iterdir()):
        temporary.rename(target)  # replaces an empty folder, fails on any other
    elif not _exchange(temporary, target):
        old = target.with_name(_hidden_name(target, "old"))
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _hidden_name(target: Path, kind: str) -> str:
    return f".{target.name}.vrscope-{kind}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def _machine() -> str:
    """Return eight digits that tell machines apart which share a disk, as process numbers alone do not."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    """Return whether a process of this number runs; True where asking would end it."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
