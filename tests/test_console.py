"""The terminal: escaping, tables that are not cut in a pipe, progress that stays out of the way."""

from __future__ import annotations

import gc
import io
import re
import sys

import pytest

from vrscope import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_stays_on_one_line_whatever_it_holds() -> None:
    nasty = "a\nb\x1b[31m\u202e\udc80é"
    assert console.escape(nasty) == "a\\nb\\x1b[31m\\u202e\\udc80é"


def test_a_complaint_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("two\nlines")
    assert capsys.readouterr() == ("", "vrscope: two\\nlines\n")


def test_a_table_in_a_pipe_is_neither_cut_nor_coloured_nor_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.mlp." + "x" * 100 + "[bold]"
    console.print_table("Title", ("tensor", "std"), [(name, "0.5"), ("b\x1b", "1.5")], right=("std",))
    text = capsys.readouterr().out
    assert name in text
    assert "\x1b" not in text and "b\\x1b" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_progress_is_silent_if_quiet_or_soon_over_and_sparse_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    for quiet, seconds, lines in ((True, 100.0, 0), (False, 0.01, 0), (False, 1.0, 6)):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with console.progress_display(quiet) as progress:
            for done in range(101):
                now[0] += seconds
                progress("read\nweights", done, 100, "bytes")
        assert stream.getvalue().count("\n") == lines
        assert stream.getvalue().count("vrscope: read\\nweights ") == lines


def test_long_work_is_told_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress_display(False) as progress:
        for done in (0, 10, 95):
            progress("units", done, 100, "ms")
            now[0] += 60.0
    assert stream.getvalue().splitlines() == ["vrscope: units 10%, 9 min left", "vrscope: units 95%, 6 s left"]


def test_progress_on_a_terminal_is_a_bar_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress_display(False) as progress:
        progress("first", 1, 2, "bytes")
        progress("second", 2, 2, "tokens")
    assert "first" in stream.getvalue() and "second" in stream.getvalue()


def test_progress_in_bytes_tells_rate_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress_display(False) as progress:
        progress("reading", 0, 40_000_000_000, "bytes")
        now[0] = 20.0
        progress("reading", 10_000_000_000, 40_000_000_000, "bytes")
        now[0] = 40.0
        progress("counting", 0, 100, "tokens")
    assert stream.getvalue().splitlines()[0] == "vrscope: reading 25%, 0.50 GB/s, 60 s left"
    assert "/s" not in stream.getvalue().splitlines()[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_that_begins_again_has_a_pace_of_its_own(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with console.progress_display(False) as progress:
        for seconds, done in ((0, 0), (100, 40), (10_000, 0), (20, 10), (20, 20)):
            now[0] += seconds
            progress("reading", done * 10**9, 40 * 10**9, "bytes")
    if not terminal:
        assert stream.getvalue().splitlines() == [
            "vrscope: reading 100%, 0.40 GB/s",
            "vrscope: reading 0%",
            "vrscope: reading 25%, 0.50 GB/s, 60 s left",
            "vrscope: reading 50%, 0.50 GB/s, 40 s left",
        ]
    else:
        assert "50% 0.50 GB/s" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_the_rate_leaves_out_what_was_done_when_the_stage_was_first_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress_display(False) as progress:
        progress("reading", 20 * 10**9, 40 * 10**9, "bytes")
        now[0] = 20.0
        progress("reading", 30 * 10**9, 40 * 10**9, "bytes")
    assert stream.getvalue() == "vrscope: reading 75%, 0.50 GB/s, 20 s left\n"


def test_garbage_is_looked_for_again_once_the_work_begins() -> None:
    told: list[int] = []
    assert gc.isenabled()
    gc.disable()
    try:
        progress = console.Starting(lambda stage, done, total, unit: told.append(done))
        assert not gc.isenabled()
        progress("reading", 0, 2, "bytes")
        assert gc.isenabled() and gc.get_freeze_count() > 0
        progress("reading", 1, 2, "bytes")
    finally:
        gc.enable()
        gc.unfreeze()
    assert told == [0, 1]
