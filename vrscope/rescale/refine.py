"""Moves of single scales that undo what all rounding errors together do to the output, as the rounded model shows it.

The search takes errors of different weights to be unrelated; in a rounded model they add up. The slope of the damage by
every weight, at the rounded weights, says which way an error would have to change. For every move of every scale the
gain to first order is known from that (`look`), and what it costs by the importance of the weights; moves are made
where gain > penalty * cost. How large the penalty has to be, so that moves which were not chosen together do not
overshoot, is found by running the model on text that the slopes are not from; where no penalty helps, nothing moves.
Nine tenths of what the slopes of a thousand tokens promise is noise, so they are from more than the text where the
model can make more. The idea of choosing between roundings by their first-order effect is that of AdaRound (arXiv
2004.10568); here the choice is among exponents and signs that leave the unrounded function as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.spaces import Space
from vrscope.checkpoint.source import Checkpoint
from vrscope.executors import Executor
from vrscope.progress import Progress
from vrscope.quant.formats import Format
from vrscope.rescale.plan import EXPONENT, POW2, RescalePlan
from vrscope.rescale.readers import Reader, may_turn, readers_of
from vrscope.rescale.scaling import TensorScale, tensor_scales
from vrscope.rescale.search import Scales, unit_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from vrscope.activations.importance import Calibration
    from vrscope.activations.trial import Rounding, Trial
    from vrscope.arch.binding import Binding

STAGE = "refining scales on the rounded model"
PENALTY, STEP = 32.0, 2.0  # first tried, and from one to the next
LEAST, MOST = 8.0, 256.0
SEED = 0  # of the variants of the text
HEAVIEST = 10.0  # times the mean: what a token counts at most
WORSE = 1.02  # times the least, on the first window: not followed further
BOTH_WAYS, MOST_TRIALS = 3, 5  # passes that one both ways takes as long as, and trials of one round at most
_DIRECTIONS = (-1, 1, 0)  # of the exponent; 0 is the other sign

Chosen = Mapping[str, Scales]


@dataclass(frozen=True, slots=True, eq=False)
class Refinement:
    """What scales are refined on.

    Attributes
    ----------
    binding, checkpoint, calibration
        The calibration with its trial.
    spaces
        Those whose scales may move.
    formats
        What to lower the damage of, with the weight of each.
    limit
        Largest magnitude of an exponent.
    executor, progress
        Who works, and who is told.
    """

    binding: Binding
    checkpoint: Checkpoint
    calibration: Calibration
    spaces: Sequence[Space]
    formats: Sequence[tuple[Format, float]]
    limit: int
    executor: Executor
    progress: Progress


def refine(task: Refinement, chosen: Chosen, rounds: int) -> Chosen:
    """Return scales after some rounds of moves.

    Parameters
    ----------
    task
        On what.
    chosen
        Scales to start from, by the name of the space; a space that is missing has none.
    rounds
        At most so many; none after two in a row in which nothing helps, or where the model says nothing to variants.
    """
    trial = task.calibration.trial
    assert trial is not None
    clock = _Clock(task, rounds)
    texts, damage, idle = _Texts(trial, clock.tick), _Damage(task), 0
    try:
        for number in range(rounds):
            clock.begin(number)
            if not (shown := texts.shown(number)):
                break
            candidates = _look(task, chosen, trial, shown, clock)
            if not (judged := texts.judged(number)):
                break
            damage.begin(judged, clock)
            found = _best(candidates, chosen, damage)
            idle = idle + 1 if found is chosen else 0
            if idle == 2:
                break
            chosen = found
    finally:
        trial.copies.clear()
    clock.begin(rounds)
    return chosen


class _Texts:
    """Which windows slopes are from, and which the penalty is chosen on, by the number of the round.

    Where tokens are predicted, slopes are from all of the text and a variant of each window, in later rounds from new
    variants, and the penalty is chosen on variants that serve for nothing else. Otherwise every second window gives
    slopes, and rounds take turns; the penalty is chosen on the rest in the first round, later on every second pair, so
    as many from either half: those that slopes were taken from before have been adapted to, and alone would make
    whatever undoes some of that look worse than it is.
    """

    def __init__(self, trial: Trial, told: Callable[[], None]) -> None:
        import torch

        self._trial, self._told = trial, told
        self._own: Sequence[int] = range(len(trial.sample.windows))
        self._made: Sequence[int] = ()
        self._judged: Sequence[int] | None = None
        self._generator = torch.Generator(device="cpu").manual_seed(SEED)
        self._kept = trial.draw(self._own, self._generator) if trial.loaded.causal else []

    def shown(self, number: int) -> Sequence[int]:
        """Return the windows for the slopes of a round."""
        if not self._trial.loaded.causal:
            return self._own[number % 2 :: 2]
        self._made = self._trial.add(self._trial.draw(self._own, self._generator), self._told)
        return [*(self._own if number == 0 else ()), *self._made]

    def judged(self, number: int) -> Sequence[int]:
        """Return the windows for the penalty of a round, whose slopes are known by now."""
        if not self._trial.loaded.causal:
            return [window for window in self._own if window % 4 < 2] if number else self._own[1::2]
        self._trial.drop(self._made)
        if self._judged is None:
            self._judged = self._trial.add(self._kept, self._told)
        return self._judged


class _Damage:
    """The damage that scales leave on some windows, over all formats; infinite where the first window shows them worse.

    A token counts at most some times the mean of the scales that were measured first: among a thousand tokens the few
    at which a model goes entirely wrong would decide alone, and on another text they are others. What the best scales
    lose is kept, so that nothing is run again for the next round.
    """

    def __init__(self, task: Refinement) -> None:
        self._task = task
        self._kept: tuple[Chosen, dict[tuple[str, int], NDArray[np.float64]]] = {}, {}

    def begin(self, windows: Sequence[int], clock: _Clock) -> None:
        """Measure on these windows from now on, and compare with what was measured since."""
        self._windows, self._clock = windows, clock
        self._most: dict[str, float] = {}
        self._least = float("inf")
        self._growth = 1.0  # of the least, in the last format: damage on all windows over that on the first

    def __call__(self, scales: Chosen) -> float:
        task, trial, value = self._task, self._task.calibration.trial, 0.0
        assert trial is not None
        known = dict(self._kept[1]) if scales is self._kept[0] else {}
        for number, (entry, share) in enumerate(task.formats, 1):
            name = entry.name
            missing = [window for window in self._windows if (name, window) not in known]
            with trial.rounded(_rounding(task, entry, scales), task.executor) if missing else nullcontext():
                for window in missing:
                    known[name, window] = trial.losses([window])
                    self._clock.tick()
                    if window == self._windows[0] and number == len(task.formats) and self._least < np.inf:
                        foretold = value + share * self._mean(name, known, self._windows[:1]) * self._growth
                        if foretold > WORSE * self._least:
                            return float("inf")
            whole = self._mean(name, known, self._windows)
            value += share * whole
        if value < self._least:
            first = self._mean(name, known, self._windows[:1])
            self._least, self._growth = value, whole / first if first else 1.0
            self._kept = scales, known
        return value

    def _mean(self, name: str, losses: Mapping[tuple[str, int], NDArray[np.float64]], windows: Sequence[int]) -> float:
        """Return the mean over tokens, each at most what it may count, which the first scales measured tell.

        It is infinite where an output is not finite: such scales are out of the question.
        """
        found = np.concatenate([losses[name, window] for window in windows]).clip(min=0)  # below is rounding
        if not np.isfinite(found).all():
            return float("inf")
        most = self._most.setdefault(name, HEAVIEST * float(found.mean()))
        return float(np.minimum(found, most).mean())


class _Clock:
    """Tells of the passes through the model, as many as there can be at most; a pass both ways counts as three."""

    def __init__(self, task: Refinement, rounds: int) -> None:
        trial = task.calibration.trial
        assert trial is not None
        windows, formats = len(trial.sample.windows), len(task.formats)
        judged = windows if trial.loaded.causal else windows // 2
        shown, added = (2 * windows, windows) if trial.loaded.causal else (windows - judged, 0)
        self._progress = task.progress
        self._each = added + formats * (BOTH_WAYS * shown + MOST_TRIALS * judged)
        self._first, self._total = added, added + rounds * self._each  # the first round adds those to choose on, too
        self._done, self._end = 0, self._total

    def begin(self, number: int) -> None:
        """Tell that a round begins, which is known to be the end of the one before."""
        self._done = self._first + number * self._each if number else 0
        self._end = self._first + (number + 1) * self._each
        self._progress(STAGE, self._done, self._total, "passes")

    def tick(self, passes: int = 1) -> None:
        """Tell of one more pass, or several."""
        self._done = min(self._done + passes, self._end, self._total)
        self._progress(STAGE, self._done, self._total, "passes")


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """All moves of the scales of one space: what each gains and costs, both of shape `(3, size)`; -inf if ruled out."""

    gain: NDArray[np.float64]
    cost: NDArray[np.float64]

    def made(self, scales: Scales, penalty: float) -> Scales:
        """Return the scales after the best move of each, if that is worth it."""
        value = self.gain - penalty * self.cost
        best = np.argmax(value, axis=0)
        moves = np.take_along_axis(value, best[None], axis=0)[0] > 0
        directions = np.array(_DIRECTIONS)[best]
        return Scales(scales.exponents + np.where(moves, directions, 0), scales.negative ^ (moves & (directions == 0)))


def _best(candidates: Mapping[str, _Candidates], chosen: Chosen, measured: Callable[[Chosen], float]) -> Chosen:
    """Return the scales that measure best, `chosen` itself if no moves help.

    Penalties from the usual one on are tried downwards as long as they help more; if it does not help, upwards until
    one does. `chosen` is measured second: it mostly is the worse, which its first window may tell.
    """
    best, least = chosen, float("inf")

    def made(penalty: float) -> Chosen:
        return {**chosen, **{name: own.made(chosen[name], penalty) for name, own in candidates.items()}}

    def helps(trying: Chosen) -> bool:
        nonlocal best, least
        value = measured(trying)
        if better := value < least:
            best, least = trying, value
        return better

    moves = not _same(trying := made(PENALTY), chosen)
    if moves:
        helps(trying)
    helps(chosen)
    penalty = PENALTY / STEP
    if best is chosen and moves:
        penalty = LEAST / STEP  # moves overshoot: fewer of them
    while penalty >= LEAST and (_same(trying := made(penalty), chosen) or helps(trying)):
        penalty /= STEP
    penalty = PENALTY * STEP
    while best is chosen and penalty <= MOST and not _same(trying := made(penalty), chosen) and not helps(trying):
        penalty *= STEP
    return best


def _same(one: Chosen, other: Chosen) -> bool:
    return all(
        np.array_equal(scales.exponents, other[name].exponents)
        and np.array_equal(scales.negative, other[name].negative)
        for name, scales in one.items()
    )


def _look(
    task: Refinement, chosen: Chosen, trial: Trial, windows: Sequence[int], clock: _Clock
) -> dict[str, _Candidates]:
    """Return the moves of the scales of every space, with the slopes on some windows, over all formats."""
    candidates: dict[str, _Candidates] = {}
    entries = [entry for entry, _ in task.formats]
    signed = {space.name for space in task.spaces if may_turn(space, task.binding, entries)}
    for entry, share in task.formats:
        with trial.rounded(_rounding(task, entry, chosen), task.executor):
            slopes = trial.slopes(windows, partial(clock.tick, BOTH_WAYS))

        def one(space: Space, entry: Format = entry, slopes: Mapping[str, NDArray[np.float32]] = slopes) -> _Candidates:
            found = _Candidates(np.zeros((3, space.size)), np.zeros((3, space.size)))
            for reader in readers_of(space, task.binding, task.checkpoint, task.calibration, slopes):
                _add(reader, entry, chosen[space.name], found)
            return found

        for space, found in zip(task.spaces, task.executor.map(one, task.spaces), strict=True):
            own = candidates.setdefault(space.name, _Candidates(np.zeros_like(found.gain), np.zeros_like(found.cost)))
            own.gain[:] += share * found.gain
            own.cost[:] += share * found.cost
        del slopes, one  # before those of the next format
    for name, own in candidates.items():
        own.gain[0, chosen[name].exponents <= -task.limit] = -np.inf
        own.gain[1, chosen[name].exponents >= task.limit] = -np.inf
        if name not in signed:
            own.gain[2] = -np.inf
    return candidates


def _add(reader: Reader, entry: Format, scales: Scales, found: _Candidates) -> None:
    """Add what one reader gains and pays for every move."""
    from vrscope.rescale.move_kernels import look

    assert reader.slope is not None
    factors = scales.factors(reader.ids, reader.power)
    moves = np.array([2.0 ** (reader.power * step) if step else -1.0 for step in _DIRECTIONS], np.float32)
    sums = np.zeros((2, moves.size, reader.weight.shape[1]))
    kind, top, size, book = unit_parameters(entry, reader.weight.shape[1])
    format_ = (kind, np.float32(top), size, book)
    look(reader.weight, reader.importance, reader.slope, factors, format_, moves, sums[0], sums[1])
    used = reader.ids >= 0
    for move in range(moves.size):
        np.add.at(found.gain[move], reader.ids[used], sums[0, move, used])
        np.add.at(found.cost[move], reader.ids[used], sums[1, move, used])


def _rounding(task: Refinement, entry: Format, chosen: Chosen) -> Rounding:
    """Return how a stored weight is rounded: scaled by the plan, through the format, and scaled back."""
    spaces = {name: scales.exponents.astype(EXPONENT) for name, scales in chosen.items()}
    negative = {name: scales.negative for name, scales in chosen.items() if scales.negative.any()}
    plan = RescalePlan(task.binding.family, "", {}, POW2, spaces, "", negative=negative)
    scales = tensor_scales(task.binding, plan)

    def rounding(name: str, values: Tensor) -> Tensor:
        import torch

        parts = _factors(scales[name]) if name in scales else ()
        for part in parts:
            values = values * part
        rounded = torch.empty_like(values)
        source, target = (tensor.permute(task.binding.roles[name].order) for tensor in (values, rounded))
        for at in np.ndindex(*source.shape[:-2]):
            target[at] = entry.roundtrip(source[at].contiguous())
        for part in parts:
            rounded = rounded / part
        return rounded

    return rounding


def _factors(scale: TensorScale) -> tuple[Tensor, ...]:
    """Return the scales of a tensor as float32 factors that broadcast against it."""
    import torch

    found = [np.ldexp(np.float32(1), exponents) for exponents in scale.exponents]
    found += [np.where(negative, np.float32(-1), np.float32(1)) for negative in scale.negative]
    return tuple(torch.from_numpy(np.ascontiguousarray(factor, np.float32)) for factor in found)
