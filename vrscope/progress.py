"""How long work tells a caller where it is; the library itself never prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callable told of progress: `stage` in words, `done` of `total`, counted in `unit` ("bytes", "tokens", ...)."""

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        """Take note that `done` of `total` is finished."""


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Ignore progress."""
    del stage, done, total, unit
