"""The shape of the package: imports point downward, what must be light is light, modules stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vrscope"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "bitsandbytes", "matplotlib", "numba", "pandas", "scipy")


def test_imports_point_downward_only() -> None:
    # In a process of its own: the linter reconfigures logging, which would silence loggers that other tests listen to.
    code = "import sys; from importlinter.cli import lint_imports as run; sys.exit(run(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import vrscope",
        "import vrscope; vrscope.VrscopeError, vrscope.Report, vrscope.__version__",
        "from vrscope.cli import main; main(['--help'])",
        "from vrscope.cli import main; main(['run', '--help'])",
        "from vrscope.cli import main; main(['list', 'families'])",
        "from vrscope.cli import main; main(['list', 'formats'])",
        "from vrscope.cli import main; main(['list', 'statistics'])",
        "from vrscope.cli import main; main(['list', 'methods'])",
    ],
)
def test_what_answers_at_once_loads_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint('LOADED', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_a_module_says_what_it_is_stays_small_and_imports_by_name(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert len(text.splitlines()) <= 400
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert "vrscope." not in text, "a sub-package's __init__ re-exports nothing"


def test_the_function_rescale_is_not_hidden_by_the_folder_of_that_name() -> None:
    code = "import vrscope, vrscope.rescale.plan\nassert vrscope.rescale.__module__ == 'vrscope.api'"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True, timeout=60)


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error() -> None:
    import vrscope

    for name in vrscope.__all__:
        assert getattr(vrscope, name) is not None
    assert set(dir(vrscope)) == set(vrscope.__all__)
    with pytest.raises(AttributeError, match="colour"):
        vrscope.colour  # noqa: B018
