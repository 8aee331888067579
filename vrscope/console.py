"""The terminal: escaped text, tables, and progress that shows only where somebody can see it.

Results go to standard output, everything else to standard error. Used by the command line alone.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vrscope.progress import Progress, silent

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_PIPE_WIDTH = 200  # columns of output that is not a terminal; wide, so that names are not cut
_SPARSE_SECONDS = 15.0  # between lines of progress where there is no terminal


def escape(text: str) -> str:
    """Return `text` with every character that is not printable written as an escape, so that it stays on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def say(text: str = "") -> None:
    """Print one line of results."""
    sys.stdout.write(f"{text}\n")


def complain(text: str) -> None:
    """Print one line on standard error, as `vrscope: ...`."""
    sys.stderr.write(f"vrscope: {escape(text)}\n")


def emit(*items: RenderableType) -> None:
    """Print rich tables and texts, with colours only on a terminal."""
    from rich.console import Console
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, width=None if terminal else _PIPE_WIDTH)
    with console.capture() as captured:  # written by this module, so that a closed pipe is handled in one place
        for item in items:
            console.print(item, soft_wrap=isinstance(item, Text))  # the terminal breaks sentences, a file keeps them
    rendered = captured.get()
    sys.stdout.write(rendered if terminal else "".join(f"{line.rstrip()}\n" for line in rendered.splitlines()))


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table of text.

    Parameters
    ----------
    title
        Line above the table.
    headers
        Names of the columns.
    rows
        One text per column and row; escaped here.
    right
        The headers of the columns that hold numbers.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape(cell)) for cell in row))
    emit(*((Text(f"\n{title}", style="bold"),) if title else ()), table)


@contextmanager
def progress_display(quiet: bool) -> Iterator[Progress]:
    """Yield a progress callable: bars on a terminal, a line now and then elsewhere, nothing if `quiet`."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _Bars(bars)
    else:
        yield _Lines(time.monotonic())


@dataclass(slots=True)
class Starting:
    """Passes progress on; the first sign of work ends the start of the process, where garbage was not looked for."""

    shown: Progress
    over: bool = field(default_factory=gc.isenabled)

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        """Take note of progress."""
        if not self.over:
            self.over = True
            gc.freeze()  # what was made so far stays to the end, and is not looked through again and again
            gc.enable()
        self.shown(stage, done, total, unit)


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Bars(*columns, console=Console(stderr=True), transient=True)


@dataclass(slots=True)
class _Pace:
    """How fast one stage goes. A stage whose count falls back has begun again, as for a second checkpoint."""

    began: float
    first: int
    last: int

    def rate(self, done: int, unit: str) -> str:
        """Return how fast bytes are worked on; nothing for other units, whose number says little."""
        seconds, worked = time.monotonic() - self.began, done - self.first
        return f"{worked / seconds / 1e9:.2f} GB/s" if unit == "bytes" and seconds > 0 and worked else ""

    def left(self, done: int, total: int) -> str:
        """Return about how much time is left; nothing where it cannot be told, or nothing is left."""
        seconds, worked = time.monotonic() - self.began, done - self.first
        return _time(seconds * (total - done) / worked) if worked and done < total and seconds > 0 else ""


@dataclass(slots=True)
class _Paces:
    """The pace of every stage."""

    of: dict[str, _Pace] = field(default_factory=dict)

    def note(self, stage: str, done: int) -> tuple[_Pace, bool]:
        """Take note of progress; return the pace of the stage, and whether it has begun anew."""
        pace = self.of.get(stage)
        anew = pace is None or done < pace.last
        if pace is None or anew:
            pace = self.of[stage] = _Pace(time.monotonic(), done, done)
        pace.last = done
        return pace, anew


@dataclass(slots=True)
class _Bars:
    """One bar per stage, kept in the order in which the stages began."""

    bars: Bars
    tasks: dict[str, TaskID] = field(default_factory=dict)
    paces: _Paces = field(default_factory=_Paces)

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        pace, anew = self.paces.note(stage, done)
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(escape(stage), total=total, rate="")
        elif anew:
            self.bars.reset(self.tasks[stage])
        self.bars.update(self.tasks[stage], completed=done, total=total, rate=pace.rate(done, unit))


@dataclass(slots=True)
class _Lines:
    """A line on standard error every `_SPARSE_SECONDS`; work that ends sooner prints none."""

    last: float
    paces: _Paces = field(default_factory=_Paces)

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        pace, _ = self.paces.note(stage, done)
        now = time.monotonic()
        if now - self.last < _SPARSE_SECONDS:
            return
        self.last = now
        share = f" {done / total:.0%}" if total else ""
        rate, left = pace.rate(done, unit), pace.left(done, total)
        more = "".join(f", {text}" for text in (rate, f"{left} left" if left else "") if text)
        sys.stderr.write(f"vrscope: {escape(stage)}{share}{more}\n")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
