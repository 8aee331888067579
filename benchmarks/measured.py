"""Processes that are timed, in alternation, and what is told of the times: medians, spreads, ratios within a round."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Command:
    """One process to measure, and what was measured.

    Attributes
    ----------
    name
        Short, for the tables.
    line
        The command as a reader may type it.
    words
        The command as it is run.
    against
        Names of the commands that its rate is compared with.
    out
        What it writes: removed before each run, and after it unless `keep`.
    timed_by_itself
        Whether it prints its seconds, start-up left out, on standard output.
    fresh_cache
        Whether each run gets an empty folder for compiled code.
    """

    name: str
    line: str
    words: Sequence[str]
    against: tuple[str, ...] = ()
    out: Path | None = None
    keep: bool = False
    timed_by_itself: bool = False
    fresh_cache: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Run once and note wall seconds, processor seconds and the largest resident memory of one process."""
        self._remove()
        with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as said:
            environment = os.environ | ({"NUMBA_CACHE_DIR": cache} if self.fresh_cache else {})
            # Python would compile modules anew for each process; those that pip installed are compiled.
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            started = time.perf_counter()
            process = subprocess.Popen(self.words, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
            try:
                printed = process.stdout.read() if process.stdout else ""
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            except BaseException:
                process.kill()
                process.wait()
                raise
            seconds = time.perf_counter() - started
            said.seek(0)
            if process.returncode:
                sys.exit(f"{' '.join(self.words)}: exit {process.returncode}\n{said.read()}")
        self.seconds.append(float(printed) if self.timed_by_itself else seconds)
        self.cpu.append(usage.ru_utime + usage.ru_stime)
        self.peak_mb.append(usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20))
        if not self.keep:
            self._remove()

    def _remove(self) -> None:
        if self.out is not None:
            shutil.rmtree(self.out, ignore_errors=True)


def take_turns(commands: list[Command], rounds: int, before: Callable[[], None] = lambda: None) -> list[Command]:
    """Run every command once a round, each round from another one on, with `before` ahead of each, untimed.

    What a command takes also depends on what ran before it, such as on memory that still waits to be written to disk:
    so every other round goes backwards.
    """
    for number in range(rounds):
        first = number * len(commands) // rounds
        for command in (*commands[first:], *commands[:first])[:: -1 if number % 2 else 1]:
            print(f"round {number + 1}: {command.name}", file=sys.stderr, flush=True)
            before()
            command.run()
    return commands


def ratios(command: Command, other: Command) -> list[float]:
    """Return how many times as fast as another a command was, round by round."""
    return [b / a for a, b in zip(command.seconds, other.seconds, strict=True)]


def spread(values: Sequence[float], style: str) -> str:
    """Return the median, with least and largest if there are several."""
    middle = f"{statistics.median(values):{style}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{style}} to {max(values):{style}})"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table whose first `left` columns hold words, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)] + [""]
