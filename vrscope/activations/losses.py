"""What a model's output loses, token by token, and the gradient of the sum, for both kinds of output.

Rows are taken a few at a time: the outputs of a language model are larger than the caches, and what is made of them on
the way would each time be new memory as large. The gradients are written down here, as each is a difference of
probabilities or of states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

_CHUNK_ELEMENTS = 1 << 21

Loss = Callable[["Tensor", "Tensor | None"], "Tensor"]
"""From a float32 output, `(tokens, vocabulary)` or `(tokens, hidden)`, to what every token loses, `(tokens,)`; if a
second tensor of the shape of the output is given, it is filled with the gradient of the sum; it may be the one that the
loss compares with, which then is lost."""


def drawn(generator: Generator) -> Loss:
    """Return the surprise in nats of labels that are drawn from the model's own predictions."""

    def loss(logits: Tensor, gradient: Tensor | None) -> Tensor:
        import torch

        losses, numbers = [], torch.rand((len(logits), 1), generator=generator).to(logits.device)
        for part in _parts(logits):
            predicted = torch.softmax(logits[part], dim=-1)
            labels = draw(predicted, numbers[part])
            chance = predicted.gather(1, labels)[:, 0].clamp_min(torch.finfo(torch.float32).tiny)
            losses.append(-chance.log())
            if gradient is not None:
                gradient[part] = predicted.scatter_add_(1, labels, torch.full_like(predicted[:, :1], -1))
        return torch.cat(losses)

    return loss


def draw(predicted: Tensor, numbers: Tensor) -> Tensor:
    """Return one label per row of probabilities, drawn with numbers in [0, 1); both of shape `(tokens, 1)`.

    By one number per row and running sums: `torch.multinomial` draws a number for every word of the vocabulary.
    """
    import torch

    reached = predicted.cumsum(dim=-1)
    return torch.searchsorted(reached, numbers * reached[:, -1:], right=True).clamp_(max=reached.shape[-1] - 1)


def projected(generator: Generator) -> Loss:
    """Return a random projection whose squared change is, in the mean, twice the squared relative error of states."""

    def loss(states: Tensor, gradient: Tensor | None) -> Tensor:
        import torch

        direction = torch.randn(states.shape, generator=generator).to(states.device)
        direction *= 2**0.5 / _sizes(states)
        if gradient is not None:
            gradient.copy_(direction)
        return direction.mul_(states).sum(dim=1)

    return loss


def divergence(reference: Tensor) -> Loss:
    """Return KL(reference || output) in nats, both given as logits."""

    def loss(logits: Tensor, gradient: Tensor | None) -> Tensor:
        import torch

        losses = []
        for part in _parts(logits):
            expected = torch.log_softmax(reference[part], dim=-1)
            found = torch.log_softmax(logits[part], dim=-1)
            share = expected.exp()
            # A token of no probability adds nothing, also where both logits are -inf.
            losses.append(expected.sub_(found).mul_(share).masked_fill_(share == 0, 0.0).sum(dim=1))
            if gradient is not None:
                torch.sub(found.exp_(), share, out=gradient[part])
        return torch.cat(losses)

    return loss


def squared_error(reference: Tensor) -> Loss:
    """Return the squared relative error of states."""

    def loss(states: Tensor, gradient: Tensor | None) -> Tensor:
        error = (states - reference) / _sizes(reference)
        if gradient is not None:
            gradient.copy_(2 * error / _sizes(reference))
        return error.square().sum(dim=1)

    return loss


def _parts(logits: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return (slice(first, first + step) for first in range(0, len(logits), step))


def _sizes(states: Tensor) -> Tensor:
    """Return the length of every row, `(tokens, 1)`."""
    import torch

    sizes: Tensor = states.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return sizes
