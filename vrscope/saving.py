"""Results on disk: written as JSON, CSV and a page, read back, and joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope.errors import CheckpointError, OutputError
from vrscope.tables import Column, Report, from_json, to_json, write_text
from vrscope.verdict import verdict

if TYPE_CHECKING:
    import pandas as pd

RESULTS_FILE, PAGE_FILE, PLAN_COPY = "results.json", "report.html", "plan.json"
CSV_TABLES = (
    "activation_channels",
    "activations",
    "additivity",
    "approximate",
    "channels",
    "correlation",
    "damage",
    "depth_law",
    "experts",
    "exponents",
    "gains",
    "heads",
    "layer_error",
    "linears",
    "matrices",
    "outlier_dimensions",
    "proof",
    "reach",
    "recipe",
    "recipe_summary",
    "residual",
    "sensitivity",
    "spaces",
    "tensors",
    "unreachable",
    "weight_error",
)


def earlier_results(folder: Path) -> list[Path]:
    """Return the files in a folder that bear the names of results."""
    names = {RESULTS_FILE, PAGE_FILE, PLAN_COPY, *(f"{table}.csv" for table in CSV_TABLES)}
    return sorted(folder / name for name in names if (folder / name).exists())


def remove_earlier(folder: Path) -> None:
    """Remove earlier results from a folder.

    A run does so before it replaces their checkpoint: interrupted, it must not leave the results of one beside another.
    """
    for old in earlier_results(folder):
        old.unlink()


def require_free(out: str | Path, force: bool) -> None:
    """Refuse a folder for results before any work is done for it.

    Raises
    ------
    OutputError
        If it is a file, a checkpoint, or holds earlier results and `force` is not set.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        message = f"{folder}: expected a folder to write, found a file. Give another name with -o."
        raise OutputError(message)
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        message = (
            f"{folder}: is a checkpoint, and results are not written among its files. Give another folder with -o."
        )
        raise OutputError(message)
    found = earlier_results(folder)
    if found and not force:
        message = f"{found[0]}: exists already. Give another folder with -o, or --force to replace earlier results."
        raise OutputError(message)


def save(report: Report, out: str | Path, html: bool = True, force: bool = False) -> list[Path]:
    """Write a report as `results.json`, one CSV per table, and the page `report.html`; return the paths.

    With `force`, results of earlier work in the folder are removed first, so that none are mixed. Interrupted, or where
    the disk is full, no results are left.

    Raises
    ------
    OutputError
        If the folder cannot be written, is a checkpoint, or holds earlier results and `force` is not set.
    """
    folder = Path(out)
    require_free(folder, force)
    texts = {RESULTS_FILE: to_json(report)}
    for name, frame in report.tables.items():
        if name != "histograms":  # lists within cells; they are in the JSON
            texts[f"{name}.csv"] = frame.to_csv(index=False)
    if html:
        from vrscope.report.html import render

        texts[PAGE_FILE] = render(report)
    for old in earlier_results(folder):
        if old.name != PLAN_COPY:
            old.unlink()
    written: list[Path] = []
    try:
        for name, text in texts.items():
            written.append(folder / name)
            write_text(written[-1], text)
    except BaseException:  # all of them or none, also when interrupted
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def load_report(path: str | Path) -> Report:
    """Return the report in a `results.json`, or in a folder that holds one.

    Raises
    ------
    CheckpointError
        If there is none, or it is not a vrscope result.
    """
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        message = f"{file}: no readable results ({error}). Give what `vrscope run`, `analyze` or `measure` wrote."
        raise CheckpointError(message) from error


def merge_reports(reports: Sequence[Report]) -> Report:
    """Return one report with the tables of all; for a table that several have, the last one counts.

    Raises
    ------
    CheckpointError
        If there is none to merge.
    """
    if not reports:
        message = "no results to draw. Give at least one results.json."
        raise CheckpointError(message)
    tables: dict[str, pd.DataFrame] = {}
    columns: dict[str, tuple[Column, ...]] = {}
    facts: dict[str, Any] = {}
    for report in reports:
        tables |= report.tables
        columns |= report.columns
        facts |= report.provenance
    kind = reports[0].kind if len(reports) == 1 else "merged"
    try:
        findings = reports[0].verdict if len(reports) == 1 else verdict(tables, facts)
    except (KeyError, TypeError) as error:
        message = f"the results do not fit together ({error} is missing). Make them with this version of vrscope."
        raise CheckpointError(message) from error
    return Report(kind, facts, findings, tables, columns)
