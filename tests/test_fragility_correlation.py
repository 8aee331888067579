"""Rank correlations against scipy and against their definitions; what is left out, and what each outcome means."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vrscope.fragility.correlation import CORRELATION_COLUMNS, correlate, holm, interval, statistics_of, within

RNG = np.random.default_rng(11)
N = 60
NAMES = [f"t{k}" for k in range(N)]
DAMAGE = RNG.lognormal(size=N)


def damage(values: np.ndarray = DAMAGE, roles: list[str] | None = None) -> pd.DataFrame:
    return pd.DataFrame({"tensor": NAMES[: len(values)], "role": roles or ["q"] * len(values), "damage": values})


def tables(**columns: object) -> dict[str, pd.DataFrame]:
    return {"tensors": pd.DataFrame({"tensor": NAMES, **columns})}


def test_rho_and_p_are_those_of_scipy_ties_included() -> None:
    x = np.round(np.log(DAMAGE) + RNG.normal(size=N), 1)
    row = correlate(damage(), tables(std=x)).iloc[0]
    expected = stats.spearmanr(x, DAMAGE)
    assert row["rho"] == pytest.approx(expected.statistic, abs=1e-12)
    assert row["p_value"] == pytest.approx(expected.pvalue, rel=1e-9) and row["n"] == N
    assert list(correlate(damage(), tables(std=x)).columns) == [column.name for column in CORRELATION_COLUMNS]


def test_the_interval_covers_the_true_correlation_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    true = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of a binormal with correlation 0.6
    hits = 0
    for _ in range(400):
        x = rng.normal(size=50)
        y = 0.6 * x + 0.8 * rng.normal(size=50)
        low, high = interval(float(stats.spearmanr(x, y).statistic), 50)
        hits += low <= true <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_the_interval_at_the_ends() -> None:
    assert interval(0.3, 3) == (-1.0, 1.0)
    assert interval(1.0, 10) == (1.0, 1.0)
    low, high = interval(0.0, 10)
    assert low == -high == pytest.approx(math.tanh(-stats.norm.ppf(0.975) / math.sqrt(7)))


def test_holm_is_the_sequential_correction() -> None:
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def test_within_roles_only_differences_inside_a_role_count() -> None:
    roles = np.array(["q"] * 30 + ["down"] * 30, dtype=object)
    level = np.repeat([0.0, 100.0], 30)
    x, y = level + RNG.normal(size=60), level + RNG.normal(size=60)
    assert stats.spearmanr(x, y).statistic > 0.7 and abs(within(x, y, roles)) < 0.4
    assert within(x, x, roles) == pytest.approx(1.0)
    assert math.isnan(within(level, y, roles))


def test_without_roles_the_two_correlations_agree() -> None:
    x = RNG.normal(size=N) + DAMAGE
    row = correlate(damage(), tables(std=x)).iloc[0]
    assert row["rho_within_role"] == pytest.approx(row["rho"], abs=1e-12)


def test_constant_columns_missing_values_and_too_few_tensors_are_left_out() -> None:
    few = np.where(np.arange(N) < 3, np.arange(N), np.nan)
    gaps = np.where(np.arange(N) % 2, np.nan, DAMAGE)
    frame = correlate(damage(), tables(zero_share=np.zeros(N), mean=few, absmax=gaps, std=[None] * N, shape=["1"] * N))
    assert list(frame["statistic"]) == ["absmax"] and frame["n"][0] == N / 2
    assert len(correlate(damage(DAMAGE[:3]), tables(std=RNG.normal(size=N)))) == 0
    assert len(correlate(damage(np.ones(N)), tables(std=RNG.normal(size=N)))) == 0
    assert list(correlate(damage(), {}).columns) == [column.name for column in CORRELATION_COLUMNS]


def test_outcomes_and_their_order() -> None:
    noise = RNG.normal(size=N)
    ranks = stats.rankdata(DAMAGE)
    frame = correlate(
        damage(),
        tables(std=ranks + 5 * noise, absmax=-ranks + 20 * noise, mean=noise, kurtosis_excess=0.4 * ranks + 20 * noise),
    ).set_index("statistic")
    assert frame.loc["std", "outcome"] == "predicts" and frame.loc["std", "expected"] == "more"
    assert frame.loc["absmax", "outcome"] == "wrong way"
    assert frame.loc["mean", "outcome"] == "none" and frame.loc["mean", "expected"] == ""
    assert frame["rho"].abs().is_monotonic_decreasing


def test_statistics_that_rank_alike_share_a_row() -> None:
    x = RNG.lognormal(size=N)
    frame = correlate(damage(), tables(std=x, tvr_ratio=100 * x, variance=-x, mean=RNG.normal(size=N)))
    assert len(frame) == 2
    assert frame.set_index("statistic").loc["std", "same_ranking"] == "tvr_ratio, variance"


def test_errors_are_named_by_format_and_joined_with_norms() -> None:
    errors = pd.DataFrame(
        [
            {"tensor": name, "role": "q", "layer": 0, "format": scheme, "sqnr_db": k, "relative_error": 1 / (k + 1)}
            for scheme in ("nf4", "int8")
            for k, name in enumerate(NAMES)
        ]
    )
    found = statistics_of({**tables(frobenius_norm=np.full(N, 2.0)), "weight_error": errors})
    assert set(found) == {("tensors", "frobenius_norm")} | {
        ("weight_error", f"{name}[{scheme}]")
        for name in ("sqnr_db", "relative_error", "error_norm")
        for scheme in ("nf4", "int8")
    }
    assert found["weight_error", "error_norm[nf4]"]["t3"] == 0.5


def test_a_table_of_activations_is_used_if_it_is_there() -> None:
    rows = pd.DataFrame(
        {"tensor": [*NAMES, "t0"], "layer": 0, "absmax": [*DAMAGE, 2 * DAMAGE.max()], "tokens": 5, "text": "x"}
    )
    found = statistics_of({"activations": rows})
    assert set(found) == {("activations", "input absmax")}
    assert found["activations", "input absmax"]["t0"] == 2 * DAMAGE.max(), "of several rows the largest counts"
    assert correlate(damage(), {"activations": rows})["source"].tolist() == ["activations"]
    errors = pd.DataFrame({"tensor": NAMES, "format": "nf4", "relative_error": DAMAGE})
    inputs = pd.DataFrame({"tensor": NAMES[1:], "std": np.full(N - 1, 3.0)})
    both = statistics_of({**tables(frobenius_norm=np.full(N, 2.0)), "weight_error": errors, "activations": inputs})
    product = both["weight_error", "error_norm[nf4] x input std"]
    assert "t0" not in product and product["t1"] == pytest.approx(6 * DAMAGE[1])
