from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "walkthrough.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return {cell.id: cell for cell in notebook.cells}


def printed(cell) -> str:
    """Everything a cell showed, as plain text."""
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(parts)


def test_the_file_is_valid_and_holds_no_results(stored):
    nbformat.validate(stored)
    assert (stored.nbformat, stored.nbformat_minor) == (4, 5)
    assert stored.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in stored.cells}) == len(stored.cells)
    assert all(not cell.outputs and cell.execution_count is None for cell in stored.cells if cell.cell_type == "code")


def test_no_cell_says_anything_on_standard_error(executed):
    noise = {
        name: [output.text for output in cell.get("outputs", []) if output.get("name") == "stderr"]
        for name, cell in executed.items()
    }
    assert not {name: text for name, text in noise.items() if text}


def test_the_rescaled_model_is_proved_equal_bit_for_bit(executed):
    assert re.match(r"[1-9]\d* scales in \d+ spaces; the rescaled model will be bit-equal", printed(executed["plan"]))
    assert "undone, byte for byte: True" in printed(executed["invert"])
    assert "False" not in printed(executed["rescale"])


def test_the_damage_table_compares_both_checkpoints(executed):
    shown = printed(executed["measure"])
    for word in ("int8", "nf4", "int4-g64", "none", "kl_sem"):
        assert word in shown


def test_the_coarse_plan_is_shown_to_be_blind(executed):
    rows = [line for line in printed(executed["reach-tensor"]).splitlines() if " nf4 " in line]
    assert rows and all("False" in row for row in rows)
    assert "changes no scale" not in printed(executed["reach-tensor"])  # it is blind to a plan that does something


def test_figures_are_drawn(executed):
    for name in ("depth", "plot"):
        assert any("image/png" in output.get("data", {}) for output in executed[name].outputs), name


def test_the_whole_job_leaves_its_files(executed):
    shown = printed(executed["run"])
    for name in ("report.html", "results.json", "plan.json", "rescaled"):
        assert name in shown.splitlines()
    assert "[good]" in shown
