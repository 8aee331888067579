"""From measured sensitivities and a budget to a choice of formats, and what that choice costs, foreseen and measured.

Reads saved results alone; only the check of a choice runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vrscope.errors import PlanError
from vrscope.fragility import budget
from vrscope.fragility.measure import additive
from vrscope.fragility.targets import FULL, Choice
from vrscope.quant.formats import Format, ScaleScope, get_format
from vrscope.tables import Column, Report

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

FULL_BITS = 16.0
RECIPE_COLUMNS: tuple[Column, ...] = (
    Column("tensor", "", "Name of the weight."),
    Column("module", "", "Name of its module in the running transformers model."),
    Column("role", "", "Name without layer and expert numbers."),
    Column("layer", "", "Layer number from 0."),
    Column("count", "elements", "Number of weights."),
    Column("format", "", "What the recipe gives it."),
    Column("kept", "", "Whether that is the higher precision."),
    Column("unit", "", "What its damage was measured for."),
    Column("damage", "", "KL in nats (encoders: relative error) of its unit alone in the lower precision."),
)
SUMMARY_COLUMNS: tuple[Column, ...] = (
    Column("what", "", "The model with all weights in the lower precision, by the recipe, and all in the higher."),
    Column("kept", "", "Weights in the higher precision."),
    Column("bits_per_weight", "bits", "Mean over all linear weights but the head, scales included."),
    Column("model_bytes", "bytes", "All tensors: the linear ones in their formats, the others as stored."),
    Column("predicted", "", "Sum of single damages: KL in nats (encoders: root of the sum of squared errors)."),
    Column("measured", "", "Damage of that very model on the text: mean KL in nats (encoders: relative error)."),
    Column("measured_sem", "", "Standard error of that mean, tokens taken as independent."),
    Column("change", "", "Mean difference to the first row, paired over tokens."),
    Column("change_sem", "", "Standard error of that difference."),
)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Saved sensitivities: the tables, and what their provenance says.

    Attributes
    ----------
    units, linears
        Tables "sensitivity" and "linears".
    facts
        The provenance.
    scheme
        The format measured.
    measure
        "kl" or "relative_error".
    """

    units: pd.DataFrame
    linears: pd.DataFrame
    facts: Mapping[str, Any]
    scheme: Format
    measure: str

    def damages(self) -> dict[str, float]:
        """Return the additive damage of each unit."""
        return dict(zip(self.units["unit"], additive(self.units, self.measure).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Budget:
    """What a recipe may cost: mean bits per linear weight, bytes of the whole model, or damage."""

    kind: str
    value: float

    @classmethod
    def of(
        cls, bits: float | None = None, size_bytes: float | None = None, size_gb: float | None = None,
        kl: float | None = None,
    ) -> Budget:  # fmt: skip
        """Return the one budget that is given.

        Raises
        ------
        PlanError
            If none is given, or several, or not a positive number.
        """
        given = {"bits": bits, "bytes": size_bytes, "gb": size_gb, "kl": kl}
        stated = [(kind, value) for kind, value in given.items() if value is not None]
        if len(stated) != 1:
            message = (
                f"budget: expected one of bits, bytes, gb and kl, found {len(stated)}. Give one, such as "
                "--budget-bits 5."
            )
            raise PlanError(message)
        kind, value = stated[0]
        if not (math.isfinite(value) and value > 0):
            message = f"budget: expected a number above 0, found {value}. Give another --budget-{kind}."
            raise PlanError(message)
        return cls("bytes", value * 1e9) if kind == "gb" else cls(kind, value)


def read_sensitivity(report: Report, name: str) -> Sensitivity:
    """Return the sensitivities of a report.

    Raises
    ------
    PlanError
        If it is not one of `vrscope sensitivity`.
    """
    lacking = [table for table in ("sensitivity", "linears") if table not in report.tables]
    if report.kind != "sensitivity" or lacking:
        message = (
            f"{name}: expected results of `vrscope sensitivity`, found those of `vrscope {report.kind}`. "
            "Give the folder that `vrscope sensitivity -o` wrote."
        )
        raise PlanError(message)
    units = report.tables["sensitivity"]
    measure = "kl" if units["kl"].notna().any() else "relative_error"
    scheme = get_format(str(report.provenance.get("settings", {}).get("format")))
    return Sensitivity(units, report.tables["linears"], report.provenance, scheme, measure)


def pick(found: Sequence[Sensitivity], low: str | None, high: str) -> tuple[Sensitivity, Sensitivity | None]:
    """Return the sensitivities of the lower format, and of the higher one if they were measured.

    Raises
    ------
    PlanError
        If the lower format was not measured, or the results are of several models.
    """
    if len({str(one.facts.get("fingerprint")) for one in found}) > 1:
        names = " and ".join(sorted({str(one.facts.get("model")) for one in found}))
        message = f"results: expected those of one model, found {names}. Give results of the same checkpoint."
        raise PlanError(message)
    by_format = {one.scheme.name: one for one in found}
    chosen = low or min(
        (n for n in by_format if n != high), key=lambda n: by_format[n].scheme.bits_per_weight, default=high
    )
    if chosen not in by_format:
        message = (
            f"low: expected a format whose sensitivities were measured ({', '.join(by_format)}), found {chosen!r}. "
            f"Run `vrscope sensitivity --format {chosen}` first."
        )
        raise PlanError(message)
    better = by_format.get(high)
    lower = by_format[chosen]
    if bits_of(high) <= lower.scheme.bits_per_weight:
        message = (
            f"high: expected a format of more than the {lower.scheme.bits_per_weight:.3g} bits of {chosen}, found "
            f"{high!r}. Choose another with --high."
        )
        raise PlanError(message)
    if better is not None and set(better.units["unit"]) != set(lower.units["unit"]):
        message = f"results: expected the same units for {chosen} and {high}, found others. Use one --by for both."
        raise PlanError(message)
    return lower, better


def items_of(low: Sensitivity, high: Sensitivity | None, high_name: str) -> list[budget.Item]:
    """Return what can be kept: one item per unit. An unmeasured higher format is taken to do no damage."""
    damages = low.damages()
    better = high.damages() if high is not None else dict.fromkeys(damages, 0.0)
    items = []
    for unit, own in low.linears.groupby("unit", sort=False):
        count = float(own["count"].sum())
        name = str(unit)
        items.append(
            budget.Item(
                name,
                tuple(own["module"]),
                count * low.scheme.bits_per_weight / 8,
                count * bits_of(high_name) / 8,
                damages[name],
                better[name],
            )
        )
    return items


def choose(items: Sequence[budget.Item], wanted: Budget, low: Sensitivity) -> list[bool]:
    """Return which items are kept in the higher precision.

    Raises
    ------
    PlanError
        If the budget is impossible; the message says the least that is possible.
    """
    count = float(low.linears["count"].sum())
    other = float(low.facts.get("other_bytes", 0.0))
    least = sum(item.low_bytes for item in items)
    if wanted.kind == "kl":
        if low.measure != "kl":
            message = (
                "budget: expected a size, because these are results of an encoder, which has no KL. "
                "Give --budget-bits or --budget-bytes."
            )
            raise PlanError(message)
        return budget.within_damage(items, wanted.value)
    room = wanted.value * count / 8 if wanted.kind == "bits" else wanted.value - other
    if room < least * (1 - 1e-12):
        possible = f"{least * 8 / count:.4g} bits" if wanted.kind == "bits" else f"{least + other:,.0f} bytes"
        what = "per linear weight" if wanted.kind == "bits" else "for the whole model"
        message = (
            f"budget: expected at least {possible} {what}, the size with every linear weight in {low.scheme.name}, "
            f"found {wanted.value:,.6g}. Allow more."
        )
        raise PlanError(message)
    return budget.within_bytes(items, room)


def tables_of(
    items: Sequence[budget.Item], kept: Sequence[bool], low: Sensitivity, high_name: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables "recipe" and "recipe_summary", the latter without measurements."""
    import pandas as pd

    chosen = {module for item, keep in zip(items, kept, strict=True) if keep for module in item.modules}
    frame = low.linears.copy()
    frame["kept"] = frame["module"].isin(chosen)
    frame["format"] = np.where(frame["kept"], high_name, low.scheme.name)
    frame["damage"] = frame["unit"].map(dict(zip(low.units["unit"], low.units[low.measure], strict=True)))
    frame = frame.sort_values("damage", ascending=False, kind="stable", ignore_index=True)
    count, other = float(frame["count"].sum()), float(low.facts.get("other_bytes", 0.0))
    rows = []
    for what, choice in (
        (f"all {low.scheme.name}", [False] * len(items)),
        ("recipe", list(kept)),
        (f"all {high_name}", [True] * len(items)),
    ):
        pairs = list(zip(items, choice, strict=True))
        size = sum(item.high_bytes if keep else item.low_bytes for item, keep in pairs)
        damage = sum(item.high_damage if keep else item.low_damage for item, keep in pairs)
        rows.append(
            {
                "what": what,
                "kept": sum(len(item.modules) for item, keep in pairs if keep),
                "bits_per_weight": 8 * size / count,
                "model_bytes": size + other,
                "predicted": damage if low.measure == "kl" else math.sqrt(damage),
            }
        )
    names = [column.name for column in SUMMARY_COLUMNS]
    summary = pd.DataFrame(rows, columns=names).astype(dict.fromkeys(names[4:], float))
    return frame[[column.name for column in RECIPE_COLUMNS]], summary


def choice_of(table: pd.DataFrame, low: Sensitivity, high_name: str) -> Choice:
    """Return the choice that the targets write down."""
    which = dict(zip(table["module"], table["kept"], strict=True))
    linears = low.linears
    size = low.scheme.scope.size if low.scheme.scope.kind == "group" else None
    ragged = tuple(linears.loc[linears["columns"] % size != 0, "module"]) if size else ()
    return Choice(
        low.scheme.name,
        high_name,
        {module: "high" if which[module] else "low" for module in linears["module"]},
        ragged,
        tuple(low.facts.get("kept_modules", ())),
        str(low.facts.get("model_type", "")),
    )


def bits_of(name: str) -> float:
    """Return the bits per weight of a format, or of `FULL`."""
    return FULL_BITS if name == FULL else get_format(name).bits_per_weight


def format_of(name: str) -> Format:
    """Return the format of that name; `FULL` rounds weights to bfloat16."""
    if name != FULL:
        return get_format(name)
    scope = ScaleScope("tensor")
    return Format(FULL, "Not quantized.", FULL_BITS, "simulated", scope, activations=False, roundtrip=_to_bfloat16)


def _to_bfloat16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()
