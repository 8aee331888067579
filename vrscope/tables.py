"""Results as tables: what every stage returns, what the page shows, and what `results.json` holds.

A table is a pandas DataFrame. Each column is described once, here or in the table of statistics, by a unit and one
sentence; that sentence is what CSV readers, the report and the README show.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1  # raised when a table or column changes its meaning


@dataclass(frozen=True, slots=True)
class Column:
    """A column of results: its name, its unit ("" = a pure number or text) and one sentence that says what it is."""

    name: str
    unit: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one command found out.

    Attributes
    ----------
    kind
        The command: "run", "analyze" or "measure".
    provenance
        Model, family, versions, settings, text, tokens, machine, date: plain JSON values.
    verdict
        The findings in plain words, most important first: dictionaries with `level` ("good", "note", "bad"), `text`.
    tables
        Name to DataFrame. Names and columns are listed in `columns`.
    columns
        For each table, the description of its columns.
    """

    kind: str
    provenance: Mapping[str, Any]
    verdict: tuple[Mapping[str, str], ...] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    columns: Mapping[str, tuple[Column, ...]] = field(default_factory=dict)


def to_json(report: Report) -> str:
    """Return the report as JSON text; NaN and infinity become null, as JSON has neither."""
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": report.kind,
        "provenance": dict(report.provenance),
        "verdict": [dict(item) for item in report.verdict],
        "columns": {
            table: [{"name": c.name, "unit": c.unit, "meaning": c.meaning} for c in columns]
            for table, columns in report.columns.items()
        },
    }
    for name, frame in report.tables.items():
        body[name] = frame.to_dict(orient="records")
    return json.dumps(_plain(body), indent=1, allow_nan=False)


def from_json(text: str) -> Report:
    """Return the report that `to_json` wrote.

    Raises
    ------
    CheckpointError
        If the text is not a vrscope result, or of a newer schema.
    """
    try:
        body = json.loads(text)
        version = body["schema_version"]
        if version == SCHEMA_VERSION:
            return _parsed(body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        message = f"not a vrscope results file ({what}). Give the results.json that `vrscope run` or `analyze` wrote."
        raise CheckpointError(message) from error
    message = f"results of schema {version}, expected {SCHEMA_VERSION}. Make them again with this version of vrscope."
    raise CheckpointError(message)


def _parsed(body: Mapping[str, Any]) -> Report:
    """Return the report of a parsed file; any error means that it is not one."""
    import pandas as pd

    fixed = ("schema_version", "kind", "provenance", "verdict", "columns")
    columns = {
        table: tuple(Column(c["name"], c["unit"], c["meaning"]) for c in rows)
        for table, rows in body["columns"].items()
    }
    tables = {}
    for name in [name for name in body if name not in fixed]:
        described = [column.name for column in columns.get(name, ())]
        tables[name] = pd.DataFrame(body[name], columns=described if not body[name] else None)
        lacking = sorted(set(described) - set(tables[name].columns))
        if lacking:
            message = f"table {name} lacks the column {lacking[0]}"
            raise ValueError(message)
    verdict = tuple({"level": str(item["level"]), "text": str(item["text"])} for item in body["verdict"])
    return Report(str(body["kind"]), dict(body["provenance"]), verdict, tables, columns)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: beside its target, synced, then renamed.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            os.replace(name, path)  # noqa: PTH105
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror or error}). Choose a folder you may write to."
        raise OutputError(message) from error


def _plain(value: Any) -> Any:
    """Return `value` with only JSON types: numpy scalars unpacked, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
