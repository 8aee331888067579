"""Quantization damage of whole models: run them on text, quantized and not, and compare what they predict.

All checkpoints see the same tokens in one run, window by window and never batched, because LLM.int8 decides which
inputs are outliers over everything it is given at once. The reference for every row is the first checkpoint as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.progress import Progress, silent
from vrscope.quant.formats import Format
from vrscope.quant.layers import kept_note, quantized
from vrscope.quant.loading import LoadedModel, load_model, release, resolve_device
from vrscope.quant.memory import require_run_memory
from vrscope.quant.metrics import (
    DAMAGE_COLUMNS,
    Floats,
    TokenPredictions,
    TokenStates,
    compare_predictions,
    compare_states,
    damage_row,
    paired_change,
    token_damage,
)
from vrscope.quant.spool import Spool
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

NOT_QUANTIZED = "none"


@dataclass(frozen=True, slots=True)
class LogitComparison:
    """How two models' outputs for the same text compare: logits, or last hidden states of encoders.

    Attributes
    ----------
    bit_equal
        Whether every output has the same bits in both.
    max_abs_difference
        Largest difference of any output.
    mean_kl
        Mean KL(first || second) in nats over positions, NaN for encoders.
    tokens
        Positions compared.
    dtype
        What the models were run in.
    largest
        Largest magnitude of the first one's outputs.
    """

    bit_equal: bool
    max_abs_difference: float
    mean_kl: float
    tokens: int
    dtype: str
    largest: float = math.nan

    @property
    def relative(self) -> float:
        """The largest difference over the largest output."""
        return self.max_abs_difference / self.largest if self.largest > 0 else self.max_abs_difference


def measure_model(
    checkpoints: Mapping[str, Checkpoint],
    formats: Sequence[Format],
    sample: TextSample,
    *,
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = silent,
) -> pd.DataFrame:
    """Return the table "damage": for each checkpoint a row unquantized and a row per format, columns `DAMAGE_COLUMNS`.

    Causal models: KL and top-1 agreement are over all positions of all windows, perplexity over the positions whose
    next token is in the same window. Encoders: relative error and cosine of the last hidden state, over all tokens.
    Linear weights that a format leaves alone are named in `frame.attrs["notes"]`, a list of sentences.

    The reference's outputs are kept in an unnamed temporary file of 4 * tokens * vocabulary bytes. In memory are one
    model at a time and a second copy of its linear weights.

    Parameters
    ----------
    checkpoints
        Name to checkpoint; the first is the reference. Names appear in the column "checkpoint".
    formats
        Entries of `FORMATS`.
    sample
        From `make_sample`.
    device
        "auto", "cpu" or "cuda".
    dtype
        "float32" or "bfloat16".

    Raises
    ------
    ModelError
        If a model cannot be built or run, or the checkpoints are not of one kind.
    OutputError
        If the disk has no room for the temporary file.
    """
    import pandas as pd

    where = resolve_device(device)
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    surprise: Floats | None = None
    first: dict[Format | None, Floats] = {}  # token by token, to compare later checkpoints with
    with Spool() as spool:
        for name, checkpoint in checkpoints.items():
            require_run_memory(checkpoint, where, dtype, max(map(len, sample.windows)), compared=True)
            loaded = load_model(checkpoint, where, dtype)
            for entry in (None, *formats):
                stage = f"{name}, {entry.name if entry else 'not quantized'}"
                with quantized(loaded.model, entry) if entry else nullcontext():
                    tokens = list(_compared(loaded, spool, sample, stage, progress))
                surprise = _surprise(tokens) if surprise is None else surprise  # the first row is the reference
                damage = token_damage(tokens)
                change = paired_change(damage, first.setdefault(entry, damage))
                rows.append(_row(name, entry, sample, damage_row(tokens, surprise) | change))
                notes.append((entry and kept_note(loaded.model, entry)) or "")
            del loaded
            release()
    frame = pd.DataFrame(rows, columns=[column.name for column in DAMAGE_COLUMNS])
    frame.attrs["notes"] = [note for note in dict.fromkeys(notes) if note]
    return frame


def compare_logits(
    first: Checkpoint,
    second: Checkpoint,
    sample: TextSample,
    *,
    device: str = "auto",
    dtype: str = "float32",
    eps: bool = True,
    progress: Progress = silent,
) -> LogitComparison:
    """Run two checkpoints unquantized on the same windows and compare their outputs bit for bit.

    Parameters
    ----------
    first, second
        Loaded one after the other.
    sample
        From `make_sample`.
    device, dtype
        As in `measure_model`. bfloat16 outputs are compared after conversion to float32, which is one to one.
    eps
        Whether norms add their eps; without it, what they undo only up to eps they undo exactly.

    Raises
    ------
    ModelError
        If a model cannot be built or run, or the two are not of one kind.
    """
    import torch

    where = resolve_device(device)
    with Spool() as spool:
        loaded = load_model(first, where, dtype, eps=eps)
        size = 0.0
        for index, window in enumerate(sample.windows):
            output = loaded.run(window)
            size = float(np.maximum(size, float(output.abs().max())))
            spool.append(output)
            progress(f"running {first.name}", _tokens_until(sample, index), sample.tokens, "tokens")
        del loaded
        release()
        loaded = load_model(second, where, dtype, eps=eps)
        equal, largest, kl = True, 0.0, []
        for index, window in enumerate(sample.windows):
            found = loaded.run(window)
            expected = _reference(loaded, spool, index, found)
            equal = equal and torch.equal(expected.view(torch.int32), found.view(torch.int32))
            # NaN has to win, and Python's max would keep either.
            largest = float(np.maximum(largest, float((expected - found).abs().max())))
            if loaded.causal:
                kl.append(compare_predictions(expected, found, window).kl)
            progress(f"running {second.name}", _tokens_until(sample, index), sample.tokens, "tokens")
    mean_kl = float(np.concatenate(kl).mean()) if kl else math.nan
    return LogitComparison(equal, largest, mean_kl, sample.tokens, dtype, size)


def _row(name: str, entry: Format | None, sample: TextSample, figures: Mapping[str, float]) -> dict[str, object]:
    """Return one row of the table "damage"."""
    sizes = {"tokens": sample.tokens, "windows": len(sample.windows)}
    return {"checkpoint": name, "format": entry.name if entry else NOT_QUANTIZED, **figures, **sizes}


def _surprise(tokens: Sequence[TokenPredictions | TokenStates]) -> Floats:
    """Return the surprise at every token of all windows; empty for encoders."""
    return np.concatenate([np.empty(0), *(item.surprise for item in tokens if isinstance(item, TokenPredictions))])


def _compared(
    loaded: LoadedModel, spool: Spool, sample: TextSample, stage: str, progress: Progress
) -> Iterator[TokenPredictions | TokenStates]:
    """Run all windows and yield each compared with the reference; the first model to run becomes the reference."""
    for index, window in enumerate(sample.windows):
        output = loaded.run(window)
        if index == len(spool):
            spool.append(output)
        reference = _reference(loaded, spool, index, output)
        yield compare_predictions(reference, output, window) if loaded.causal else compare_states(reference, output)
        progress(stage, _tokens_until(sample, index), sample.tokens, "tokens")


def _reference(loaded: LoadedModel, spool: Spool, index: int, output: Tensor) -> Tensor:
    """Return the reference's output for a window, on the device of `output`."""
    if spool.shapes[index] != tuple(output.shape):
        message = (
            f"{loaded.name}: expected outputs of shape {spool.shapes[index]} like the original's, found "
            f"{tuple(output.shape)}. Compare checkpoints of the same model."
        )
        raise ModelError(message)
    return spool.read(index).to(output.device)


def _tokens_until(sample: TextSample, index: int) -> int:
    """Return how many tokens the windows up to number `index` hold."""
    return sum(len(window) for window in sample.windows[: index + 1])
