"""The findings in plain words, made from the tables alone. Every sentence carries the numbers it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vrscope.fragility.findings import findings as fragility
from vrscope.report.removed import removed

if TYPE_CHECKING:
    import pandas as pd

Finding = Mapping[str, str]
GOOD, NOTE, BAD = "good", "note", "bad"


def verdict(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Return the findings, most important first, as dictionaries with `level` ("good", "note", "bad") and `text`."""
    findings: list[Finding] = _gain(tables, provenance)
    findings += _function(tables, provenance)
    findings += _damage(tables)
    findings += _sources(tables)
    findings += _reach(tables)
    findings += _health(tables)
    findings += _activations(tables)
    findings += fragility(tables, provenance)
    return tuple(findings)


def _say(level: str, text: str) -> Finding:
    return {"level": level, "text": text}


def _function(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]) -> list[Finding]:
    equivalent = provenance.get("equivalent")
    if equivalent is None:
        return []
    proof, spaces = tables.get("proof"), tables.get("spaces")
    findings = []
    if spaces is not None and len(spaces) and not spaces["changed"].any() and equivalent != "not equivalent":
        text = "The plan changes no scale"
        if provenance.get("settings", {}).get("method") in {"wisca", "tvr"}:
            text += ": nothing it looks at is far enough from its goal for a factor of two to bring it nearer"
        findings.append(_say(NOTE, f"{text}."))
    left_out = provenance.get("settings", {}).get("left_out")
    if left_out:
        text = "scales stay at 1, because theirs would push weights out of the normal range of the stored type."
        findings.append(_say(NOTE, f"{left_out:,} {text}"))
    if proof is None and equivalent == "bit-equal":
        return [
            _say(GOOD, "Applied, this plan leaves the model the same function, bit for bit, in float32 and bfloat16."),
            *findings,
        ]
    if proof is None and equivalent == "not equivalent":
        text = (
            "NOT EQUIVALENT: raw TVR made one of these checkpoints, and it computes another function than its source."
        )
        return [_say(BAD, text)]
    if proof is None and equivalent == "equal up to eps":
        return [
            _say(NOTE, f"Applied, this plan leaves the model the same function up to eps. {_bound(tables)}"),
            *findings,
        ]
    details = "; ".join(proof["detail"]) if proof is not None and len(proof) else ""
    if equivalent == "not equivalent":
        return [_say(BAD, f"NOT EQUIVALENT: the rescaled checkpoint is another function than the original. {details}")]
    if equivalent == "bit-equal":
        text = "The rescaled checkpoint is the same function, bit for bit, in float32 and bfloat16 arithmetic"
    elif equivalent == "equal up to eps":
        text = f"The rescaled checkpoint is the same function up to the eps of its norms: {details}. {_bound(tables)}"
        return [_say(NOTE, text.strip()), *findings]
    else:
        text = "The rescaled checkpoint is the same function up to one rounding per weight (free scales)"
    return [_say(GOOD, f"{text}: {details}." if details else f"{text}."), *findings]


def _bound(tables: Mapping[str, pd.DataFrame]) -> str:
    frame = tables.get("approximate")
    if frame is None or not frame["changed"].any():
        return ""
    worst = frame.nlargest(1, "bound").iloc[0]
    return (
        f"Inputs of norms are scaled ({int((frame['changed'] > 0).sum())} of {len(frame)} such spaces); as estimated "
        f"from the weights, that changes a norm's output by at most {worst['bound']:.2g} of itself ({worst['space']})."
    )


