"""Which cheap statistics of a tensor foretell the damage that quantizing it does: rank correlations over all tensors.

Tables of statistics are joined by tensor name. Tensors of one role resemble each other, so that every correlation is
given twice: over all tensors, and within roles, where what roles have in common cannot pass for foresight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

LEAST = 4  # tensors below which no interval exists
STRONG = 0.5
CONFIDENCE = 0.95
RISING, FALLING = "more", "less"
CORRELATION_COLUMNS: tuple[Column, ...] = (
    Column("statistic", "", "Column of a table of statistics; of errors, with the format in brackets."),
    Column("source", "", "The table."),
    Column("n", "tensors", "Tensors that have both the statistic and a damage."),
    Column("rho", "", "Spearman's rank correlation of the statistic with the damage of quantizing the tensor alone."),
    Column("rho_low", "", "Lower end of the 95 % interval (Fisher's z, standard error of Bonett and Wright 2000)."),
    Column("rho_high", "", "Upper end of that interval."),
    Column("p_value", "", "Two-sided, of no correlation (t distribution)."),
    Column("p_holm", "", "The same after Holm's correction for all statistics in this table."),
    Column("rho_within_role", "", "Rank correlation after the mean rank of each role is taken off both."),
    Column("expected", "", "What folklore expects of a larger value: more or less damage; empty if nothing."),
    Column("same_ranking", "", "Other statistics that rank the tensors in the same order, or exactly reversed."),
    Column("outcome", "", "predicts (|rho| >= 0.5), weak, none (interval holds 0), or wrong way."),
)
# A larger value is commonly taken for a sign of more damage, or of less; the depth and the mean for neither.
_EXPECTED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "std", "kurtosis_excess", "absmax", "outlier_share_4sigma", "outlier_share_6sigma", "row_absmax_spread",
            "column_absmax_spread", "frobenius_norm", "tvr_ratio", "relative_error", "max_error", "error_norm",
            "top_singular_value", "count",
        ),
        RISING,
    ),
    **dict.fromkeys(("sqnr_db", "stable_rank"), FALLING),
}  # fmt: skip
_NO_STATISTICS = frozenset(
    {"tensor", "role", "kind", "dtype", "shape", "format", "checkpoint", "nan_count", "inf_count", "tokens", "channels"}
)


def statistics_of(tables: Mapping[str, pd.DataFrame]) -> dict[tuple[str, str], dict[str, float]]:
    """Return every numeric column of the tables "tensors", "weight_error" and "activations" that are there.

    Returns
    -------
    dict
        `(table, statistic)` to a value per tensor name. Statistics of activations are named "input ...". Added are the
        norm of the quantization error and, with activations, its product with their standard deviation, which is the
        norm of the output error if inputs have no preferred direction.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for table in ("tensors", "activations"):
        frame = tables.get(table)
        if frame is not None and "tensor" in frame.columns:
            for name, values in _numeric(frame):
                if name == "layer" and table != "tensors":
                    continue
                found[table, name if table == "tensors" else f"input {name}"] = {
                    str(k): float(v) for k, v in values.groupby(frame["tensor"]).max().items()
                }
    errors = tables.get("weight_error")
    if errors is not None:
        for scheme, own in errors.groupby("format", sort=False):
            for name, values in _numeric(own):
                if name != "layer":
                    found["weight_error", f"{name}[{scheme}]"] = dict(zip(own["tensor"], values, strict=True))
            norm = _product(
                found.get(("weight_error", f"relative_error[{scheme}]")), found.get(("tensors", "frobenius_norm"))
            )
            output = _product(norm, found.get(("activations", "input std")))
            found |= {("weight_error", f"error_norm[{scheme}]"): norm} if norm else {}
            found |= {("weight_error", f"error_norm[{scheme}] x input std"): output} if output else {}
    return found


def _product(first: dict[str, float] | None, second: dict[str, float] | None) -> dict[str, float]:
    """Return the product of two statistics, for tensors that have both; nothing if one is missing."""
    if not first or not second:
        return {}
    return {tensor: value * second[tensor] for tensor, value in first.items() if tensor in second}


