"""Losses against torch's own, and their gradients against autograd, over outputs larger than one chunk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy
import torch
from torch.nn import functional

from vrscope.activations import losses
from vrscope.activations.losses import Loss, divergence, draw, drawn, projected, squared_error

VOCABULARY = 50


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 7 * VOCABULARY)


def outputs(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn((40, VOCABULARY), generator=torch.Generator().manual_seed(seed))


def checked(loss: Loss, expected: Callable[[torch.Tensor], torch.Tensor], output: torch.Tensor) -> None:
    """Compare value and gradient with autograd in float64."""
    exact = output.double().requires_grad_(True)
    value = expected(exact)
    value.backward()
    gradient = torch.full_like(output, torch.nan)
    losses = loss(output, gradient)
    assert losses.shape == (len(output),) and float(losses.sum()) == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 30.0])
def test_divergence_and_its_gradient(scale: float) -> None:
    reference = outputs(0)

    def expected(logits: torch.Tensor) -> torch.Tensor:
        shares = [torch.log_softmax(x, -1) for x in (logits, reference.double())]
        return functional.kl_div(*shares, reduction="sum", log_target=True)

    found, logits = divergence(reference), reference + outputs(1, scale)
    if scale < 0.01:  # what is left of float32 where large terms cancel
        assert float(found(logits, None).sum()) == pytest.approx(float(expected(logits.double())), abs=1e-4)
    else:
        checked(found, expected, logits)
        assert torch.equal(found(logits, None), found(logits, torch.empty_like(logits)))


def test_words_that_are_ruled_out_in_both_add_nothing_and_one_that_becomes_impossible_is_infinite() -> None:
    reference, logits = outputs(0), outputs(1)
    without = divergence(reference[:, 1:])(logits[:, 1:], None)
    reference[:, 0] = logits[:, 0] = -torch.inf
    gradient = torch.empty_like(logits)
    torch.testing.assert_close(divergence(reference)(logits, gradient), without, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and (gradient[:, 0] == 0).all()
    logits[3, 5] = -torch.inf
    assert divergence(reference)(logits, None).isinf().nonzero().tolist() == [[3]]
    logits[3, 5] = torch.nan
    assert divergence(reference)(logits, None).isnan().nonzero().tolist() == [[3]]


def test_squared_error_and_its_gradient() -> None:
    reference = outputs(0)

    def expected(states: torch.Tensor) -> torch.Tensor:
        exact = reference.double()
        return ((states - exact).square().sum(1) / exact.square().sum(1)).sum()

    checked(squared_error(reference), expected, outputs(1))


def test_surprise_of_drawn_labels_and_its_gradient() -> None:
    output = outputs(2, 1.0)
    numbers = torch.rand((len(output), 1), generator=torch.Generator().manual_seed(5))
    labels = draw(torch.softmax(output, -1), numbers)[:, 0]

    def expected(logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels, reduction="sum")

    checked(drawn(torch.Generator().manual_seed(5)), expected, output)


def test_surprise_of_what_is_not_finite_is_not_finite_either() -> None:
    for wrong in (torch.nan, torch.inf):
        output = outputs(2)
        output[11, 3] = wrong
        assert drawn(torch.Generator())(output, None).isfinite().logical_not().nonzero().tolist() == [[11]]


def test_projection_is_linear_and_its_gradient_the_direction() -> None:
    output = outputs(3)
    gradient = torch.empty_like(output)
    values = projected(torch.Generator().manual_seed(5))(output, gradient)
    torch.testing.assert_close(values, (gradient * output).sum(1))
    sizes = (gradient * output.norm(dim=1, keepdim=True)).flatten().numpy() / 2**0.5
    assert scipy.stats.kstest(sizes, "norm").pvalue > 0.001


def test_labels_are_drawn_with_the_predicted_probabilities() -> None:
    logits = torch.tensor([3.0, -200.0, 0.0, 1.0, 2.5, -1.0, -200.0])
    predicted = torch.softmax(logits, -1)
    numbers = torch.rand((40_000, 1), generator=torch.Generator().manual_seed(0))
    labels = draw(predicted.expand(40_000, -1), numbers)
    counts = np.bincount(labels[:, 0].numpy(), minlength=len(logits))
    assert labels.shape == (40_000, 1) and counts[[1, 6]].tolist() == [0, 0]
    likely = np.array([0, 2, 3, 4, 5])
    expected = torch.softmax(logits.double(), -1).numpy()[likely] * 40_000
    assert scipy.stats.chisquare(counts[likely], expected / expected.sum() * counts.sum()).pvalue > 0.001
