"""More text like a given one, made by the model itself.

A few thousand tokens tell little about some hundred thousand scales, and more text is not always there. What a model
predicts is what it has learnt text to be: replacing a token by one that is drawn from the prediction at that place
gives text on which the model works in the same way, with other words. Every variant costs one pass, where text that
is generated token by token would take as many passes as it has tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vrscope.activations.losses import draw

if TYPE_CHECKING:
    from torch import Generator, Tensor

SHARE = 0.5  # of the tokens that are drawn anew: with all of them hardly a pair of neighbours fits
_ROWS = 16  # at a time: what is made of them on the way stays in the caches


def varied(window: tuple[int, ...], logits: Tensor, generator: Generator) -> tuple[int, ...]:
    """Return a window in which about half of the tokens are drawn from what the model predicts there.

    Parameters
    ----------
    window
        Token numbers; the first stays.
    logits
        What the model says to it, of shape `(tokens, vocabulary)`: row *i* predicts token *i + 1*.
    generator
        Of random numbers, on the CPU.
    """
    import torch

    tokens = torch.tensor(window)
    chances, numbers = torch.rand((2, len(window) - 1), generator=generator)
    for rows in torch.split(torch.nonzero(chances < SHARE)[:, 0], _ROWS):
        predicted = torch.softmax(logits[rows].float().cpu(), dim=-1)
        tokens[rows + 1] = draw(predicted, numbers[rows, None])[:, 0]
    return tuple(tokens.tolist())
