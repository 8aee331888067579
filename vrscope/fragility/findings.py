"""What sensitivities, correlations and recipes say, in plain words; made from the tables alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Finding = Mapping[str, str]
_FEW = 3


def findings(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]) -> list[Finding]:
    """Return the findings of `vrscope sensitivity` and `vrscope recipe`, as `vrscope.verdict` does."""
    return [
        *_sensitivity(tables, provenance),
        *_additivity(tables),
        *_correlation(tables),
        *_recipe(tables, provenance),
    ]


def _say(level: str, text: str) -> Finding:
    return {"level": level, "text": text}


def _has(tables: Mapping[str, pd.DataFrame], name: str) -> bool:
    return name in tables and len(tables[name]) > 0


def _sensitivity(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]) -> list[Finding]:
    if not _has(tables, "sensitivity"):
        return []
    frame = tables["sensitivity"]
    causal = bool(frame["kl"].notna().any())
    measure, name, unit = ("kl", "KL", " nats") if causal else ("relative_error", "relative error", "")
    top, error = frame.iloc[0], f"{measure}_sem"
    settings = provenance.get("settings", {})
    scheme = settings.get("format") or settings.get("low") or "the format"
    half = int((frame["cumulative_share"] < 0.5).sum()) + 1
    size = float(frame["cumulative_size_share"].iloc[min(half, len(frame)) - 1])
    text = (
        f"Most fragile in {scheme}: {top['unit']}, alone {name} {top[measure]:.3g} ± {top[error]:.2g}{unit}, "
        f"{100 * top['share']:.0f} % of the sum over {len(frame)} units. Half of the sum comes from {half} of them, "
        f"which hold {100 * size:.1f} % of the bytes."
    )
    return [_say("note", text)]


def _additivity(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    if not _has(tables, "additivity"):
        return []
    frame = tables["additivity"]
    causal = bool(frame["kl"].notna().any())
    measure, unit = ("kl", " nats") if causal else ("relative_error", "")
    joint, alone, error = frame.iloc[0], frame.iloc[1], f"{measure}_sem"
    if not alone[measure] > 0:
        return []
    how = "Single damages" if causal else "Single errors, squared,"
    text = (
        f"{how} add up to {alone[measure]:.3g} ± {alone[error]:.2g}{unit}; all units at once lose "
        f"{joint[measure]:.3g} ± {joint[error]:.2g}{unit}, {joint[measure] / alone[measure]:.2f} times that. "
        "A recipe assumes that they add up."
    )
    return [_say("note", text)]


def _correlation(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    if not _has(tables, "correlation"):
        return []
    frame = tables["correlation"]
    found = []
    good = frame[(frame["outcome"] == "predicts") & (frame["p_holm"] < 0.05)]
    if len(good):
        text = "Cheap numbers that foretell fragility on this model (Spearman, 95 % interval): "
        found.append(_say("good", f"{text}{_listed(good)}."))
    else:
        best = frame.iloc[[0]]
        text = f"No cheap number foretells fragility on this model; the strongest is {_listed(best)}."
        found.append(_say("note", text))
    wrong = frame[(frame["outcome"] == "wrong way") & (frame["p_holm"] < 0.05)]
    if len(wrong):
        found.append(_say("bad", f"Numbers that point the wrong way on this model: {_listed(wrong)}."))
    none = frame[(frame["outcome"] == "none") & (frame["expected"].fillna("") != "")]
    none = none[~none["statistic"].str.contains("[", regex=False)]
    if len(none):
        names = ", ".join(none["statistic"])
        found.append(_say("note", f"Of the numbers expected to tell, these do not (their interval holds 0): {names}."))
    return found


def _listed(frame: pd.DataFrame) -> str:
    rows = frame.head(_FEW)
    words = []
    for _, row in rows.iterrows():
        inside = row["rho_within_role"]
        own = f"; within roles {inside:+.2f}" if inside == inside else ""
        words.append(f"{row['statistic']} {row['rho']:+.2f} [{row['rho_low']:+.2f}, {row['rho_high']:+.2f}{own}]")
    more = len(frame) - len(rows)
    return ", ".join(words) + (f" and {more} more" if more else "") + f" over {int(rows['n'].min())} tensors"


def _recipe(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]) -> list[Finding]:
    if not _has(tables, "recipe_summary"):
        return []
    low, mixed, _ = (row for _, row in tables["recipe_summary"].iterrows())
    total = len(tables["recipe"])
    text = (
        f"The recipe keeps {int(mixed['kept'])} of {total} weights in higher precision: {mixed['bits_per_weight']:.3g} "
        f"bits per weight instead of {low['bits_per_weight']:.3g}, {mixed['model_bytes'] / 1e6:,.1f} MB instead of "
        f"{low['model_bytes'] / 1e6:,.1f}. Single damages add up to {mixed['predicted']:.3g} instead of "
        f"{low['predicted']:.3g}; that they add up is an assumption."
    )
    found = [_say("note", text)]
    if mixed["measured"] == mixed["measured"]:
        better = mixed["change"] < -2 * mixed["change_sem"]
        text = (
            f"Measured: {mixed['measured']:.4g} ± {mixed['measured_sem']:.2g} by the recipe, {low['measured']:.4g} ± "
            f"{low['measured_sem']:.2g} without; difference {mixed['change']:.4g} ± {mixed['change_sem']:.2g}"
            + ("." if better else ", no gain beyond the noise of this sample.")
        )
        found.append(_say("good" if better else "note", text))
    notes = provenance.get("notes")
    return found + [_say("note", str(note)) for note in (notes if isinstance(notes, list | tuple) else ())]
