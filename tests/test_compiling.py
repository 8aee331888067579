"""Compiled loops: kept on disk, announced where they are not, and compiled anew where nothing can be kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vrscope.compiling import STAGE, compiled, rehearse

SOURCE = """
from vrscope.compiling import compiled

@compiled
def double(x):
    return x + x
"""


def module_in(folder: Path, name: str) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_use_on_a_machine_is_announced_and_the_next_is_not(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int, str]] = []
    for expected in ([(STAGE, 0, 1, "steps"), (STAGE, 1, 1, "steps")], []):
        calls.clear()
        loops = module_in(tmp_path, "loops")
        rehearse(loops.double, [lambda loops=loops: loops.double(2)], lambda *call: calls.append(call))
        assert calls == expected
        assert loops.double(3.5) == 7


def test_without_a_folder_to_write_functions_still_compile() -> None:
    namespace: dict[str, object] = {}
    exec("def triple(x): return 3 * x", namespace)  # of no file, so numba has nowhere to keep it
    triple = compiled(namespace["triple"])  # type: ignore[type-var]
    assert triple(2) == 6
    calls: list[tuple[str, int, int, str]] = []
    rehearse(triple, [lambda: triple(1)], lambda *call: calls.append(call))
    assert [call[1] for call in calls] == [0, 1]


def test_options_reach_the_compiler() -> None:
    divide = compiled(lambda x: 1.0 / x)
    assert divide(0.0) == float("inf")
    with pytest.raises(ZeroDivisionError):
        compiled(lambda x: 1.0 / x, error_model="python")(0.0)
