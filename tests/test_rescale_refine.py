"""Refinement: every move against the formats' own round trips, the penalty's search, and what it earns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_rescale_search import SEARCHED, reader, scales_of
from tiny_models import save_tiny

from vrscope.activations.importance import calibrate
from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.demo import demo_model
from vrscope.executors import Serial
from vrscope.progress import silent
from vrscope.quant.formats import get_format
from vrscope.quant.layers import quantized
from vrscope.quant.loading import load_model
from vrscope.quant.text import TextSample
from vrscope.rescale import refine as refining
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.planning import make_plan
from vrscope.rescale.search import Scales
from vrscope.stages import CalibrationText, choose_plan, read_sample

WINDOWS = tuple(tuple((7 * i + 3 * w) % 90 + 3 for i in range(40)) for w in range(4))
SAMPLE = TextSample("made up", WINDOWS, 40, (0, 0))


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        (name, columns)
        for name in SEARCHED
        for columns in (192, 100, 40)
        # blocks run on from row to row where rows are no whole number of them, which a search by columns leaves out
        if columns % 64 == 0 or get_format(name).scope.kind != "block"
    ],
)
def test_what_a_move_gains_and_costs_is_what_the_format_makes_of_it(name: str, columns: int) -> None:
    generator = np.random.default_rng(7)
    own = reader(5, columns=columns)
    own.weight[:, 3] = 0
    own = replace(own, slope=generator.standard_normal(own.weight.shape).astype(np.float32))
    scales = scales_of(generator.integers(-2, 3, columns), generator.random(columns) < 0.5)
    entry = get_format(name)
    found = refining._Candidates(np.zeros((3, columns)), np.zeros((3, columns)))
    refining._add(own, entry, scales, found)

    def error(chosen: Scales) -> np.ndarray:
        factors = chosen.factors(own.ids, own.power)
        return own.weight - entry.of_array(np.ascontiguousarray(own.weight * factors)) / factors.astype(np.float64)

    now = error(scales)
    for column in (0, 3, 9, columns - 1):
        for move, step in enumerate((-1, 1, 0)):
            trial = scales_of(scales.exponents.copy(), scales.negative.copy())
            trial.exponents[column] += step
            trial.negative[column] ^= step == 0
            change = error(trial) - now
            size = float((np.abs(own.slope) * np.abs(now)).sum())
            assert found.gain[move, column] == pytest.approx(float((own.slope * change).sum()), abs=2e-4 * size)
            cost = float((own.importance * change**2).sum()) / 2
            assert found.cost[move, column] == pytest.approx(cost, rel=2e-3, abs=1e-8 * float(own.importance.sum()))


def test_moves_are_made_where_they_gain_more_than_the_penalty_asks() -> None:
    gain = np.array([[2.0, 0.5, -1.0, -np.inf], [1.0, 3.0, -2.0, 4.0], [0.0, 0.0, -1.0, 4.5]])
    cost = np.array([[1.0, 1.0, 1.0, 0.0], [0.1, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    own = refining._Candidates(gain, cost)
    start = Scales(np.array([0, 1, 2, 3]), np.array([False, False, True, True]))
    made = own.made(start, 2.0)
    assert made.exponents.tolist() == [1, 2, 2, 3] and made.negative.tolist() == [False, False, True, False]
    assert own.made(start, 100.0).exponents.tolist() == start.exponents.tolist()


@pytest.mark.parametrize("wanted", [12.0, 64.0, 200.0, None])
def test_the_penalty_that_measures_best_is_found_and_no_move_is_made_if_none_helps(wanted: float | None) -> None:
    chosen = {"a": Scales(np.zeros(400, np.int64), np.zeros(400, bool))}
    gain, cost = np.full((3, 400), -1.0), np.ones((3, 400))
    gain[1] = np.geomspace(4, 1024, 400)  # how many scales move tells the penalty

    def measured(scales) -> float:
        moved = int(np.count_nonzero(scales["a"].exponents))
        if not moved:
            return 10.0
        if wanted is None or gain[1, -moved] < wanted / 1.5:  # moves overshoot
            return 11.0
        return abs(np.log2(gain[1, -moved] / wanted))

    best = refining._best({"a": refining._Candidates(gain, cost)}, chosen, measured)
    if wanted is None:
        assert best is chosen
    else:
        assert measured(best) <= 1  # a step of the penalty is a factor of two


def test_penalties_at_which_nothing_moves_are_not_measured() -> None:
    chosen = {"a": Scales(np.zeros(2, np.int64), np.zeros(2, bool))}
    gain, cost = np.array([[-1.0, -1.0], [20.0, -1.0], [-1.0, -1.0]]), np.ones((3, 2))
    asked = []

    def measured(scales) -> float:
        asked.append(scales["a"].exponents.tolist())
        return 2.0 - scales["a"].exponents.sum()

    best = refining._best({"a": refining._Candidates(gain, cost)}, chosen, measured)
    assert best["a"].exponents.tolist() == [1, 0]
    assert asked[:2] == [[0, 0], [1, 0]]  # at 16, the first that is below 20


def test_the_scales_as_they_are_come_second_and_mostly_cost_one_window() -> None:
    chosen = {"a": Scales(np.zeros(3, np.int64), np.zeros(3, bool))}
    gain, cost = np.full((3, 3), -1.0), np.ones((3, 3))
    gain[1] = [40.0, 20.0, 70.0]
    for values, best, order in (
        ({0: 5.0, 2: 1.0, 3: 2.0}, 2, [2, 0, 3]),  # of as many moves
        ({0: 5.0, 2: 6.0, 1: 4.0}, 1, [2, 0, 1]),  # fewer, where they overshoot
        ({0: 5.0, 2: 6.0, 1: 7.0}, 0, [2, 0, 1]),
        ({0: 5.0, 2: 5.0, 3: 6.0}, 2, [2, 0, 3]),
    ):
        asked = []

        def measured(scales, values=values, asked=asked) -> float:
            asked.append(int(scales["a"].exponents.sum()))
            return values[asked[-1]]

        found = refining._best({"a": refining._Candidates(gain, cost)}, chosen, measured)
        assert int(found["a"].exponents.sum()) == best and asked == order


@pytest.mark.parametrize(("case", "name"), [("llama", "nf4"), ("mixtral", "int4-g32"), ("phi3", "nf4")])
def test_weights_are_rounded_as_those_of_the_written_checkpoint(case: str, name: str, tmp_path: Path) -> None:
    """Scales of columns, scales and signs of rows: the outputs are the same to the last bit."""
    folder, out = save_tiny(case, tmp_path / "model"), tmp_path / "out"
    checkpoint, entry = open_checkpoint(folder), get_format(name)
    binding = bind(checkpoint)
    loaded = load_model(checkpoint, "cpu", "float32")
    found = calibrate(loaded, checkpoint, binding.roles, SAMPLE, keep=True)
    plan, _ = make_plan(checkpoint, binding, "random", MethodOptions(seed=3), Serial(), silent)
    apply_plan(checkpoint, binding, plan, out, force=False, progress=silent)
    chosen = {name: Scales(values.astype(np.int64), np.array(plan.signs(name))) for name, values in plan.spaces.items()}
    task = refining.Refinement(binding, checkpoint, found, binding.spaces, [(entry, 1.0)], 6, Serial(), silent)
    again = load_model(open_checkpoint(out), "cpu", "float32")
    assert found.trial is not None
    with found.trial.rounded(refining._rounding(task, entry, chosen)), quantized(again.model, entry):
        for window in WINDOWS:
            assert torch.equal(loaded.run(window), again.run(window))


@pytest.mark.parametrize("target", [("int4-g64",), ("nf4",)])
def test_refinement_lowers_the_damage_on_text_it_has_not_seen(target: tuple[str, ...]) -> None:
    checkpoint = open_checkpoint(demo_model())
    binding = bind(checkpoint)
    on = CalibrationText(None, 2048)
    plans = [
        choose_plan(checkpoint, binding, "awq", MethodOptions(target=target, rounds=rounds), on, silent)[0]
        for rounds in (0, 2)
    ]
    assert [plan.settings["rounds"] for plan in plans] == [0, 2]
    assert max(int(np.abs(values).max(initial=0)) for values in plans[1].spaces.values()) <= 6
    moved = any("moved by what the rounded model showed" in row["reason"] for row in plans[1].gains)
    assert moved or target == ("nf4",)  # where no move of this small model helps on the other half of the text
    other = read_sample(checkpoint, None, 4096, 2048)
    loaded = load_model(checkpoint, "cpu", "float32")
    found = calibrate(loaded, checkpoint, binding.roles, other, keep=True)
    assert found.trial is not None
    damage = []
    for plan in plans:
        chosen = {
            name: Scales(values.astype(np.int64), np.array(plan.signs(name))) for name, values in plan.spaces.items()
        }
        entry = get_format(target[0])
        task = refining.Refinement(binding, checkpoint, found, binding.spaces, [(entry, 1.0)], 6, Serial(), silent)
        with found.trial.rounded(refining._rounding(task, entry, chosen)):
            damage.append(found.trial.losses(range(len(other.windows))).mean())
    assert damage[1] < damage[0] if moved else damage[1] == damage[0]


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_the_penalty_is_chosen_on_text_that_no_slope_of_the_round_is_from(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny(case, tmp_path))
    loaded = load_model(checkpoint, "cpu", "float32")
    trial = calibrate(loaded, checkpoint, bind(checkpoint).roles, SAMPLE, keep=True).trial
    assert trial is not None
    told = []
    texts = refining._Texts(trial, lambda: told.append(1))
    rounds = [(list(texts.shown(number)), list(texts.judged(number))) for number in range(3)]
    if case == "bert":
        assert rounds == [([0, 2], [1, 3]), ([1, 3], [0, 1]), ([0, 2], [0, 1])]
        return
    shown = [0, 1, 2, 3, 4, 5, 6, 7], [12, 13, 14, 15], [16, 17, 18, 19]
    assert rounds == [(windows, [8, 9, 10, 11]) for windows in shown]
    assert len(trial.outputs) == 20 and len({*WINDOWS, *trial.variants}) == 20
    assert len(told) == 16 and len(set(trial.outputs.starts)) == 12  # of what was shown the places are used again


def test_what_scales_leave_is_measured_as_far_as_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With outputs made up: what broken tokens count, and that the first window may be enough."""
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    binding = bind(checkpoint)
    loaded = load_model(checkpoint, "cpu", "float32")
    found = calibrate(loaded, checkpoint, binding.roles, SAMPLE, keep=True)
    task = refining.Refinement(
        binding, checkpoint, found, binding.spaces, [(get_format("nf4"), 2.0)], 6, Serial(), silent
    )
    chosen = {space.name: Scales(np.zeros(space.size, np.int64), np.zeros(space.size, bool)) for space in task.spaces}
    losses, asked = {0: np.full(40, 0.3), 1: np.full(40, 0.1), 3: np.full(40, 0.2)}, []

    def made_up(self: object, windows: tuple[int, ...]) -> np.ndarray:
        asked.extend(windows)
        return np.concatenate([losses[window] for window in windows])

    monkeypatch.setattr(type(found.trial), "losses", made_up)
    measured, clock = refining._Damage(task), refining._Clock(task, 1)
    measured.begin((1, 3), clock)
    assert measured(chosen) == pytest.approx(2 * 0.15)
    losses[3][7] = 9.0  # counts ten times 0.15
    assert measured(dict(chosen)) == pytest.approx(2 * (0.1 * 40 + 0.2 * 39 + 1.5) / 80)
    assert asked == [1, 3, 1, 3]
    losses[3][8] = np.inf  # cannot be taken, however few tokens are
    assert measured(dict(chosen)) == np.inf
    losses[3][8] = 0.2
    asked.clear()
    losses[1] = losses[1] * 1.01
    assert np.isfinite(measured(dict(chosen)))
    losses[1] = losses[1] * 1.1
    assert measured(dict(chosen)) == np.inf
    assert asked == [1, 3, 1]
    measured.begin((0, 1, 3), clock)
    assert measured(chosen) == pytest.approx(2 * (0.3 + 0.1 + 0.2) / 3)
    assert asked[3:] == [0]  # the others are known of the best
    losses = dict.fromkeys((0, 1, 3), np.zeros(40))
    assert measured(dict(chosen)) == 0 and measured(dict(chosen)) == 0


