"""The benchmarks' own arithmetic, and that they clean up; what they find is not tested."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from vrscope.demo import demo_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module that times processes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measured")


@pytest.fixture
def speed(measured: ModuleType) -> ModuleType:
    """Return the benchmark of speed and memory."""
    return importlib.import_module("speed")


def test_ratios_are_taken_round_by_round(measured: ModuleType) -> None:
    slow, fast = (measured.Command(name, name, []) for name in ("slow", "fast"))
    slow.seconds, fast.seconds = [4.0, 8.0, 9.0], [1.0, 4.0, 3.0]
    assert measured.ratios(fast, slow) == [4.0, 2.0, 3.0]
    assert measured.spread([4.0, 2.0, 3.0], ".1f") == "3.0 (2.0 to 4.0)"
    assert measured.spread([2.0], ".1f") == "2.0"


def test_what_a_command_writes_goes_unless_it_is_needed(measured: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"import os, pathlib; pathlib.Path({str(out)!r}).mkdir(); print(os.environ['NUMBA_CACHE_DIR'])"
    for keep in (False, True, True):
        command = measured.Command("c", "c", [sys.executable, "-c", code], out=out, keep=keep, fresh_cache=True)
        command.run()
        assert out.exists() == keep
        assert len(command.seconds) == 1 and command.peak_mb[0] > 1


def test_a_command_that_fails_says_why(measured: ModuleType) -> None:
    command = measured.Command("c", "c", [sys.executable, "-c", "import sys; sys.exit('broken on purpose')"])
    with pytest.raises(SystemExit, match="exit 1\nbroken on purpose"):
        command.run()


def test_tables_name_commands_and_the_summary_has_no_empty_rows(speed: ModuleType) -> None:
    cases = []
    for size in (1, 4):
        names = [speed.MEMORY, "analyze", "analyze, formats", "plan", "rescale", "verify", speed.COPY]
        commands = [
            speed.Command(name, f"run {name}", [], (speed.COPY,) if name == "rescale" else ()) for name in names
        ]
        for number, command in enumerate(commands, 1):
            command.seconds, command.cpu, command.peak_mb = [size * number, size * number * 2], [1.0], [100.0 * size]
        cases.append(speed.Case(f"Llama, {size} GB bfloat16", size * 10**9, commands))
    table = cases[0].table()
    assert sum("`run " in line for line in table) == 7
    assert any("1.40 (1.40 to 1.40) cp -r" in line for line in table)
    started = [speed.Command(str(number), "", [], seconds=[number]) for number in range(3)]
    summary = speed._summary(cases, [], started)
    assert summary[0] == "|  | Llama, 1 GB | Llama, 4 GB |"
    assert not any(word in "".join(summary) for word in ("naive", "weightlens")), "these were not measured"
    assert any(line.startswith("| peak MB") and line.endswith("| 100 / 100 | 400 / 400 |") for line in summary)
    assert any(line == "| analyze | 100 | 400 | 3.00 |" for line in speed._growth(cases))


@pytest.mark.parametrize("kind", ["sum", "copy"])
def test_a_pass_over_memory_prints_seconds(kind: str) -> None:
    command = [sys.executable, BENCHMARKS / "roofline.py", kind, demo_model()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 0 < float(done.stdout) < 60


def test_an_interrupt_removes_the_checkpoints(tmp_path: Path) -> None:
    words = [sys.executable, BENCHMARKS / "speed.py", "--gb", "0.01", "--moe", "0", "--scratch", tmp_path]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("round 1")
        assert list(tmp_path.iterdir())
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)  # the process alone: it ends the command it runs
        last = process.stderr.read().splitlines()[-1]
        assert process.wait(timeout=60) == 130
    assert last == "interrupted; the scratch folder is removed"
    assert list(tmp_path.iterdir()) == []