def _damage(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    damage = tables.get("damage")
    if damage is None or damage.empty:
        return []
    causal = damage["kl"].notna().any()
    value, error, name = ("kl", "kl_sem", "mean KL") if causal else ("relative_error", "relative_error_sem", "error")
    unit = " nats" if causal else ""
    names = list(dict.fromkeys(damage["checkpoint"]))
    rows = {(row["checkpoint"], row["format"]): row for _, row in damage.iterrows()}
    findings = []
    for scheme in dict.fromkeys(damage["format"]):
        first = rows.get((names[0], scheme))
        if scheme == "none" or first is None:
            continue
        start = f"{scheme}: {name} {first[value]:.4g} ± {first[error]:.2g}{unit}"
        if causal:
            start += f", perplexity times {first['perplexity_ratio']:.4f} ± {first['perplexity_ratio_sem']:.2g}"
        others = [rows[label, scheme] for label in names[1:] if (label, scheme) in rows]
        if not others:
            findings.append(_say(NOTE, f"{start}."))
        for other in others:
            findings.append(_change(f"{start} in {names[0]}", first, other, (value, error)))
    return findings


def _change(start: str, first: Any, other: Any, columns: tuple[str, str]) -> Finding:
    value, error = columns
    now = f"{other[value]:.4g} ± {other[error]:.2g} in {other['checkpoint']}"
    if other[value] == first[value]:
        return _say(NOTE, f"{start}, exactly the same in {other['checkpoint']}.")
    change = (other[value] / first[value] - 1) * 100 if first[value] else math.inf
    if not math.isfinite(change) or abs(other["change"]) < 2 * other["change_sem"]:
        return _say(NOTE, f"{start}, {now}: no difference beyond the noise of this sample.")
    word = "less" if change < 0 else "more"
    return _say(GOOD if change < 0 else BAD, f"{start}, {now}: {abs(change):.0f} % {word}.")


def _gain(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]) -> list[Finding]:
    """Say by what share the damage of each format fell that the scales were chosen for."""
    gains, damage = tables.get("gains"), tables.get("damage")
    if gains is None or gains.empty or provenance.get("equivalent") == "not equivalent":
        return []
    if damage is None or damage["checkpoint"].nunique() < 2:
        sums = gains.groupby("format", sort=False)[["damage_before", "damage_after"]].sum()
        shares = [
            f"{100 * (1 - row['damage_after'] / row['damage_before']):.0f} % of the damage of {name}"
            for name, row in sums.iterrows()
            if row["damage_before"] > 0
        ]
        text = (
            f"These scales are predicted to remove {_listed(shares)}, on held-out calibration text; not yet measured."
        )
        return [_say(NOTE, text)] if shares else []
    measure, name = ("kl", "mean KL") if damage["kl"].notna().any() else ("relative_error", "relative error")
    first, other = list(dict.fromkeys(damage["checkpoint"]))[:2]
    rows: dict[tuple[str, str], Mapping[Any, Any]]
    rows = {(row["checkpoint"], row["format"]): row.to_dict() for _, row in damage.iterrows()}
    words: list[str] = []
    levels, last = set(), ""
    for scheme in dict.fromkeys(gains["format"]):
        pair = [rows.get((key, scheme), {}) for key in (first, other)]
        found = removed(pair[0], pair[1], measure)
        if found is None:
            continue
        levels.add(NOTE if not found.clear or found.share == 0 else GOOD if found.share > 0 else BAD)
        verb = "fell by" if found.share > 0 else "rose by" if found.share < 0 else "stayed, by"
        noise = "" if found.clear else " (within noise)"
        words.append(f"{'' if verb == last else f'{verb} '}{found.percent} with {scheme}{noise}")
        last = verb
    if not words:
        return []
    level = next(kind for kind in (BAD, GOOD, NOTE) if kind in levels)
    text = f"Quantization damage {_listed(words)} ({name}, ± one standard error, both on the same tokens)."
    return [_say(level, text)]


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def _sources(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Say which rule earned most of the predicted gain of each format, and how much damage is left."""
    gains = tables.get("gains")
    if gains is None or gains.empty:
        return []
    gains = gains.dropna(subset=["damage_before", "damage_after"])
    findings = []
    for scheme, rows in gains.groupby("format", sort=False):
        before, after = float(rows["damage_before"].sum()), float(rows["damage_after"].sum())
        gained = (rows["damage_before"] - rows["damage_after"]).groupby(rows["rule"]).sum().sort_values(ascending=False)
        if before <= after or not len(gained):
            continue
        won = rows["method"][rows["method"] != "none"].value_counts()
        methods = ", ".join(f"{name} {count}" for name, count in won.items())
        worst = rows.nlargest(1, "damage_after").iloc[0]
        earned, left = 100 * gained.iloc[0] / (before - after), 100 * after / before
        part = 100 * worst["damage_after"] / (after or 1)
        text = (
            f"{scheme}: {earned:.0f} % of the predicted gain comes from {gained.index[0]}; scales from "
            f"{methods or 'no method'} ({len(rows)} spaces). {left:.0f} % of the predicted damage remains, the largest "
            f"part of it in {worst['space']} ({part:.0f} %)."
        )
        findings.append(_say(NOTE, text))
    return findings


def _reach(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    reach = tables.get("reach")
    if reach is None or reach.empty:
        return []
    blind = [str(name) for name in reach.loc[~reach["can_change"].astype(bool), "format"]]
    if not blind:
        return []
    return [
        _say(
            NOTE,
            f"This plan cannot change {', '.join(blind)} at all: its factors are constant over every unit that shares "
            "a scale in these formats, and the format's own scale absorbs them.",
        )
    ]


def _health(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    tensors = tables.get("tensors")
    if tensors is None or tensors.empty:
        return []
    findings = []
    broken = tensors[(tensors["nan_count"].fillna(0) > 0) | (tensors["inf_count"].fillna(0) > 0)]
    if len(broken):
        worst = broken.iloc[0]
        findings.append(
            _say(
                BAD,
                f"{len(broken)} of {len(tensors)} tensors hold NaN or infinite weights, the first of them "
                f"{worst['tensor']} ({int(worst['nan_count'])} NaN, {int(worst['inf_count'])} infinite).",
            )
        )
    matrices = tensors[(tensors["kind"] == "linear") & tensors["kurtosis_excess"].notna()]
    if len(matrices):
        worst = matrices.nlargest(1, "kurtosis_excess").iloc[0]
        findings.append(
            _say(
                NOTE,
                f"Heaviest tails among {len(matrices)} linear weights: {worst['tensor']}, excess kurtosis "
                f"{worst['kurtosis_excess']:.3g} (normal = 0), largest weight {worst['absmax'] / worst['std']:.3g} "
                f"std; median excess kurtosis {matrices['kurtosis_excess'].median():.3g}.",
            )
        )
    law = tables.get("depth_law")
    if law is not None and len(law):
        fitted = law[law["exponent_p"].notna() & law["role"].isin(set(matrices["role"]))]
        if len(fitted):
            ordered = fitted.sort_values("exponent_p")
            low, high = ordered.iloc[0], ordered.iloc[-1]
            findings.append(
                _say(
                    NOTE,
                    "Std against depth, std ~ l^-p (LIR initialises with p = 0.5): p from "
                    f"{low['exponent_p']:.2f} ± {low['exponent_sem']:.2g} ({low['role']}) to "
                    f"{high['exponent_p']:.2f} ± {high['exponent_sem']:.2g} ({high['role']}).",
                )
            )
    return findings


def _activations(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    findings = []
    residual, inputs, experts = (tables.get(name) for name in ("residual", "activations", "experts"))
    if residual is not None and residual["top1_ratio"].notna().any():
        worst = residual.nlargest(1, "top1_ratio").iloc[0]
        massive = int(residual["massive"].astype(bool).sum())
        text = (
            f"Largest hidden state against its median: {worst['top1']:.4g}, which is {worst['top1_ratio']:.4g} times, "
            f"entering layer {worst['layer']}; the peak is at channel {worst['peak_channel']}, position "
            f"{worst['peak_position']} of its window"
        )
        if massive:
            text = f"Massive activations at {massive} of {len(residual)} depths. {text}"
        findings.append(_say(NOTE, f"{text}."))
    if inputs is not None:
        inputs = inputs[inputs["layer"].notna()]  # a pooler sees one token of each window
    if inputs is not None and inputs["channel_spread"].notna().any():
        worst = inputs.nlargest(1, "channel_spread").iloc[0]
        text = (
            f"Most uneven input channels: {worst['tensor']}, whose largest channel maximum is "
            f"{worst['channel_spread']:.3g} times the median one (median over weights "
            f"{inputs['channel_spread'].median():.3g})."
        )
        findings.append(_say(NOTE, text))
    if experts is not None and (experts["tokens"] == 0).any():
        idle = experts[experts["tokens"] == 0].drop_duplicates(["layer", "expert"])
        count = len(experts.drop_duplicates(["layer", "expert"]))
        findings.append(_say(NOTE, f"{len(idle)} of {count} experts saw no token of this text."))
    return findings
