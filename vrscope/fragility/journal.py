"""Finished units on disk, one JSON line each, so that interrupted work goes on where it stopped.

The first line says what the results are of. Every line is synced before the next unit begins; a line that was cut off
by a crash is dropped when the work goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vrscope.errors import OutputError

JOURNAL_FILE = "sensitivity.jsonl"
_VERSION = 1


@dataclass(slots=True)
class Journal:
    """Results of units by name, each appended to a file as soon as it is known.

    Attributes
    ----------
    path
        The file; None keeps results in memory only.
    done
        What was found so far.
    """

    path: Path | None = None
    done: dict[str, dict[str, float]] = field(default_factory=dict)
    _file: IO[bytes] | None = None
    _header: Mapping[str, Any] | None = None  # still to be written
    _made_folder: bool = False

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *reason: object) -> None:
        if self._file is None or self.path is None:
            return
        self._file.close()
        if self._header is not None:  # nothing was finished, so nothing is left
            self.path.unlink(missing_ok=True)
            if self._made_folder:
                with suppress(OSError):  # something else is in it by now
                    self.path.parent.rmdir()

    def add(self, unit: str, figures: Mapping[str, float]) -> None:
        """Take note of the figures of a unit; when this returns they are on the disk.

        Raises
        ------
        OutputError
            If the disk is full.
        """
        if self._header is not None:
            self._write(self._header)
            self._header = None
        self._write({"unit": unit, **figures})
        self.done[unit] = dict(figures)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            message = (
                f"{self.path}: cannot be written ({error.strerror or error}). Make room, then go on with --resume."
            )
            raise OutputError(message) from error


def open_journal(path: Path, subject: Mapping[str, Any], *, resume: bool, force: bool = False) -> Journal:
    """Return a journal at `path`, with what it holds already if the work is to go on.

    Parameters
    ----------
    path
        The file; its folder is made.
    subject
        What the results are of: plain JSON values that must be the same when the work goes on.
    resume
        Go on with the file if there is one.
    force
        Without `resume`, replace a file that is there.

    Raises
    ------
    OutputError
        If there is a file and neither is set, if it is about something else or damaged, or cannot be written.
    """
    header = json.loads(json.dumps({"vrscope_sensitivity": _VERSION, **subject}))
    try:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.read_bytes() if path.exists() else b""
        if found and not (resume or force):
            message = f"{path}: holds finished units already. Go on with --resume, or begin anew with --force."
            raise OutputError(message)
        done, whole = _read(path, found, header) if resume else ({}, 0)
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(whole)
        file.seek(whole)
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror or error}). Choose a folder you may write to."
        raise OutputError(message) from error
    return Journal(path, done, file, None if whole else header, made)


def _read(path: Path, content: bytes, header: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], int]:
    """Return the results in a journal, and how many bytes of it are whole lines."""
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    if not lines:
        return {}, 0
    done: dict[str, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if number == 1:
                _require_same(path, entry, header)
            else:
                unit = str(entry.pop("unit"))
                done[unit] = {str(key): float(value) for key, value in entry.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{path}: expected one finished unit per line, found something else in line {number}. "
            raise OutputError(message + "Begin anew with --force.") from error
    return done, whole


def _require_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a journal of other work, naming the first thing that differs."""
    for key in expected:
        if found.get(key) != expected[key]:
            message = (
                f"{path}: expected results for {_words(key, expected[key])}, found them for "
                f"{_words(key, found.get(key))}. Use the same settings, give another folder, or begin anew with "
                "--force."
            )
            raise OutputError(message)


def _words(key: str, value: Any) -> str:
    text = str(value)
    return f"{key.replace('_', ' ')} {text if len(text) <= 40 else text[:12] + '...'}"
