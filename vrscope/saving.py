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

RESULTS_FILE, PAGE_FILE = "results.json", "report.html"


def save(report: Report, out: str | Path, html: bool = True) -> list[Path]:
    """Write a report as `results.json`, one CSV per table, and the page `report.html`; return the paths.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        message = f"{folder}: expected a folder to write, found a file. Give another name with -o."
        raise OutputError(message)
    written = [folder / RESULTS_FILE]
    write_text(written[0], to_json(report))
    for name, frame in report.tables.items():
        if name != "histograms":  # lists within cells; they are in the JSON
            written.append(folder / f"{name}.csv")
            write_text(written[-1], frame.to_csv(index=False))
    if html:
        from vrscope.report.html import write

        written.append(folder / PAGE_FILE)
        write(report, written[-1])
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
    findings = reports[0].verdict if len(reports) == 1 else verdict(tables, facts)
    return Report(kind, facts, findings, tables, columns)
