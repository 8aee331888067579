"""Reading result tables safely: older files lack columns, and values may be missing anywhere.

Every section reads its table through these functions, so that a missing column is a column of missing values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.report.blocks import Head
from vrscope.report.text import visible
from vrscope.tables import Column, Report

if TYPE_CHECKING:
    import pandas as pd

LABELS = {
    "abs_q50": "|w| median",
    "abs_q99": "|w| 99 %",
    "abs_q999": "|w| 99.9 %",
    "abs_q9999": "|w| 99.99 %",
    "absmax": "|w| max",
    "can_change": "can change",
    "column_absmax_spread": "column spread",
    "exponent_max": "exponent max",
    "exponent_mean_abs": "mean |exponent|",
    "exponent_min": "exponent min",
    "exponent_p": "exponent p",
    "frobenius_norm": "Frobenius norm",
    "inf_count": "Inf",
    "kl": "mean KL",
    "kurtosis_excess": "excess kurtosis (normal\u00a0=\u00a00)",
    "nan_count": "NaN",
    "outlier_share_4sigma": "beyond 4σ",
    "outlier_share_6sigma": "beyond 6σ",
    "r_squared": "R²",
    "row_absmax_spread": "row spread",
    "p_holm": "p (Holm)",
    "p_value": "p",
    "rho": "ρ",
    "rho_high": "ρ high",
    "rho_low": "ρ low",
    "rho_within_role": "ρ within roles",
    "sigma_1": "σ₁",
    "size_bytes": "stored size",
    "sqnr_db": "SQNR",
    "top1": "top-1 agreement",
    "top_singular_value": "top singular value",
    "tvr_ratio": "std / TVR target",
    "zero_share": "zeros",
}


_KINDS = ("linear", "head", "embed", "conv", "norm", "bias")


def frame_of(report: Report, table: str) -> pd.DataFrame | None:
    """Return a table of the report, or None if it is absent or has no rows."""
    frame = report.tables.get(table)
    return None if frame is None or len(frame) == 0 else frame


def numbers(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """Return a column as float64 of shape `(rows,)`; what is missing, infinite or not a number is NaN."""
    import pandas as pd

    if column not in frame.columns:
        return np.full(len(frame), np.nan)
    values = pd.to_numeric(frame[column].astype("object"), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def texts(frame: pd.DataFrame, column: str) -> list[str]:
    """Return a column as visible text, "" where it is missing."""
    import pandas as pd

    if column not in frame.columns:
        return [""] * len(frame)
    return ["" if _is_none(value, pd.isna) else visible(value) for value in frame[column].tolist()]


def flags(frame: pd.DataFrame, column: str) -> list[bool | None]:
    """Return a column of yes and no, None where it is missing."""
    return [None if np.isnan(value) else bool(value) for value in numbers(frame, column)]


def head(report: Report, table: str, name: str, *, numeric: bool = True, label: str = "") -> Head:
    """Return the head of a result column, with the unit and meaning that the report gives for it."""
    column = next((c for c in report.columns.get(table, ()) if c.name == name), Column(name, "", ""))
    words = label or LABELS.get(name) or visible(name).replace("_", " ")
    return Head(words, visible(column.unit), visible(column.meaning), numeric, name)


def kind_order(kind: str) -> int:
    """Return where a kind of tensor stands in lists: matrices first, then the rest."""
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS)


def _is_none(value: Any, isna: Any) -> bool:
    return not isinstance(value, str | list | tuple | dict | np.ndarray) and bool(isna(value))
