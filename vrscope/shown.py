"""How a column of results looks in a terminal, and the columns of the tables on gains, fragility and recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Shown:
    """A column as it is shown: its name in the table, its heading, its format, and the column of its standard error."""

    name: str
    heading: str
    style: str = ""
    error: str = ""


RECIPE = (
    Shown("what", "model"),
    Shown("kept", "weights kept", ".0f"),
    Shown("bits_per_weight", "bits per weight", ".3g"),
    Shown("model_bytes", "bytes", ",.0f"),
    Shown("predicted", "single damages added", ".4g"),
    Shown("measured", "measured", "#.4g", "measured_sem"),
    Shown("change", "change", "#.3g", "change_sem"),
)
SENSITIVITY = (
    Shown("rank", "rank", ".0f"),
    Shown("unit", "unit"),
    Shown("size_bytes", "bytes", ",.0f"),
    Shown("kl", "KL (nats)", "#.4g", "kl_sem"),
    Shown("relative_error", "relative error", ".4g", "relative_error_sem"),
    Shown("share", "share", ".1%"),
    Shown("cumulative_share", "cumulative", ".1%"),
    Shown("cumulative_size_share", "of the bytes", ".1%"),
)
ADDITIVITY = (
    Shown("what", "what"),
    Shown("kl", "KL (nats)", "#.4g", "kl_sem"),
    Shown("relative_error", "relative error", ".4g", "relative_error_sem"),
)
CORRELATION = (
    Shown("statistic", "statistic"),
    Shown("n", "tensors", ".0f"),
    Shown("rho", "rho", "+.2f"),
    Shown("rho_low", "low", "+.2f"),
    Shown("rho_high", "high", "+.2f"),
    Shown("rho_within_role", "within roles", "+.2f"),
    Shown("p_holm", "p (Holm)", ".2g"),
    Shown("expected", "expected"),
    Shown("outcome", "outcome"),
)
APPROXIMATE = (
    Shown("space", "space"),
    Shown("rule", "rule"),
    Shown("size", "scales", ".0f"),
    Shown("changed", "changed", ".0f"),
    Shown("exponent_min", "lowest k", "g"),
    Shown("exponent_max", "highest k", "g"),
    Shown("eps", "eps", ".3g"),
    Shown("mean_square", "estimated m", ".3g"),
    Shown("bound", "bound", ".2g"),
)
_GAIN = (
    Shown("damage_before", "predicted before", "#.3g"),
    Shown("damage_after", "after", "#.3g"),
    Shown("removed_share", "removed", ".1%"),
)
GAINS = (
    Shown("format", "format"),
    Shown("space", "space"),
    Shown("rule", "rule"),
    Shown("method", "scales from"),
    Shown("stage", "found by"),
    *_GAIN,
    Shown("reason", "why"),
)
GAIN_RULES = (
    Shown("format", "format"),
    Shown("rule", "rule"),
    Shown("space", "spaces", ".0f"),
    Shown("methods", "scales from"),
    *_GAIN,
)


def gains_by_rule(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table "gains" summed over the spaces of one format and rule, and how many each method won."""
    summary = frame.groupby(["format", "rule"], sort=False, as_index=False).agg(
        space=("space", "size"),
        methods=("method", lambda names: ", ".join(f"{name} {count}" for name, count in names.value_counts().items())),
        damage_before=("damage_before", "sum"),
        damage_after=("damage_after", "sum"),
    )
    before = summary["damage_before"]
    return summary.assign(removed_share=1 - summary["damage_after"] / before.where(before > 0))
