"""The damage that quantizing one unit alone does to the model's output, unit after unit.

The reference outputs are computed once and spooled to disk, and so are the outputs of the layers in memory: for a unit
only the layers from its own on are run again. Every finished unit is handed to a journal at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vrscope.errors import ModelError
from vrscope.fragility.journal import Journal
from vrscope.fragility.replay import Replay
from vrscope.fragility.units import Unit
from vrscope.progress import Progress, silent
from vrscope.quant.formats import Format
from vrscope.quant.layers import quantized
from vrscope.quant.loading import LoadedModel
from vrscope.quant.metrics import Floats, compare_states
from vrscope.quant.spool import Spool
from vrscope.quant.text import TextSample
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_CHUNK_ELEMENTS = 1 << 18  # outputs compared at once: their float64 copies stay in the caches
_LARGE = 20.0  # differences of logits from which e^u - 1 - u is no more precise than e^u
EVERYTHING = "(all at once)"  # no tensor can have this name, as module names hold no blanks
SENSITIVITY_COLUMNS: tuple[Column, ...] = (
    Column("rank", "", "1 for the unit that does most damage when it alone is quantized."),
    Column("unit", "", "What was quantized while all the rest stayed as it is."),
    Column("role", "", "Name without layer and expert numbers, if all its tensors share one."),
    Column("layer", "", "Layer number from 0, if all its tensors share one."),
    Column("tensors", "", "Number of weights in the unit."),
    Column("count", "elements", "Number of elements in the unit."),
    Column("size_bytes", "bytes", "Size in the dtype the checkpoint stores."),
    Column("kl", "nats", "Mean over tokens of KL(original || this unit quantized)."),
    Column("kl_sem", "nats", "Standard error of that mean, tokens taken as independent."),
    Column("relative_error", "", "Encoders: mean over tokens of |h' - h| / |h|, h the last hidden state."),
    Column("relative_error_sem", "", "Standard error of that mean."),
    Column("share", "share", "Its part of the sum over units of the KL, or of the squared relative error."),
    Column("cumulative_share", "share", "That part for this unit and all above it."),
    Column("cumulative_size_share", "share", "Part of the bytes of all units that this unit and those above it hold."),
)
ADDITIVITY_COLUMNS: tuple[Column, ...] = (
    Column("what", "", "All units quantized at once, or the sum over units quantized alone."),
    Column("kl", "nats", "KL from the original; of the sum, the sum."),
    Column("kl_sem", "nats", "Standard error; of the sum, as if units were independent."),
    Column("relative_error", "", "Encoders: relative error; of the sum, the root of the sum of squares."),
    Column("relative_error_sem", "", "Standard error of that."),
)


Explain = Callable[[], object]


def no_idea() -> None:
    """Say nothing of where outputs began to be not finite."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one pass over the sample: a whole run, one with every layer call replayed, and the comparison."""

    whole: float
    tail: float
    comparison: float

    def of(self, first: int, calls: int) -> float:
        """Return the seconds of a pass that replays the calls before `first`."""
        share = (calls - first) / calls if calls else 1.0
        return self.tail + (self.whole - self.tail) * share + self.comparison


@dataclass(slots=True)
class Bench:
    """A model with its reference outputs, to be compared with while parts of it are quantized."""

    loaded: LoadedModel
    sample: TextSample
    spool: Spool
    replay: Replay

    @classmethod
    def of(
        cls, loaded: LoadedModel, sample: TextSample, spool: Spool, units: Sequence[Unit], explain: Explain = no_idea
    ) -> Bench:
        """Run the reference and keep what it says.

        Parameters
        ----------
        loaded, sample
            The model as it is, and the text.
        spool
            Where the outputs are kept.
        units
            What will be quantized; none if each measurement is a whole run.
        explain
            Called if an output is not finite; may raise an error that says where that begins.

        Raises
        ------
        ModelError
            If an output of the model as it is is not finite.
        """
        replay = Replay.of(loaded, [weight for unit in units for weight in unit.weights])
        for window in sample.windows:
            output = replay.reference(window)
            if not bool(output.isfinite().all()):
                explain()
                message = (
                    f"{loaded.name}: expected finite outputs of the unquantized model, found NaN or infinity in the "
                    "output alone. Look for it in the output head with `vrscope analyze --weights-only`."
                )
                raise ModelError(message)
            spool.append(output)
        return cls(loaded, sample, spool, replay)

    def damage(self, first: int = 0) -> Floats:
        """Return KL, or for encoders the relative error, of every token of the model as it is now.

        Parameters
        ----------
        first
            Layer calls before this one are known to be as in the reference run.
        """
        found = []
        for index, window in enumerate(self.sample.windows):
            output = self.replay.run(index, window, first)
            reference = self.spool.read(index).to(output.device)
            if self.loaded.causal:
                found.append(divergence(reference, output))
            else:
                found.append(compare_states(reference, output).relative_error)
        return np.concatenate(found)

    def costs(self) -> Costs:
        """Return what a pass over the sample takes, by making three."""
        times = []
        for first in (0, self.replay.calls):
            started = time.monotonic()
            for index, window in enumerate(self.sample.windows):
                self.replay.run(index, window, first)
            times.append(time.monotonic() - started)
        started = time.monotonic()
        self.damage(self.replay.calls)
        return Costs(max(times), min(times), max(0.0, time.monotonic() - started - times[1]))


