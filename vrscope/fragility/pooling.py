"""Statistics of a weight that a running model joins from several stored tensors, made from those of the tensors.

Only what follows exactly from the statistics of the parts is made: moments, norms, extremes and errors. Quantiles,
shares beyond a number of standard deviations, spreads and ranks do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


def pooled(tables: Mapping[str, pd.DataFrame], joined: Mapping[str, Sequence[str]]) -> dict[str, pd.DataFrame]:
    """Return tables of statistics with rows added for joined weights, where all parts of one have a row.

    Parameters
    ----------
    tables
        "tensors" and "weight_error" get rows; others stay as they are.
    joined
        Name of a joined weight to the names of its parts.
    """
    import pandas as pd

    found = dict(tables)
    tensors, errors = tables.get("tensors"), tables.get("weight_error")
    if tensors is None or not {"count", "std"} <= set(tensors.columns):
        return found
    parts = {name: tensors[tensors["tensor"].isin(own)] for name, own in joined.items()}
    parts = {name: rows for name, rows in parts.items() if len(rows) == len(joined[name])}
    if not parts:
        return found
    found["tensors"] = pd.concat([tensors, pd.DataFrame([_moments(name, rows) for name, rows in parts.items()])])
    if errors is not None and "frobenius_norm" in tensors.columns:
        norms = tensors.set_index("tensor")["frobenius_norm"]
        made = [
            {"tensor": name, "format": scheme, **_error(own, norms)}
            for name in parts
            for scheme, own in errors[errors["tensor"].isin(joined[name])].groupby("format", sort=False)
            if len(own) == len(joined[name])
        ]
        found["weight_error"] = pd.concat([errors, pd.DataFrame(made)])
    return found


def _moments(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Return the row of one joined weight in the table "tensors"."""

    def values(statistic: str) -> NDArray[np.float64]:
        return rows[statistic].to_numpy(dtype=np.float64) if statistic in rows else np.full(len(rows), np.nan)

    count, means, variances = values("count"), values("mean"), values("std") ** 2
    share = count / count.sum()
    mean = float((share * means).sum())
    away = means - mean
    third = values("skewness") * variances**1.5
    fourth = (values("kurtosis_excess") + 3) * variances**2
    variance = float((share * (variances + away**2)).sum())
    third_all = float((share * (third + 3 * away * variances + away**3)).sum())
    fourth_all = float((share * (fourth + 4 * away * third + 6 * away**2 * variances + away**4)).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "tensor": name,
            "layer": rows["layer"].iloc[0] if "layer" in rows else None,
            "count": count.sum(),
            "mean": mean,
            "std": np.sqrt(variance),
            "variance": variance,
            "skewness": third_all / np.float64(variance) ** 1.5,
            "kurtosis_excess": fourth_all / np.float64(variance) ** 2 - 3,
            "absmax": values("absmax").max(),
            "zero_share": (share * values("zero_share")).sum(),
            "frobenius_norm": np.sqrt((values("frobenius_norm") ** 2).sum()),
        }


def _error(rows: pd.DataFrame, norms: pd.Series) -> dict[str, float]:
    """Return the errors of one joined weight in one format: of its parts, each quantized by itself."""
    norm = norms.loc[rows["tensor"]].to_numpy(dtype=np.float64)
    error = float(np.sqrt(((rows["relative_error"].to_numpy(dtype=np.float64) * norm) ** 2).sum()))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.float64(error) / np.sqrt((norm**2).sum())
        return {
            "relative_error": float(relative),
            "sqnr_db": float(-20 * np.log10(relative)),
            "max_error": float(rows["max_error"].max()),
        }
