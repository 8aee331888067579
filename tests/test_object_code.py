"""Loops as object code: the same results without numba, and never code that belongs to another loop."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vrscope import object_code
from vrscope.checkpoint.layout import FLOAT_DTYPES
from vrscope.compiling import standalone

if not (sys.platform == "linux" and platform.machine() == "x86_64"):
    pytest.skip("loops are kept as object code on Linux and x86-64 alone", allow_module_level=True)

SOURCE = """
import json
import sys

import numpy as np

from vrscope.compiling import standalone

@standalone
def _step(value):
    return value * {factor}

@standalone
def scaled(values, out, rows):
    for i in range(values.size):
        out[i] = _step(values[i]) + rows
    return values.size

def adding(number):
    @standalone
    def add(values, out):
        for i in range(values.size):
            out[i] = values[i] + number
    return add

def results():
    values = np.arange(6.0)
    out, more, other = np.zeros(6), np.zeros(6), np.zeros(6)
    count = scaled(values, out, 1)
    adding(10.0)(values, more)
    adding(20.0)(values, other)
    return [count, out.tolist(), more.tolist(), other.tolist()]

if __name__ == "__main__":
    found = results()
    print(json.dumps(["numba" in sys.modules, *found]))
"""


def run(path: Path, factor: int = 3) -> list[Any]:
    path.write_text(SOURCE.replace("{factor}", str(factor)))
    found: list[Any] = json.loads(printed(path.parent, str(path)))
    return found


def printed(folder: Path, *words: str) -> str:
    own = os.environ | {"NUMBA_CACHE_DIR": str(folder / "kept")}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, env=own).stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(object_code, "_folders", lambda function: [tmp_path / "kept" / "vrscope-loops"])
    return tmp_path


def expected(factor: int = 3) -> list[Any]:
    values = np.arange(6.0)
    return [6, (values * factor + 1).tolist(), (values + 10).tolist(), (values + 20).tolist()]


def test_the_second_process_computes_the_same_without_numba(folder: Path) -> None:
    path = folder / "loops.py"
    assert run(path) == [True, *expected()]
    assert len(list((folder / "kept" / "vrscope-loops").glob("*.loop"))) == 3  # `_step` is part of `scaled`
    assert run(path) == [False, *expected()]


def test_a_change_anywhere_in_the_file_is_compiled_anew(folder: Path) -> None:
    path = folder / "loops.py"
    for factor, started in ((3, True), (5, True), (3, False)):  # `scaled` itself is the same text
        assert run(path, factor) == [started, *expected(factor)]


LATE = """
import pathlib
import loops
path = pathlib.Path(loops.__file__)
path.write_text(path.read_text().replace("* 3", "* 5"))
print(loops.results())
"""


def test_code_that_was_imported_before_its_file_changed_is_not_kept_for_the_new_file(folder: Path) -> None:
    path = folder / "loops.py"
    path.write_text(SOURCE.replace("{factor}", "3"))
    (folder / "late.py").write_text(LATE)
    assert json.loads(printed(folder, str(folder / "late.py"))) == expected(3)
    assert json.loads(printed(folder, str(path))) == [True, *expected(5)]


@pytest.mark.parametrize("harm", [b"", b"{", b"{}\nxyz", b"0\nf none\nabc", b"\xff\n\xff"])
def test_a_damaged_file_is_compiled_anew(folder: Path, harm: bytes) -> None:
    path = folder / "loops.py"
    run(path)
    for kept in (folder / "kept" / "vrscope-loops").glob("*.loop"):
        kept.write_bytes(harm)
    assert run(path) == [True, *expected()]
    assert run(path) == [False, *expected()]


def test_what_is_kept_of_an_earlier_text_does_not_count(folder: Path) -> None:
    path = folder / "loops.py"
    run(path, 3)
    program = "import loops; run = [loops.scaled.on_disk(), loops.results(), loops.scaled.on_disk()]; print(run[::2])"
    asked = (f"import sys; sys.path.insert(0, {str(folder)!r}); {program}",)
    assert printed(folder, "-c", *asked).strip() == "[True, True]"
    path.write_text(SOURCE.replace("{factor}", "5"))
    assert printed(folder, "-c", *asked).strip() == "[False, True]"


def test_beside_the_module_what_is_kept_of_an_earlier_text_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    path = tmp_path / "loops.py"
    asked = (sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import loops; loops.results()")

    def kept(factor: int) -> set[str]:
        path.write_text(SOURCE.replace("{factor}", str(factor)))
        subprocess.run(asked, check=True)
        return {file.name for file in (tmp_path / "__pycache__").glob("*.loop")}

    first, second = kept(3), kept(5)
    assert len(first) == len(second) == 3
    assert not first & second


def test_what_the_compiler_refuses_is_left_to_numba(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(text: str, symbol: str) -> bytes:
        del text
        message = f"{symbol}: LLVM ERROR"
        raise RuntimeError(message)

    monkeypatch.setattr(object_code, "_alone", refuses)

    def double(values: Any, out: Any) -> None:
        for i in range(values.size):
            out[i] = 2 * values[i]

    out = np.zeros(3)
    standalone(double)(np.arange(3.0), out)
    assert out.tolist() == [0, 2, 4]
    assert not list((folder / "kept").rglob("*.loop"))


def test_where_nothing_can_be_written_loops_still_run(folder: Path) -> None:
    (folder / "kept").write_text("a file, not a folder")
    assert run(folder / "loops.py") == [True, *expected()]


def add_up(values: Any, out: Any) -> int:
    kept = np.zeros(1)  # memory of its own, so it does not qualify
    for i in range(values.size):
        kept[0] += values[i]
    out[0] = kept[0]
    return 1


def first_of(values: Any) -> float:
    first: float = values[0]
    return first


def largest(values: Any) -> Any:
    top = values[0, 0]
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            top = max(top, values[i, j])
    return top


def test_what_does_not_qualify_is_left_to_numba(folder: Path) -> None:
    out = np.zeros(1)
    assert standalone(add_up)(np.arange(5.0), out) == 1 and out[0] == 10
    assert standalone(first_of)(np.array([2.5])) == 2.5
    loop = standalone(largest)
    assert loop(np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2]) == 10  # not contiguous
    assert not list(folder.rglob("*.loop"))
    assert loop(np.arange(12, dtype=np.int64).reshape(3, 4)) == 11
    assert len(list(folder.rglob("*.loop"))) == 1


@pytest.mark.parametrize(("dtype", "top"), [(np.uint64, 2**64 - 1), (np.int64, -1), (np.uint8, 255), (np.bool_, 1)])
def test_whole_numbers_come_back_whole(folder: Path, dtype: type, top: int) -> None:
    values = np.full((1, 1), top, dtype)
    values.flags.writeable = False
    assert standalone(largest)(values) == top
    assert list(folder.rglob("*.loop"))


def test_an_interpreter_with_other_arrays_is_left_to_numba(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_code, "_arrays_as_expected", lambda: False)
    assert standalone(largest)(np.ones((2, 2), np.int64)) == 1
    assert not list(folder.rglob("*.loop"))


def test_on_another_system_loops_are_left_to_numba(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert standalone(largest)(np.ones((2, 2), np.int64)) == 1
    assert not list(folder.rglob("*.loop"))


def test_where_arrays_keep_things_is_looked_at() -> None:
    assert object_code._arrays_as_expected.__wrapped__()


def test_every_such_loop_of_the_package_qualifies(folder: Path) -> None:
    lines = [
        "import sys",
        "from vrscope.rescale.verify import rehearsal as proving",
        "from vrscope.stats.summary import rehearsal as summing",
        f"for dtype in {sorted(FLOAT_DTYPES)!r}:",
        "    summing(dtype), proving(dtype)",
        "print('numba' in sys.modules)",
    ]
    for started in ("True", "False"):
        assert printed(folder, "-c", "\n".join(lines)).strip() == started
