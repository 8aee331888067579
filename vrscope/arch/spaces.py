"""Spaces: vectors of scales that leave a checkpoint's function unchanged, and the tensors that follow them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RULES = {"dot": "q.k", "gated": "up.down", "act": "fc1.fc2", "pass": "v.o"}  # named after the operation that ties it
NORM_FOLD, GAIN_PAIR, FREE = "norm fold", "q.k gains", "linear"


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """How one tensor follows one space.

    Attributes
    ----------
    tensor
        Name on disk.
    index
        Integer array that broadcasts against the tensor's shape: which scale multiplies an element, -1 = none.
    power
        The scale's exponent: 1 for the writer of a space, -1 for its reader, -2 behind a squared ReLU.
    stored
        "w", or "1+w" for a gain stored minus one, which a power of two does not keep exact.
    """

    tensor: str
    index: NDArray[np.int32]
    power: int
    stored: str


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """What limits an approximate space: the norms on its input side undo its scale only up to their eps.

    Attributes
    ----------
    eps
        The largest eps of these norms.
    power
        The largest power with which a norm's input follows the scale.
    inputs
        Matrix that writes the space to the gain (and bias) of the norm that feeds it; a matrix that no norm feeds is
        missing.
    one_plus
        Those gains that are stored minus one.
    """

    eps: float
    power: int
    inputs: Mapping[str, tuple[str, ...]]
    one_plus: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """One free vector of scales of a checkpoint.

    Attributes
    ----------
    name
        Path of the layer, then the space: "model.layers.0:v".
    rule
        What ties it: "q.k", "v.o", "up.down", "fc1.fc2", "norm fold", "q.k gains"; of approximate spaces "absorb" or
        "residual".
    layer
        Layer number, None outside the layers.
    size
        Number of free scales.
    shape
        Sizes of the free axes, RoPE pairs counted once; their product is `size`.
    axes
        Names of these axes: g KV group, d channel of a head ("pair" where RoPE ties two), F, E, x.
    terms
        Every tensor that must follow.
    limit
        None if any scale is exact; else what limits it.
    signed
        Whether a scale may be negative: everything between writers and readers is linear, with no ReLU in between.
    """

    name: str
    rule: str
    layer: int | None
    size: int
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    terms: tuple[Term, ...]
    limit: Limit | None = None
    signed: bool = False

    @property
    def exact(self) -> bool:
        """Whether powers of two on this space change no bit of any product: false with 1+w gains."""
        return all(term.stored == "w" for term in self.terms)


def by_tensor(spaces: tuple[Space, ...]) -> dict[str, list[tuple[Space, Term]]]:
    """Return for every tensor the spaces that move it, with the term that says how."""
    found: dict[str, list[tuple[Space, Term]]] = defaultdict(list)
    for space in spaces:
        for term in space.terms:
            found[term.tensor].append((space, term))
    return found
