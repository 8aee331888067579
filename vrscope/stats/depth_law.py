"""How the spread of each role's weights changes with depth, against layer index rescaling (LIR).

In: the table "tensors". Out: the table "depth_law".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vrscope.arch.roles import BIAS, FIXED, NORM
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_FEWEST_LAYERS = 3

DEPTH_LAW_COLUMNS: tuple[Column, ...] = (
    Column("role", "", "Name of the tensors without layer and expert numbers."),
    Column("layers", "layers", "Number of layers the fit rests on."),
    Column("exponent_p", "", "p in std = sigma_1 * layer^-p, layers from 1: 0.5 is layer index rescaling, 0 is flat."),
    Column("exponent_sem", "", "Standard error of p from the scatter around the fit."),
    Column("sigma_1", "", "Standard deviation that the fit gives the first layer."),
    Column("r_squared", "", "Share of the variance of log std that the fit explains."),
)


def fit_depth_law(tensors: pd.DataFrame) -> pd.DataFrame:
    """Return the fitted law `std = sigma_1 * layer^-p` of every role with at least 3 layers, in order of appearance.

    Least squares of log(std) on log(layer), layers counted from 1 (LIR: arXiv 2503.17500, `sigma_l = sigma / sqrt(l)`).
    Several tensors of a role in one layer, such as experts, count once, by the mean of their log(std). Norms, biases,
    fixed tensors and tensors without a positive std are left out.
    """
    import pandas as pd

    used = tensors[~tensors["kind"].isin([NORM, BIAS, FIXED]) & tensors["layer"].notna() & (tensors["std"] > 0)]
    rows: list[dict[str, object]] = []
    for role, group in used.groupby("role", sort=False):
        layers = group["layer"].to_numpy(dtype=np.float64)
        depths, place = np.unique(layers, return_inverse=True)
        if depths.size < _FEWEST_LAYERS:
            continue
        stds = np.log(group["std"].to_numpy(dtype=np.float64))
        rows.append({"role": role, **_fit(np.log(depths + 1), np.bincount(place, stds) / np.bincount(place))})
    return pd.DataFrame(rows, columns=[column.name for column in DEPTH_LAW_COLUMNS])


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, float]:
    """Return the figures of a straight line fitted to at least three points by least squares."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    residual = dy - slope * dx
    total = float(dy @ dy)
    return {
        "layers": x.size,
        "exponent_p": -slope,
        "exponent_sem": math.sqrt(float(residual @ residual) / (x.size - 2) / float(dx @ dx)),
        "sigma_1": math.exp(float(y.mean()) - slope * float(x.mean())),
        "r_squared": 1.0 - float(residual @ residual) / total if total > 0 else math.nan,
    }
