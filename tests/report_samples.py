"""Synthetic reports that look like real ones: a Llama-like model of 30 layers, its variants, and hostile names."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd

from vrscope.tables import Column, Report
from vrscope.verdict import verdict

LINEARS = {
    "self_attn.q_proj": (576, 576, 0.116, 0.22),
    "self_attn.k_proj": (192, 576, 0.131, 0.2),
    "self_attn.v_proj": (192, 576, 0.074, -0.12),
    "self_attn.o_proj": (576, 576, 0.077, -0.05),
    "mlp.gate_proj": (1536, 576, 0.105, 0.08),
    "mlp.up_proj": (1536, 576, 0.093, 0.05),
    "mlp.down_proj": (576, 1536, 0.088, 0.06),
}
NORMS = {"input_layernorm": 0.45, "post_attention_layernorm": 0.61}
FORMATS = {
    "int8": (0.0041, 0.9912, 44.1),
    "nf4": (0.2540, 0.7421, 20.6),
    "nf4-dq": (0.2583, 0.7402, 20.5),
    "fp4": (0.4630, 0.6648, 18.4),
    "int4-g64": (0.2756, 0.7355, 19.8),
    "int8-row": (0.0027, 0.9931, 38.2),
}
MOVED = {"nf4": 0.94, "nf4-dq": 0.93, "fp4": 0.97, "int4-g64": 0.96}
HOSTILE = "<script>alert(1)</script>\"'&--><img src=x onerror=alert(2)>]]>😀${7*7}{{7*7}}\u202e\u2028$\\frac$\x00\x1b"

MEANINGS = {
    "std": ("", "Population standard deviation of the weights."),
    "kurtosis_excess": ("", "Fourth standardized moment minus 3; a normal distribution has 0."),
    "size_bytes": ("bytes", "Bytes the tensor takes on disk."),
    "outlier_share_6sigma": ("share", "Share of weights further than 6 std from the mean."),
    "tvr_ratio": ("", "Standard deviation over the TVR target."),
    "kl": ("nats", "Mean over tokens of KL(original || this), natural logarithm."),
    "perplexity_ratio": ("factor", "Perplexity over that of the unquantized original."),
    "exponent_p": ("", "p in std ~ layer^-p, layers counted from 1."),
}


def tensor_row(name: str, role: str, layer: int | None, kind: str, shape: tuple[int, ...], std: float) -> dict:
    rng = np.random.default_rng(hash_of(name))
    count = math.prod(shape)
    heavy = float(rng.lognormal(0.2, 1.1)) * (8 if "down" in role and layer == 29 else 1) - 0.4
    absmax = std * (5 + 2.5 * math.log1p(max(heavy, 0)) + rng.random())
    return {
        "tensor": name, "role": role, "layer": layer, "kind": kind, "dtype": "BF16", "shape": "x".join(map(str, shape)),
        "count": count, "size_bytes": 2 * count, "mean": float(rng.normal(0, std / 200)), "std": std,
        "variance": std**2, "skewness": float(rng.normal(0, 0.05)), "kurtosis_excess": heavy, "absmax": absmax,
        "abs_q50": 0.66 * std, "abs_q99": 2.7 * std, "abs_q999": 3.9 * std, "abs_q9999": 5.2 * std,
        "outlier_share_4sigma": 1e-4 * (1 + max(heavy, 0)),
        "outlier_share_6sigma": 0.0 if heavy < 0.3 else 2e-6 * heavy**2,
        "zero_share": 0.0, "nan_count": 0, "inf_count": 0, "row_absmax_spread": float(rng.uniform(1.5, 6)),
        "column_absmax_spread": float(rng.uniform(1.5, 9)), "frobenius_norm": std * math.sqrt(count),
        "tvr_ratio": std / 0.01,
    }  # fmt: skip


def hash_of(text: str) -> int:
    return zlib.crc32(text.encode())


def tensors(layers: int = 30) -> pd.DataFrame:
    rows = [tensor_row("model.embed_tokens.weight", "embed_tokens", None, "embed", (49152, 576), 0.131)]
    rng = np.random.default_rng(5)
    for layer in range(layers):
        for role, (out, into, sigma, p) in LINEARS.items():
            std = sigma * (layer + 1) ** -p * float(rng.lognormal(0, 0.06))
            rows.append(tensor_row(f"model.layers.{layer}.{role}.weight", role, layer, "linear", (out, into), std))
        for role, sigma in NORMS.items():
            std = sigma * (layer + 1) ** -0.3 * float(rng.lognormal(0, 0.1))
            rows.append(tensor_row(f"model.layers.{layer}.{role}.weight", role, layer, "norm", (576,), std))
    rows.append(tensor_row("model.norm.weight", "norm", None, "norm", (576,), 1.9))
    frame = pd.DataFrame(rows)
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def damage(*, after: bool = True, raw: bool = False) -> pd.DataFrame:
    rows = []
    for place, key in enumerate(["original", "rescaled"] if after else ["original"]):
        for name, (kl, top1, _) in {"none": (0.0, 1.0, 0), **FORMATS}.items():
            factor = MOVED.get(name, 1.0) if place else 1.0
            value, ratio = kl * factor, math.exp(kl * factor * 0.9)
            if raw and place:
                value, ratio = 19.7 + kl, 4.1e35
            rows.append({
                "checkpoint": key, "format": name, "tokens": 2048, "windows": 4, "kl": value,
                "kl_sem": 0.02 * value, "kl_p50": 0.4 * value, "kl_p90": 2.3 * value, "kl_p99": 5 * value,
                "kl_max": 20 * value, "top1": top1, "top1_sem": 0.009 if kl else 0.0, "perplexity": 24.1 * ratio,
                "perplexity_sem": 0.9 * ratio, "perplexity_ratio": ratio, "perplexity_ratio_sem": 0.01 * (ratio - 1),
                "relative_error": None, "relative_error_sem": None, "cosine": None, "cosine_sem": None,
                "change": value - kl, "change_sem": 0.01 * value if place else 0.0,
            })  # fmt: skip
    return pd.DataFrame(rows)


def weight_error(frame: pd.DataFrame) -> pd.DataFrame:
    rows = []
    linears = frame[frame["kind"] == "linear"]
    for key in ("original", "rescaled"):
        for record in linears.itertuples():
            for name, (_, _, db) in FORMATS.items():
                drop = 0.4 * math.log1p(max(record.kurtosis_excess, 0))
                gain = 0.6 if key == "rescaled" and name in MOVED and "down" in record.role else 0.0
                sqnr = db - drop + gain
                rows.append({
                    "checkpoint": key, "tensor": record.tensor, "role": record.role, "layer": record.layer,
                    "format": name, "sqnr_db": sqnr, "relative_error": 10 ** (-sqnr / 20), "max_error": 0.01,
                })  # fmt: skip
    return pd.DataFrame(rows)


def depth_law() -> pd.DataFrame:
    rows = [
        {"role": role, "layers": 30, "exponent_p": p + 0.01, "exponent_sem": 0.013, "sigma_1": sigma, "r_squared": 0.8}
        for role, (_, _, sigma, p) in LINEARS.items()
    ]
    return pd.DataFrame(rows)


def histograms(frame: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    worst = frame.sort_values("kurtosis_excess", ascending=False).head(count)
    rows = []
    for record in worst.itertuples():
        edges = np.linspace(-8, 8, 102)
        rng = np.random.default_rng(3)
        values = rng.standard_t(4, size=60_000) / math.sqrt(2)
        counts = np.histogram(values, edges)[0] * max(1, record.count // 60_000)
        bins = {"edges": edges.tolist(), "counts": counts.tolist()}
        rows.append({"tensor": record.tensor, **bins, "below_count": len(rows), "above_count": 0})
    return pd.DataFrame(rows)


def spaces(layers: int = 30) -> pd.DataFrame:
    rows = []
    for layer in range(layers):
        for rule, size, changed in (("v.o", 192, True), ("up.down", 1536, True), ("q.k", 288, False)):
            rows.append({
                "space": f"model.layers.{layer}:{rule[0]}", "rule": rule, "layer": layer, "size": size,
                "changed": size // 2 * changed,
                "exponent_min": -2 if changed else 0, "exponent_max": 1 + layer % 3 if changed else 0,
                "exponent_mean_abs": 0.4 if changed else 0.0, "imbalance_before": 1.6, "imbalance_after": 1.1,
                "note": "" if changed else "already balanced to the nearest power of two",
            })  # fmt: skip
    return pd.DataFrame(rows)


def matrices(stats: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "tensor": record.tensor, "role": record.role, "layer": record.layer, "std_before": record.std,
            "std_after": record.std * (1.3 if record.role == "self_attn.o_proj" else 1.0), "target_std": math.nan,
            "left": math.nan,
        }
        for record in stats[stats["kind"] == "linear"].itertuples()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def unreachable() -> pd.DataFrame:
    why = "the residual stream is read by a norm and by the next layer: one factor would have to be the same everywhere"
    rows = [{"space": f"layers.{layer}.residual", "reason": why} for layer in range(30)]
    return pd.DataFrame([*rows, {"space": "logits", "reason": "the output of the model"}])


def reach() -> pd.DataFrame:
    blind = "Its scale is constant along the input of one row, and the plan's factors are constant there as well."
    sees = "Column factors of o_proj and down_proj differ inside one scale block."
    return pd.DataFrame([
        {
            "format": name, "can_change": name in MOVED, "tensors_changed": 60 if name in MOVED else 0,
            "tensors_total": 210, "reason": sees if name in MOVED else blind,
        }
        for name in FORMATS
    ])  # fmt: skip


def proof() -> pd.DataFrame:
    return pd.DataFrame([
        {"check": "every tensor is the original times powers of two", "result": "bit-equal", "detail": "272 of 272"},
        {"check": "the exponents obey the declared spaces", "result": "bit-equal", "detail": "90 spaces"},
        {"check": "logits in float32, bit for bit", "result": "bit-equal", "detail": "2,048 tokens, difference 0"},
    ])  # fmt: skip


def gains(layers: int = 30, formats: tuple[str, ...] = ("int4-g64", "nf4")) -> pd.DataFrame:
    """Predicted damage of the spaces of a Llama: most of it behind the early norms, where a few layers own it."""
    rng = np.random.default_rng(11)
    rules = {"in": ("norm fold", 2.0), "mid": ("norm fold", 1.5), "v": ("v.o", 0.3), "up": ("up.down", 1.2)}
    rows = []
    for layer in range(layers):
        for key, (rule, weight) in rules.items():
            size = weight * float(rng.lognormal(0, 0.5)) * (9 if layer == 1 and key == "up" else 1)
            method = ("awq", "awq", "awq", "cle", "wisca", "none")[int(rng.integers(6))]
            for name in formats:
                before = size * FORMATS[name][0] / (5 * layers)
                kept = 1.0 if method == "none" else float(rng.uniform(0.15, 0.7))
                stage = "" if method == "none" else "search" if method == "awq" else "start"
                why = {"none": "no method lowers its damage on held-out text", "awq": "lowest damage after descent"}
                rows.append({
                    "space": f"model.layers.{layer}:{key}", "rule": rule, "layer": layer, "format": name,
                    "method": method, "stage": stage, "damage_before": before, "damage_after": kept * before,
                    "removed_share": 1 - kept, "reason": why.get(method, "as good as the search, and it needs no text"),
                })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def exponents(layers: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(12)
    rows = []
    for layer in range(layers):
        for key, rule, size, width in (
            ("in", "norm fold", 576, 1.3),
            ("up", "up.down", 1536, 0.7),
            ("q", "q.k", 96, 0),
        ):
            found, counts = np.unique(
                np.clip(np.rint(rng.normal(0, width, size)), -6, 6).astype(int), return_counts=True
            )
            place = {"space": f"model.layers.{layer}:{key}", "rule": rule, "layer": layer}
            rows += [place | {"exponent": k, "count": n} for k, n in zip(found.tolist(), counts.tolist(), strict=True)]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def layer_error(layers: int = 30, formats: tuple[str, ...] = ("int4-g64", "nf4")) -> pd.DataFrame:
    rng = np.random.default_rng(13)
    rows = []
    for layer in range(layers):
        for role in LINEARS:
            for name in formats:
                base = 0.09 * float(rng.lognormal(0, 0.3)) * (1 + 0.3 * (name == "int4-g64"))
                for key, factor in (("original", 1.0), ("rescaled", 1.0 if "q_proj" in role else 0.6)):
                    rows.append({
                        "tensor": f"model.layers.{layer}.{role}.weight", "role": role, "layer": layer, "format": name,
                        "checkpoint": key, "relative_output_error": base * factor,
                    })  # fmt: skip
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def columns(tables: dict[str, pd.DataFrame]) -> dict[str, tuple[Column, ...]]:
    return {
        table: tuple(Column(str(c), *MEANINGS.get(str(c), ("", f"What {c} means."))) for c in frame.columns)
        for table, frame in tables.items()
    }


def run_report() -> Report:
    """The main job on a Llama-like model of 30 layers: everything a page can show."""
    stats = tensors()
    tables = {
        "damage": damage(), "weight_error": weight_error(stats), "tensors": stats, "depth_law": depth_law(),
        "histograms": histograms(stats), "spaces": spaces(), "matrices": matrices(stats),
        "unreachable": unreachable(), "reach": reach(),
        "proof": proof(),
    }  # fmt: skip
    verdict = (
        {"level": "good", "text": "The rescaled checkpoint is the same function, and NF4 costs 6 % less: "
         "mean KL 0.2388 instead of 0.2540 nats per token (standard error 0.005)."},
        {"level": "note", "text": "int8 and int8-row keep exactly the damage they had; this plan cannot reach them."},
        {"level": "bad", "text": "fp4 stays costly: top-1 agreement 66.5 % before and after."},
    )  # fmt: skip
    provenance = {
        "model": "HuggingFaceTB/SmolLM2-135M", "family": "llama", "vrscope": "0.1.0",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": "0.50.2"},
        "settings": {"method": "wisca", "granularity": "channel", "norm": "frobenius", "scales": "pow2",
                     "formats": list(FORMATS)},
        "text": "sample.txt (shipped)", "tokens": 2048, "window": 512, "machine": "x86_64 Linux", "cores": 2,
        "notes": [],
        "device": "cpu", "dtype": "float32", "date": "2025-11-21T10:00:00+00:00", "seconds": 174.2,
        "equivalent": "bit-equal", "command": "vrscope run HuggingFaceTB/SmolLM2-135M -o out",
    }  # fmt: skip
    return Report("run", provenance, verdict, tables, columns(tables))


def story_report() -> Report:
    """The main job with a method that searches: what each space gains, the exponents, and the error of each layer."""
    report = run_report()
    frame = report.tables["damage"].copy()
    for name, share in {"int4-g64": 0.6, "nf4": 0.42}.items():
        mine = (frame["format"] == name) & (frame["checkpoint"] == "rescaled")
        start = FORMATS[name][0]
        frame.loc[mine, "kl"], frame.loc[mine, "kl_sem"] = (1 - share) * start, 0.02 * (1 - share) * start
        frame.loc[mine, "change"], frame.loc[mine, "change_sem"] = -share * start, 0.015 * start
    extra = {"damage": frame, "gains": gains(), "exponents": exponents(), "layer_error": layer_error()}
    tables = dict(report.tables) | extra
    known = dict(report.provenance) | {"settings": dict(report.provenance["settings"]) | {"method": "auto"}}
    return Report("run", known, verdict(tables, known), tables, columns(tables))


def raw_report() -> Report:
    """Raw TVR: the rescaled checkpoint is a different function and worthless at it."""
    report = run_report()
    settings = {"method": "tvr", "raw": True, "scales": "free"}
    known = dict(report.provenance) | {"equivalent": "not equivalent", "settings": settings}
    verdict = ({"level": "bad", "text": "The result is NOT EQUIVALENT: mean KL 19.7 nats per token unquantized."},)
    return replace(report, provenance=known, verdict=verdict, tables=dict(report.tables) | {"damage": damage(raw=True)})


def encoder_report() -> Report:
    """An encoder without a causal head: relative error and cosine instead of KL."""
    report = run_report()
    frame = report.tables["damage"].copy()
    frame["relative_error"], frame["relative_error_sem"] = 0.2 * frame["kl"], 0.004 * frame["kl"]
    frame["cosine"], frame["cosine_sem"] = 1 - 0.02 * frame["kl"], 0.001 * frame["kl"]
    for name in ("kl", "top1", "perplexity"):
        for column in [c for c in frame.columns if c.startswith(name)]:
            frame[column] = np.nan
    return replace(report, tables=dict(report.tables) | {"damage": frame})


def hostile_report(report: Report | None = None) -> Report:
    """Names that try to be markup, script, template, mathtext and control characters, everywhere a name can stand."""
    report = report or run_report()
    long = "x" * 500
    names = {"format": f"f4 {HOSTILE}", "tensor": HOSTILE, "role": HOSTILE, "space": HOSTILE, "checkpoint": HOSTILE}
    tables = {}
    for key, frame in report.tables.items():
        frame = frame.head(40).copy()
        for column, text in names.items():
            if column in frame.columns:
                frame[column] = [f"{k % 3}{text}" if column != "tensor" else f"{k}{text}" for k in range(len(frame))]
        for column in ("reason", "note", "method", "stage", "detail", "check", "kind", "rule", "shape", "dtype"):
            if column in frame.columns:
                frame[column] = HOSTILE if column != "kind" else frame[column]
        if "tensor" in frame.columns:
            frame.loc[frame.index[0], "tensor"] = long
        tables[key] = frame
    known = {f"{key}": HOSTILE for key in report.provenance} | {HOSTILE: {HOSTILE: HOSTILE}, "lone": "\ud800"}
    verdict = ({"level": HOSTILE, "text": HOSTILE},)
    described = {t: tuple(Column(str(c), HOSTILE, HOSTILE) for c in f.columns) for t, f in tables.items()}
    return Report(HOSTILE, known, verdict, tables, described)


def small_report() -> Report:
    """Every table with a few rows, for tests that render often."""
    report = run_report()
    tables = {name: frame.head(6) for name, frame in report.tables.items()}
    tables["histograms"] = tables["histograms"].head(2)
    return replace(report, tables=tables, columns=columns(tables))


def shaped_tensors(layers: int, roles: int) -> pd.DataFrame:
    """Statistics of a model of any number of layers and roles."""
    rows = [tensor_row("head.weight", "head", None, "head", (8, 8), 0.1)]
    for layer in range(layers):
        for role in range(roles):
            name = f"experts.w{role}"
            rows.append(tensor_row(f"layers.{layer}.{name}", name, layer, "linear", (8, 8), 0.1))
    return pd.DataFrame(rows)