def divergence(reference: Tensor, logits: Tensor) -> Floats:
    """Return KL(reference || model) in nats for each row of two logits `(tokens, vocabulary)`, float32.

    With d the differences of the logits and p the reference's probabilities, KL = log sum p e^d - sum p d. Taken as
    log(1 + sum p (e^u - 1 - u)) with u = d - sum p d, no large terms cancel, so that p may be rounded to float32.
    """
    import torch

    rows = len(logits)
    if rows == 1:  # torch splits the sum over a single row among its threads, which changes the rounding
        return divergence(reference.expand(2, -1), logits.expand(2, -1))[:1]
    step = max(2, _CHUNK_ELEMENTS // logits.shape[1])
    parts = []
    for first, last in pairwise([*range(0, rows - 1, step), rows]):
        expected, found = reference[first:last], logits[first:last]
        share = torch.softmax(expected, dim=-1).double()
        share /= share.sum(-1, keepdim=True)
        change = found.double().sub_(expected)
        # A token of no probability adds nothing, also where both logits are -inf.
        change.masked_fill_(share == 0, 0.0)
        mean = torch.mul(share, change).sum(-1, keepdim=True)
        change -= mean
        top = change.amax(-1, keepdim=True).clamp_min(0.0)
        values = torch.log1p(torch.expm1(change).sub_(change).mul_(share).sum(-1))
        large = top[:, 0] >= _LARGE  # where e^u would overflow
        if bool(large.any()):
            scaled = torch.log((share * torch.exp(change - top)).sum(-1)) + top[:, 0]
            values = values.where(~large, scaled)
        values = values.clamp_min_(0.0)
        parts.append(values.where(~mean[:, 0].isneginf(), math.inf))  # a possible token became impossible
    divergences: Floats = torch.cat(parts).cpu().numpy()
    return divergences


def measure_units(
    bench: Bench, units: Sequence[Unit], entry: Format, journal: Journal, progress: Progress = silent
) -> float:
    """Measure every unit that the journal lacks, and all of them at once; return the seconds foreseen for the rest.

    Parameters
    ----------
    bench
        Made of the same units.
    units
        In the order of the model.
    entry
        The format.
    journal
        Holds and receives the figures: "damage" and "damage_sem" by unit name, and by `EVERYTHING`.
    progress
        Is told of milliseconds of the foreseen time; its stage states the estimate.
    """
    wanted = [(EVERYTHING, [weight for unit in units for weight in unit.weights])]
    wanted += [(unit.name, unit.weights) for unit in units]
    left = [(name, weights, bench.replay.first_call(weights)) for name, weights in wanted if name not in journal.done]
    if not left:
        return 0.0
    costs = bench.costs()
    works = [round(1000 * costs.of(first, bench.replay.calls)) + 1 for _, _, first in left]
    stage = f"{len(left) - (left[0][0] == EVERYTHING)} units of {len(units)}, about {_duration(sum(works) / 1000)}"
    done = 0
    for (name, weights, first), work in zip(left, works, strict=True):
        progress(stage, done, sum(works), "ms")
        with quantized(bench.loaded.model, entry, weights):
            damage = bench.damage(first)
        sem = float(damage.std(ddof=1) / math.sqrt(damage.size)) if damage.size > 1 else math.nan
        journal.add(name, {"damage": float(damage.mean()), "damage_sem": sem})
        done += work
    progress(stage, done, sum(works), "ms")
    return sum(works) / 1000


def sensitivity_table(units: Sequence[Unit], journal: Journal, causal: bool) -> pd.DataFrame:
    """Return the table "sensitivity": one row per unit, the most damaging first, columns `SENSITIVITY_COLUMNS`."""
    import pandas as pd

    measure, other = ("kl", "relative_error") if causal else ("relative_error", "kl")
    rows = [
        {
            "unit": unit.name,
            "role": unit.role,
            "layer": unit.layer,
            "tensors": len(unit.linears),
            "count": sum(linear.count for linear in unit.linears),
            "size_bytes": sum(linear.size_bytes for linear in unit.linears),
            measure: journal.done[unit.name]["damage"],
            f"{measure}_sem": journal.done[unit.name]["damage_sem"],
            other: math.nan,
            f"{other}_sem": math.nan,
        }
        for unit in units
    ]
    frame = pd.DataFrame(rows).sort_values(measure, ascending=False, kind="stable", ignore_index=True)
    part = additive(frame, measure)
    frame["rank"] = range(1, len(frame) + 1)
    frame["share"] = part / part.sum() if part.sum() > 0 else 0.0
    frame["cumulative_share"] = frame["share"].cumsum()
    frame["cumulative_size_share"] = frame["size_bytes"].cumsum() / frame["size_bytes"].sum()
    return frame[[column.name for column in SENSITIVITY_COLUMNS]].astype({"layer": "Int64"})


def additivity_table(frame: pd.DataFrame, journal: Journal, causal: bool) -> pd.DataFrame:
    """Return the table "additivity": the damage of all units at once beside the sum of their single damages."""
    import pandas as pd

    measure = "kl" if causal else "relative_error"
    values, sems = frame[measure].to_numpy(float), frame[f"{measure}_sem"].to_numpy(float)
    total = float(values.sum()) if causal else float(np.sqrt((values**2).sum()))
    weight = 1.0 if causal else values / total if total else 0.0
    error = float(np.sqrt(np.square(sems * weight).sum()))
    joint = journal.done[EVERYTHING]
    rows = [("all units at once", joint["damage"], joint["damage_sem"]), ("sum of single units", total, error)]
    names = [column.name for column in ADDITIVITY_COLUMNS]
    filled = [{"what": what, measure: value, f"{measure}_sem": sem} for what, value, sem in rows]
    return pd.DataFrame(filled, columns=names).astype(dict.fromkeys(names[1:], float))


def additive(frame: pd.DataFrame, measure: str) -> Floats:
    """Return the damages in the form that adds up over independent errors: KL as it is, relative errors squared."""
    values: Floats = frame[measure].to_numpy(dtype=np.float64)
    return values if measure == "kl" else values**2


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
