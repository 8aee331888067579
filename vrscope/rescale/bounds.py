"""How far an approximate scale can move a norm's output, estimated from the weights alone.

A norm divides by `sqrt(m + eps)`, m the mean square of its input (of a LayerNorm: its variance). With the input times
s it divides by as much as with `eps / s^2`, so its output changes by at most `eps/2 |1/(s^2 m) - 1/m|` of itself. For
s >= 1 that stays below `eps / 2m`: less than what eps does to the model anyway, which is why growing is the default.
m depends on the text; what stands here takes channels for independent and of mean zero. Then a table of vectors gives
its own mean square, and a matrix the mean of its squared rows times the mean square of its inputs: that of the gain
(and bias) of the norm that feeds it, else 1. Of a residual stream it takes the part that is there at the first norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.binding import Binding
from vrscope.arch.roles import BIAS, EMBED, NORM
from vrscope.arch.spaces import Limit, Space, Term
from vrscope.rescale.plan import POW2, RescalePlan
from vrscope.rescale.profile import Profile
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

BOUND_COLUMNS = (
    Column("space", "", "Path of the layer, then the vector of activations that is scaled."),
    Column("rule", "", "absorb (before one norm) or residual (a stream that norms read)."),
    Column("layer", "", "Layer number from 0; empty outside the layers."),
    Column("size", "scales", "Number of free scales: one per norm, or per head where heads have norms."),
    Column("changed", "scales", "Scales that the plan sets to something other than 1."),
    Column("exponent_min", "log2", "Smallest exponent."),
    Column("exponent_max", "log2", "Largest exponent."),
    Column("eps", "", "The largest eps of the norms that undo the scale."),
    Column("mean_square", "", "Smallest estimated mean square m of such a norm's input, before the plan."),
    Column("bound", "relative", "Largest eps/2 |1/(s^2 m) - 1/m|: by how much of itself a norm's output may change."),
)


def mean_squares(space: Space, binding: Binding, profile: Profile) -> NDArray[np.float64]:
    """Return the estimated mean square of the norms' input for every scale of an approximate space, `(size,)`."""
    assert space.limit is not None
    kinds: dict[str, list[NDArray[np.float64]]] = {}
    for term in space.terms:
        if term.power > 0:
            kind = binding.roles[term.tensor].kind
            kinds.setdefault(kind, []).append(
                _mean_square(term, space, profile, matrix=kind not in {EMBED, NORM, BIAS})
            )
    for kind in (
        EMBED,
        NORM,
    ):  # what a stream holds before anything is added; of several the largest, as some are copies
        if kind in kinds:
            return np.max(kinds[kind], axis=0)  # type: ignore[no-any-return]
    return np.sum([part for parts in kinds.values() for part in parts], axis=0)  # type: ignore[no-any-return]


def _mean_square(term: Term, space: Space, profile: Profile, *, matrix: bool) -> NDArray[np.float64]:
    """Return the mean over a scale's channels of the squared element, or of the squared row of a matrix."""
    part, index = profile.of(term), term.index.reshape(-1)
    used = index >= 0
    total, count = np.zeros(space.size), np.zeros(space.size)
    np.add.at(total, index[used], part.square.reshape(-1)[used])
    np.add.at(count, index[used], 1 if matrix else part.count)
    assert space.limit is not None
    mean: NDArray[np.float64] = total / np.maximum(count, 1)
    return mean * _input(term.tensor, space.limit, profile) if matrix else mean


def _input(tensor: str, limit: Limit, profile: Profile) -> float:
    """Return the mean square of what a matrix reads: gain^2 + bias^2 of the norm before it, or 1."""
    value = 0.0
    for name in limit.inputs.get(tensor, ()):
        sums, count = next(iter(profile.slices[name].values())), profile.infos[name].numel
        shift = 1.0 if name in limit.one_plus else 0.0
        value += float(sums.square.sum() + 2 * shift * sums.total.sum()) / count + shift
    return value if tensor in limit.inputs else 1.0


def bound(space: Space, exponents: NDArray[np.float64], squares: NDArray[np.float64]) -> float:
    """Return the largest relative change of a norm's output under the scales `2**exponents` of an approximate space."""
    assert space.limit is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        shrunk = np.exp2(-2.0 * space.limit.power * exponents)
        change = np.where(exponents == 0, 0.0, space.limit.eps / 2 * np.abs(shrunk - 1) / squares)
    return float(np.max(change, initial=0.0))


def describe_bounds(binding: Binding, plan: RescalePlan, estimated: Mapping[str, NDArray[np.float64]]) -> pd.DataFrame:
    """Return the table "approximate": every approximate space of a plan with its bound; no rows for an exact plan.

    `estimated` holds what `mean_squares` returns, by space.
    """
    import pandas as pd

    rows = []
    for space in binding.spaces:
        values = plan.spaces.get(space.name)
        if space.limit is None or values is None or not values.size:
            continue
        exponents = values.astype(np.float64) if plan.scales == POW2 else np.log2(values)
        squares = estimated[space.name]
        changed = int(np.count_nonzero(exponents))
        ends = (float(exponents.min()), float(exponents.max()))
        measured = (space.limit.eps, float(squares.min()), bound(space, exponents, squares))
        rows.append((space.name, space.rule, space.layer, space.size, changed, *ends, *measured))
    frame = pd.DataFrame(rows, columns=[column.name for column in BOUND_COLUMNS])
    return frame.astype({"layer": "Int64"})
