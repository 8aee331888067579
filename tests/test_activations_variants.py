"""Variants of a window: what is drawn, how often, and from where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import save_tiny

from vrscope.activations.importance import calibrate
from vrscope.activations.variants import SHARE, varied
from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.quant.loading import load_model
from vrscope.quant.text import TextSample


def test_half_of_the_tokens_are_drawn_from_what_the_model_predicts_there() -> None:
    tokens, vocabulary = 20_000, 5
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0])
    logits = chances.log().repeat(tokens, 1)
    window = (4,) * tokens  # of no probability, so that what is drawn can be told from what stays
    found = np.array(varied(window, logits, torch.Generator().manual_seed(3)))
    assert found[0] == 4 and len(found) == tokens
    drawn = found[found != 4]
    assert stats.binomtest(len(drawn), tokens - 1, SHARE).pvalue > 1e-3
    counts = np.bincount(drawn, minlength=vocabulary)[:4]
    assert stats.chisquare(counts, chances[:4].numpy() * len(drawn)).pvalue > 1e-3


def test_a_token_is_drawn_by_the_prediction_of_the_one_before_it() -> None:
    logits = torch.full((6, 8), -1e9)
    logits[torch.arange(6), torch.arange(6) + 2] = 0.0  # row i says i + 2
    found = varied((0, 0, 0, 0, 0, 0), logits, torch.Generator().manual_seed(0))
    assert found[0] == 0 and all(token in (0, place + 1) for place, token in enumerate(found)) and any(found)


def test_variants_go_on_from_the_windows_of_the_text_and_are_the_same_every_time(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    loaded = load_model(checkpoint, "cpu", "float32")
    sample = TextSample(
        "made up", tuple(tuple((7 * i + 3 * w) % 90 + 3 for i in range(40)) for w in range(3)), 40, (0, 0)
    )

    told: list[int] = []

    def made() -> tuple[tuple[int, ...], ...]:
        trial = calibrate(loaded, checkpoint, bind(checkpoint).roles, sample, keep=True).trial
        assert trial is not None
        generator = torch.Generator().manual_seed(0)
        assert trial.add(trial.draw([0, 2], generator)) == [3, 4]
        assert trial.add(trial.draw([1], generator), lambda: told.append(1)) == [5]
        for number, window in enumerate((*sample.windows, *trial.variants)):
            assert torch.equal(trial.outputs.read(number), loaded.run(window))
        assert trial.losses([3, 5]).max() < 1e-6
        return tuple(trial.variants)

    first = made()
    assert first == made() and told == [1, 1]
    for variant, number in zip(first, (0, 2, 1), strict=True):
        own = sample.windows[number]
        assert len(variant) == len(own) and variant[0] == own[0] and 8 < sum(map(int.__ne__, variant, own)) < 32


@pytest.mark.parametrize(("value", "kept"), [(float("nan"), False), (float("inf"), False), (-float("inf"), True)])
def test_variants_to_which_a_model_says_nothing_are_left_out(
    value: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    loaded = load_model(checkpoint, "cpu", "float32")
    sample = TextSample("made up", (tuple(range(3, 43)),), 40, (0, 0))
    trial = calibrate(loaded, checkpoint, bind(checkpoint).roles, sample, keep=True).trial
    assert trial is not None
    drawn, run = trial.draw([0, 0, 0], torch.Generator().manual_seed(0)), type(loaded).run

    def broken(self: object, window: tuple[int, ...]) -> torch.Tensor:
        output = run(loaded, window).clone()
        output[5, 7] = value if window == drawn[1] else output[5, 7]
        return output

    monkeypatch.setattr(type(loaded), "run", broken)
    assert trial.add(drawn) == ([1, 2, 3] if kept else [1, 2])
    assert trial.variants == (drawn if kept else [drawn[0], drawn[2]])
    assert torch.equal(trial.outputs.read(2), broken(loaded, trial.variants[1]))
    trial.drop([1])
    assert trial.add(drawn[:1]) == [4 if kept else 3]  # numbers are not used again
