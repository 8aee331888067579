"""The README: its tables are those of the code, its commands parse, its Python runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest

from vrscope.cli import commands
from vrscope.listing import listing

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FAMILIES, STATISTICS = (
    (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("families", "statistics")
)
COMMAND_LINES = [
    line.split("   #")[0]
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("vrscope ")
] + [line for line in re.findall(r"`(vrscope [^`]+)`", README) if "COMMAND" not in line]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """Return the script that writes the README's tables."""
    spec = importlib.util.spec_from_file_location("readme_tables", REPOSITORY / "tools" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_code(writer: ModuleType) -> None:
    assert writer.fresh(README) == README, "run `make readme`"
    assert writer.fresh(STATISTICS) == STATISTICS, "run `make readme`"
    assert writer.fresh(FAMILIES) == FAMILIES, "run `make readme`"


@pytest.mark.parametrize("kind", ["families", "formats", "statistics", "methods"])
def test_every_entry_of_every_table_is_in_its_page(kind: str) -> None:
    _, rows = listing(kind)
    page = {"statistics": STATISTICS, "families": FAMILIES}.get(kind, README)
    assert rows and all(f"| {row[0]} |" in page for row in rows)


def test_a_stale_table_is_noticed(writer: ModuleType) -> None:
    stale = README.replace("| nf4 |", "| nf5 |")
    assert stale != README and writer.fresh(stale) == README


def test_what_benchmarks_found_is_that_of_their_files(writer: ModuleType) -> None:
    names = re.findall(r"<!-- results: (\w+) -->", README)
    assert names and all(writer.summary(name) in README for name in names)
    first = writer.summary(names[0]).splitlines()[-1]
    stale = README.replace(first, "| measured elsewhere |")
    assert stale != README and writer.fresh(stale) == README


@pytest.mark.parametrize("text", ["", "<!-- summary -->\n", "<!-- summary -->\na\n<!-- end of summary -->\n" * 2])
def test_a_file_of_results_without_one_summary_is_refused(
    writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(writer, "RESULTS", tmp_path)
    (tmp_path / "speed.md").write_text(text)
    with pytest.raises(SystemExit, match=r"speed\.md: expected one summary"):
        writer.summary("speed")


def test_it_can_be_read_in_one_go() -> None:
    assert len(README.splitlines()) < 200


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (REPOSITORY / link).exists()] == []


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_line_parses(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = commands.commands[name]
    if arguments or name == "demo":
        with command.make_context(name, arguments):
            pass
    assert isinstance(command, click.Command)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = REPOSITORY / "vrscope" / "demo" / "model"
    code, replaced = re.subn(r'model = "[^"]+"', f"model = {str(model)!r}", example)
    assert replaced == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    damage = names["damage"]
    assert set(damage["format"]) >= {"int8", "nf4"}  # type: ignore[index]
    assert (tmp_path / "balanced" / "model.safetensors").is_file()
