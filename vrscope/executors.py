"""Where independent pieces of work run: one after the other, or on threads. Results keep the order of the items."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs one function over many items."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item, in the order of the items."""
        ...


@dataclass(frozen=True, slots=True)
class Serial:
    """Runs everything in the calling thread."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item, in order."""
        return map(function, items)


@dataclass(frozen=True, slots=True)
class Threads:
    """Runs items on `count` threads.

    At most four times as many items as threads are in flight: few, so that memory stays flat; and enough that threads
    have work while the caller is busy with a result.
    """

    count: int

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item, in order, whichever thread finished first."""
        with ThreadPoolExecutor(self.count) as pool:
            waiting: list[Future[Result]] = []
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) >= 4 * self.count:
                        yield waiting.pop(0).result()
                for future in waiting:
                    yield future.result()
            finally:
                for future in waiting:
                    future.cancel()


def default_executor() -> Executor:
    """Return threads over all cores this process may use, or serial execution on one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Threads(cores) if cores > 1 else Serial()
