"""Token metrics against scipy in float64, and their means with standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from vrscope.quant import metrics
from vrscope.quant.metrics import (
    DAMAGE_COLUMNS,
    TokenPredictions,
    TokenStates,
    compare_predictions,
    compare_states,
    damage_row,
)

WINDOW = (3, 1, 4, 1, 5, 9, 2, 6)


def logits(seed: int, scale: float = 3.0, tokens: int = 8, vocabulary: int = 40) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("scale", [0.01, 3.0, 100.0])
def test_predictions_equal_scipy(chunk: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", chunk)
    reference, other = logits(0, scale), logits(0, scale) + logits(1, 0.1 * scale)
    found = compare_predictions(reference, other, WINDOW)
    first, second = (special.log_softmax(x.double().numpy(), axis=1) for x in (reference, other))
    np.testing.assert_allclose(
        found.kl, special.rel_entr(np.exp(first), np.exp(second)).sum(axis=1), rtol=1e-9, atol=1e-14
    )
    np.testing.assert_array_equal(found.same_top, first.argmax(axis=1) == second.argmax(axis=1))
    np.testing.assert_allclose(found.surprise, [-second[i, WINDOW[i + 1]] for i in range(7)], rtol=1e-12)
    assert found.kl.shape == found.same_top.shape == (8,) and found.surprise.shape == (7,)


def test_equal_logits_have_no_divergence_at_all() -> None:
    found = compare_predictions(logits(0), logits(0), WINDOW)
    assert (found.kl == 0).all() and (found.same_top == 1).all()


def test_a_tiny_difference_is_not_lost() -> None:
    reference = logits(0).double()
    direction = logits(1).double()
    other = (reference + 1e-5 * direction).float()
    share = torch.softmax(reference.float().double(), dim=1)
    shift = other.double() - reference.float().double()
    variance = (share * shift**2).sum(1) - (share * shift).sum(
        1
    ) ** 2  # KL is half the variance of the shift, for small ones
    found = compare_predictions(reference.float(), other, WINDOW)
    np.testing.assert_allclose(found.kl, variance.numpy() / 2, rtol=1e-3)


def test_logits_of_minus_infinity_in_both_count_for_nothing() -> None:
    reference, other = logits(0), logits(1)
    shut = (
        torch.cat([reference, torch.full((8, 2), -math.inf)], 1),
        torch.cat([other, torch.full((8, 2), -math.inf)], 1),
    )
    found, expected = compare_predictions(*shut, WINDOW), compare_predictions(reference, other, WINDOW)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-12)
    one_sided = compare_predictions(torch.cat([reference, torch.zeros(8, 2)], 1), shut[1], WINDOW)
    assert np.isinf(one_sided.kl).all()


def test_outputs_that_are_not_numbers_are_reported_as_such() -> None:
    other = logits(1)
    other[2, 5] = math.nan
    found = compare_predictions(logits(0), other, WINDOW)
    assert np.isnan(found.kl).nonzero()[0].tolist() == [2] == np.isnan(found.surprise).nonzero()[0].tolist()
    assert math.isnan(damage_row([found], found.surprise)["kl"])


def test_a_window_of_one_token_predicts_nothing_that_is_there() -> None:
    found = compare_predictions(logits(0, tokens=1), logits(1, tokens=1), (3,))
    assert found.kl.shape == (1,) and found.surprise.shape == (0,)
    assert math.isnan(damage_row([found], found.surprise)["perplexity"])


def test_states_equal_numpy() -> None:
    reference, other = logits(0), logits(0) + logits(1, 0.5)
    found = compare_states(reference, other)
    first, second = reference.double().numpy(), other.double().numpy()
    relative = np.linalg.norm(second - first, axis=1) / np.linalg.norm(first, axis=1)
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    np.testing.assert_allclose(found.relative_error, relative, rtol=1e-12)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)
    row = damage_row([found], None)
    assert row["relative_error"] == pytest.approx(relative.mean()) and row["cosine"] == pytest.approx(cosine.mean())
    assert row["cosine_sem"] == pytest.approx(stats.sem(cosine))
    assert all(math.isnan(row[name]) for name in ("kl", "top1", "perplexity", "perplexity_ratio", "kl_sem"))


def test_means_percentiles_and_standard_errors() -> None:
    rng = np.random.default_rng(0)
    windows = [
        TokenPredictions(rng.gamma(1, 1, 50), rng.integers(0, 2, 50) * 1.0, rng.gamma(3, 1, 49)) for _ in range(4)
    ]
    base = rng.gamma(3, 1, 196)
    row = damage_row(windows, base)
    kl = np.concatenate([window.kl for window in windows])
    top, own = (np.concatenate([getattr(window, name) for window in windows]) for name in ("same_top", "surprise"))
    assert set(row) == {column.name for column in DAMAGE_COLUMNS[2:]}
    assert (row["kl"], row["kl_sem"]) == pytest.approx((kl.mean(), stats.sem(kl)))
    expected = [np.percentile(kl, q) for q in (50, 90, 99, 100)]
    assert [row[f"kl_{name}"] for name in ("p50", "p90", "p99", "max")] == pytest.approx(expected)
    assert (row["top1"], row["top1_sem"]) == pytest.approx((top.mean(), stats.sem(top)))
    assert row["perplexity"] == pytest.approx(stats.gmean(np.exp(own)))
    assert row["perplexity_sem"] == pytest.approx(row["perplexity"] * stats.sem(own))
    assert row["perplexity_ratio"] == pytest.approx(stats.gmean(np.exp(own - base)))
    assert row["perplexity_ratio_sem"] == pytest.approx(row["perplexity_ratio"] * stats.sem(own - base))
    assert math.isnan(row["cosine"]) and math.isnan(row["relative_error_sem"])


def test_the_delta_method_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(1)
    own, base = rng.gamma(3, 1, 800), None
    base = own + rng.normal(0, 0.3, 800)
    row = damage_row([TokenPredictions(np.zeros(801), np.ones(801), own)], base)
    picks = rng.integers(0, 800, (2000, 800))
    assert row["perplexity_sem"] == pytest.approx(np.exp(own[picks].mean(1)).std(), rel=0.1)
    assert row["perplexity_ratio_sem"] == pytest.approx(np.exp((own - base)[picks].mean(1)).std(), rel=0.1)


def test_one_token_has_no_standard_error_and_a_huge_perplexity_is_infinite() -> None:
    row = damage_row([TokenPredictions(np.array([0.5]), np.array([1.0]), np.array([2000.0]))], np.array([3.0]))
    assert row["kl"] == 0.5 and math.isnan(row["kl_sem"]) and row["perplexity"] == math.inf
    single = damage_row([TokenStates(np.array([0.1]), np.array([0.9]))], None)
    assert single["cosine"] == 0.9 and math.isnan(single["cosine_sem"])
