"""How a column of results looks in a terminal, and the columns of the tables on fragility and recipes."""

from __future__ import annotations

from dataclasses import dataclass


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