def correlate(damage: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the table "correlation": one row per statistic, the strongest first, columns `CORRELATION_COLUMNS`.

    Statistics that are constant, or that fewer than four tensors have, are left out. Of several that rank all tensors
    alike, such as a std and its ratio to a target, the first has a row that names the others.

    Parameters
    ----------
    damage
        Columns "tensor", "role", and "damage", which may be KL or relative error.
    tables
        As for `statistics_of`.

    Notes
    -----
    Interval: tanh(artanh rho -+ 1.96 sqrt((1 + rho^2 / 2) / (n - 3))), Bonett and Wright, Psychometrika 65 (2000). It
    treats tensors as independent.
    """
    import pandas as pd
    from scipy import stats

    names, roles = list(damage["tensor"]), np.asarray(damage["role"], dtype=object)
    damages = damage["damage"].to_numpy(dtype=np.float64)
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (source, name), values in statistics_of(tables).items():
        x = np.array([values.get(tensor, math.nan) for tensor in names], dtype=np.float64)
        both = ~np.isnan(x) & np.isfinite(damages)
        x, y = x[both], damages[both]
        if len(x) < LEAST or np.ptp(stats.rankdata(x)) == 0 or np.ptp(y) == 0:
            continue
        ranks = stats.rankdata(x)
        twin = seen.get((*both, *ranks)) or seen.get((*both, *(len(x) + 1 - ranks)))
        if twin is not None:
            twin["same_ranking"] = f"{twin['same_ranking']}, {name}".removeprefix(", ")
            continue
        result = stats.spearmanr(x, y)
        rho = float(result.statistic)
        low, high = interval(rho, len(x))
        rows.append(
            {
                "statistic": name, "source": source, "n": len(x), "rho": rho, "rho_low": low, "rho_high": high,
                "p_value": float(result.pvalue), "rho_within_role": within(x, y, roles[both]),
                "expected": _expected(source, name), "same_ranking": "",
            }
        )  # fmt: skip
        seen[(*both, *ranks)] = rows[-1]
    columns = [column.name for column in CORRELATION_COLUMNS]
    if not rows:
        return pd.DataFrame(columns=columns)
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p_value"].to_numpy(dtype=np.float64))
    frame["outcome"] = [_outcome(row) for row in rows]
    order = np.argsort(-frame["rho"].abs().to_numpy(), kind="stable")
    return frame.iloc[order].reset_index(drop=True)[columns]


def interval(rho: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a rank correlation over n pairs; the whole range for n < 4."""
    from scipy import stats

    if n < LEAST:
        return -1.0, 1.0
    if abs(rho) >= 1:
        return rho, rho
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    middle = math.atanh(rho)
    return math.tanh(middle - half), math.tanh(middle + half)


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p-values corrected for their number (Holm 1979): family-wise, without assumptions on dependence."""
    order = np.argsort(p_values)
    steps = np.arange(len(p_values), 0, -1) * p_values[order]
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def within(x: NDArray[np.float64], y: NDArray[np.float64], roles: NDArray[Any]) -> float:
    """Return the correlation of ranks from which each role's mean rank was taken; NaN if nothing is left of one."""
    from scipy import stats

    sides = []
    for ranks in (stats.rankdata(x), stats.rankdata(y)):
        for role in set(roles.tolist()):
            ranks[roles == role] -= ranks[roles == role].mean()
        sides.append(ranks)
    scale = math.sqrt(float((sides[0] ** 2).sum() * (sides[1] ** 2).sum()))
    return float((sides[0] * sides[1]).sum()) / scale if scale > 1e-9 else math.nan


def _expected(source: str, name: str) -> str:
    return RISING if source == "activations" else _EXPECTED.get(name.partition("[")[0], "")


def _outcome(row: Mapping[str, Any]) -> str:
    if row["rho_low"] <= 0 <= row["rho_high"]:
        return "none"
    if row["expected"] and (row["rho"] > 0) != (row["expected"] == RISING):
        return "wrong way"
    return "predicts" if abs(row["rho"]) >= STRONG else "weak"


def _numeric(frame: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Yield the columns of numbers, as float64 with NaN for what is missing."""
    import pandas as pd

    for name in frame.columns:
        if name in _NO_STATISTICS or pd.api.types.is_bool_dtype(frame[name]):
            continue
        # A column read back from JSON may hold None among numbers.
        values = pd.to_numeric(frame[name].astype("object"), errors="coerce").astype("float64")
        if values.notna().any():
            yield str(name), values
