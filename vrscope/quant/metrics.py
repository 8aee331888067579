"""How far a model's outputs are from a reference's, per token, and the means of that with their standard errors.

Everything is computed in float64 from float32 outputs. Standard errors treat tokens as independent: they are
`std / sqrt(tokens)`, and too small by as much as neighbouring tokens are alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.tables import Column

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
CHUNK_ELEMENTS = 1 << 20  # outputs that are compared at once, so that float64 copies stay small

DAMAGE_COLUMNS: tuple[Column, ...] = (
    Column("checkpoint", "", "Which checkpoint was run."),
    Column("format", "", 'Quantization format of its linear layers except the output head; "none" is unquantized.'),
    Column("tokens", "tokens", "Number of token positions measured."),
    Column("windows", "", "Number of text windows, each run by itself."),
    Column("kl", "nats", "Mean over all positions of KL(original || this), between next-token distributions."),
    Column("kl_sem", "nats", "Standard error of that mean, tokens taken as independent."),
    Column("kl_p50", "nats", "Median of KL over positions."),
    Column("kl_p90", "nats", "90th percentile of KL over positions."),
    Column("kl_p99", "nats", "99th percentile of KL over positions."),
    Column("kl_max", "nats", "Largest KL of any position."),
    Column("top1", "share", "Share of positions whose most likely next token is the original's."),
    Column("top1_sem", "share", "Standard error of that share."),
    Column("perplexity", "", "Exponential of the mean surprise at the text, where the next token is in the window."),
    Column("perplexity_sem", "", "Standard error of the perplexity (delta method)."),
    Column("perplexity_ratio", "", "Perplexity over that of the original, on the same tokens."),
    Column("perplexity_ratio_sem", "", "Standard error of that ratio, paired over tokens (delta method)."),
    Column("relative_error", "", "Encoders: mean over tokens of |h' - h| / |h|, h the last hidden state."),
    Column("relative_error_sem", "", "Standard error of that mean."),
    Column("cosine", "", "Encoders: mean over tokens of the cosine between h' and h."),
    Column("cosine_sem", "", "Standard error of that mean."),
    Column(
        "change",
        "nats",
        "Mean difference of KL (encoders: of the relative error) to the first checkpoint, same format.",
    ),
    Column("change_sem", "nats", "Standard error of that difference, paired over tokens, which count as independent."),
)


@dataclass(frozen=True, slots=True)
class TokenPredictions:
    """Next-token predictions of a causal model beside a reference's, per token.

    Attributes
    ----------
    kl
        KL(reference || model) in nats, one per position.
    same_top
        1 where the most likely token is the same, else 0, one per position.
    surprise
        Negative log-probability of the next token in nats, one per position with a next token in its window.
    """

    kl: Floats
    same_top: Floats
    surprise: Floats


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Hidden states of an encoder beside a reference's, per token.

    Attributes
    ----------
    relative_error
        `|h' - h| / |h|`, one per token.
    cosine
        Between h' and h, one per token.
    """

    relative_error: Floats
    cosine: Floats


def compare_predictions(reference: Tensor, logits: Tensor, window: tuple[int, ...]) -> TokenPredictions:
    """Compare two models' logits for one window.

    Parameters
    ----------
    reference, logits
        float32, `(tokens, vocabulary)`, on the same device.
    window
        The tokens: entry i + 1 is what row i should predict.
    """
    import torch

    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    kl, same_top, surprise = [], [], []
    for first in range(0, len(window), step):
        rows = slice(first, first + step)
        expected = torch.log_softmax(reference[rows].double(), dim=-1)
        found = torch.log_softmax(logits[rows].double(), dim=-1)
        following = torch.tensor(window[first + 1 : first + 1 + step], device=logits.device)
        surprise.append(-found[: len(following)].gather(1, following[:, None])[:, 0])
        share = expected.exp()
        # A token of no probability adds nothing, also where both logits are -inf; below zero is rounding.
        kl.append(share.mul(expected.sub_(found)).where(share != 0, 0.0).sum(-1).clamp_min(0.0))
        same_top.append((reference[rows].argmax(-1) == logits[rows].argmax(-1)).double())
    return TokenPredictions(*(torch.cat(part).cpu().numpy() for part in (kl, same_top, surprise)))


def compare_states(reference: Tensor, states: Tensor) -> TokenStates:
    """Compare two encoders' last hidden states for one window, both float32 `(tokens, hidden)`."""
    import torch

    expected, found = reference.double(), states.double()
    norm = expected.norm(dim=-1)
    relative = (found - expected).norm(dim=-1) / norm
    cosine = torch.einsum("th,th->t", expected, found) / (norm * found.norm(dim=-1))
    return TokenStates(relative.cpu().numpy(), cosine.cpu().numpy())


def damage_row(tokens: Sequence[TokenPredictions | TokenStates], surprise: Floats | None) -> dict[str, float]:
    """Return the figures of one row of the table "damage", NaN where they do not apply.

    Parameters
    ----------
    tokens
        One entry per window.
    surprise
        The original model's surprise at the same tokens, for the paired ratio; None for encoders.
    """
    row = dict.fromkeys((column.name for column in DAMAGE_COLUMNS[2:]), math.nan)
    predictions = [item for item in tokens if isinstance(item, TokenPredictions)]
    states = [item for item in tokens if isinstance(item, TokenStates)]
    if states:
        for name in ("relative_error", "cosine"):
            row[name], row[f"{name}_sem"] = _mean(np.concatenate([getattr(item, name) for item in states]))
    if predictions and surprise is not None:
        kl = np.concatenate([item.kl for item in predictions])
        row["kl"], row["kl_sem"] = _mean(kl)
        quantiles = np.quantile(kl, (0.5, 0.9, 0.99, 1.0))
        row |= dict(zip(("kl_p50", "kl_p90", "kl_p99", "kl_max"), map(float, quantiles), strict=True))
        row["top1"], row["top1_sem"] = _mean(np.concatenate([item.same_top for item in predictions]))
        own = np.concatenate([item.surprise for item in predictions])
        row["perplexity"], row["perplexity_sem"] = _exponential(own)
        row["perplexity_ratio"], row["perplexity_ratio_sem"] = _exponential(own - surprise)
    return row


def token_damage(tokens: Sequence[TokenPredictions | TokenStates]) -> Floats:
    """Return the damage of every token in order: its KL, or the relative error of an encoder's state."""
    parts = [item.kl if isinstance(item, TokenPredictions) else item.relative_error for item in tokens]
    return np.concatenate([np.empty(0), *parts])


def paired_change(damage: Floats, first: Floats) -> dict[str, float]:
    """Return mean and standard error of the difference between two damages of the same tokens."""
    change, sem = _mean(damage - first)
    return {"change": change, "change_sem": sem}


def _mean(values: Floats) -> tuple[float, float]:
    """Return mean and standard error; NaN for no values, and the error NaN for one."""
    if not values.size:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def _exponential(values: Floats) -> tuple[float, float]:
    """Return exp(mean) and its standard error exp(mean) * sem, by the delta method."""
    mean, sem = _mean(values)
    with np.errstate(over="ignore"):
        value = float(np.exp(mean))
    return value, value * sem