@pytest.mark.parametrize(("case", "rounds"), [("llama", 1), ("llama", 3), ("bert", 2)])
def test_every_pass_is_told_of(case: str, rounds: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny(case, tmp_path))
    binding = bind(checkpoint)
    found = calibrate(load_model(checkpoint, "cpu", "float32"), checkpoint, binding.roles, SAMPLE, keep=True)
    told: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int | None, unit: str) -> None:
        assert (stage, unit) == (refining.STAGE, "passes") and total is not None
        told.append((done, total))

    task = refining.Refinement(
        binding, checkpoint, found, binding.spaces, [(get_format("nf4"), 1.0)], 6, Serial(), progress
    )
    chosen = {space.name: Scales(np.zeros(space.size, np.int64), np.zeros(space.size, bool)) for space in task.spaces}
    refining.refine(task, chosen, rounds)
    assert len({total for _, total in told}) == 1 and told[0][0] == 0 and told[-1][0] == told[-1][1]
    steps = np.diff([done for done, _ in told])
    assert (steps >= 0).all() and np.count_nonzero(steps[:-1]) > 8


@pytest.mark.parametrize("after", [0, 4])
def test_where_the_model_says_nothing_to_variants_scales_stay(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    binding = bind(checkpoint)
    loaded = load_model(checkpoint, "cpu", "float32")
    found = calibrate(loaded, checkpoint, binding.roles, SAMPLE, keep=True)
    task = refining.Refinement(
        binding, checkpoint, found, binding.spaces, [(get_format("nf4"), 1.0)], 6, Serial(), silent
    )
    chosen = {space.name: Scales(np.zeros(space.size, np.int64), np.zeros(space.size, bool)) for space in task.spaces}
    run, asked = type(loaded).run, []

    def broken(self: object, window: tuple[int, ...]) -> torch.Tensor:
        asked.append(window)
        return run(loaded, window) * (1 if len(asked) <= after else float("nan"))

    monkeypatch.setattr(type(loaded), "run", broken)
    assert refining.refine(task, chosen, 2) is chosen
    assert len(asked) == 8 and found.trial is not None and not found.trial.copies
