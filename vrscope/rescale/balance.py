"""Channel equalization: what one scale multiplies gets the same range on both of its sides.

`cle` looks at weights alone, `smoothquant` at weights and at the inputs they meet. Both take the largest magnitude over
everything that shares a scale, and both treat each space by itself: where a tensor lies in two spaces (the columns of v
behind a norm, its rows before o), the scales of one are chosen as if the other stayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.spaces import GAIN_PAIR, RULES, Space, Term
from vrscope.errors import PlanError
from vrscope.rescale.profile import Profile

if TYPE_CHECKING:
    from vrscope.arch.binding import Binding

Floats = NDArray[np.float64]
Exponents = Mapping[str, Floats]
NOT_CONSECUTIVE = frozenset({RULES["dot"], GAIN_PAIR})  # q and k meet in a product; neither reads what the other writes


class Ranges(Protocol):
    """What a data-free method looks at."""

    @property
    def profile(self) -> Profile:
        """Ranges of the weights."""
        ...

    @property
    def spaces(self) -> tuple[Space, ...]:
        """The spaces that may be scaled."""
        ...


class Calibration(Protocol):
    """The largest magnitude of every input channel of linear weights.

    `absmax` maps the name of a tensor on disk to an array of shape `(in,)`, or `(..., in)` with the tensor's batch axes
    (experts) in front; 0 or NaN where nothing was seen.
    """

    @property
    def absmax(self) -> Mapping[str, Floats]:
        """Largest magnitude of every input channel, by tensor."""
        ...


class Strength(Protocol):
    """The option of `smoothquant`."""

    @property
    def alpha(self) -> float:
        """Share of the spread that moves into the weights, 0 to 1."""
        ...


class Calibrated(Ranges, Protocol):
    """What a method looks at that needs activations."""

    @property
    def binding(self) -> Binding:
        """Roles of the tensors."""
        ...

    @property
    def options(self) -> Strength:
        """Options of the method."""
        ...

    @property
    def calibration(self) -> Calibration | None:
        """Ranges of the inputs, None if no text was run."""
        ...


def cle(situation: Ranges) -> Exponents:
    """Give the writers and the readers of every channel equal ranges, from the weights alone.

    Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, section 4.1): with r the largest magnitude of what
    writes a channel (rows) and of what reads it (columns), `s = (r_reader / r_writer)^(1 / (1 + p))`, p the degree
    between them: the square root, or the cube root behind a squared ReLU. It is meant for layers that follow each
    other: v.o, up.down and fc1.fc2 here, not q.k.

    A norm's gain is no matrix with a range of its own. There the columns of all readers together are brought to their
    geometric mean, `s = (r_reader / mean)^(1 / p)`, so that the range of the space as a whole stays. This spreads the
    inputs as much as it evens the weights: no help where activations are quantized as well.

    Channels that are zero on a side keep the scale 1. One sweep; the original repeats until nothing moves, which takes
    the whole weights and not only their ranges.

    Returns
    -------
    Exponents
        log2 of the scale, by space.
    """
    chosen = {}
    for space in filter(consecutive, situation.spaces):
        writers, readers = (shared_max(space, sign, _weight_range(situation.profile)) for sign in (1, -1))
        if writers is not None and readers is not None:
            degree = power_of(space, 1) + power_of(space, -1)
            chosen[space.name] = _log2_ratio(readers, writers) / degree
        elif readers is not None:
            chosen[space.name] = _less(np.mean, _log2(readers)) / power_of(space, -1)
    return chosen


def smoothquant(situation: Calibrated) -> Exponents:
    """Move the spread of the inputs into the weights that read them, so that 8 bits can hold both.

    SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, equation 4): columns j of the readers are multiplied by
    `t_j = max|x_j|^alpha / max|w_j|^(1 - alpha)` and their input is divided by it; both maxima over all readers that
    share the scale, every query head of a KV group and every expert included. The original moves what norms feed; here
    v.o, up.down and ReLU pairs move as well. All t of a space are divided by their median: the format's own scales
    absorb a factor that all channels share, and so the fewest channels meet the limit on scales. Channels of range zero
    keep the scale 1, and so do spaces of whose readers no input was seen, such as those that only the output head
    reads.

    Returns
    -------
    Exponents
        log2 of the scale, by space: of what writes it, `t^(-1 / p)` with p the power of the readers.

    Raises
    ------
    PlanError
        If there are no activations, alpha is not within 0 to 1, or the shape of an input is not its weight's.
    """
    alpha, calibration = situation.options.alpha, situation.calibration
    if not 0 <= alpha <= 1:
        message = f"alpha: expected 0 (weights alone) to 1 (inputs alone), found {alpha}. The usual value is 0.5."
        raise PlanError(message)
    if calibration is None:
        message = "smoothquant: expected the ranges of activations, found none. Give it text to run the model on."
        raise PlanError(message)
    weights, inputs = _weight_range(situation.profile), _input_range(situation.binding, situation.profile, calibration)
    chosen = {}
    for space in filter(consecutive, situation.spaces):
        seen = shared_max(space, -1, inputs)
        held = shared_max(space, -1, lambda term: None if inputs(term) is None else weights(term))
        if seen is not None and held is not None:
            with np.errstate(invalid="ignore"):
                moved = alpha * _log2(seen) - (1 - alpha) * _log2(held)
            moved[(seen == 0) | (held == 0)] = np.nan  # also where alpha is 0 or 1, and one of them does not count
            chosen[space.name] = -_less(np.median, moved) / power_of(space, -1)
    return chosen


def shared_max(space: Space, sign: int, range_of: Callable[[Term], Floats | None]) -> Floats | None:
    """Return the largest range over everything that shares each scale of a space, shape `(size,)`.

    Parameters
    ----------
    sign
        1 for the writers, -1 for the readers.
    range_of
        The ranges of a term, an array of its index's shape, NaN where not known; None to leave the term out.

    Returns
    -------
    Floats
        None if every term of the side was left out.
    """
    largest = None
    for term in space.terms:
        values = range_of(term) if np.sign(term.power) == sign else None
        if values is not None:
            largest = np.zeros(space.size) if largest is None else largest
            used = (term.index >= 0) & ~np.isnan(values)
            np.maximum.at(largest, term.index[used], values[used])
    return largest


def power_of(space: Space, sign: int) -> int:
    """Return the largest power of the writers (sign 1) or of the readers (-1) of a space, 1 if it has none."""
    return max((abs(term.power) for term in space.terms if np.sign(term.power) == sign), default=1)


def consecutive(space: Space) -> bool:
    """Return whether a space lies between layers that follow each other, and any scale of it is exact."""
    return space.rule not in NOT_CONSECUTIVE and space.limit is None


def _weight_range(profile: Profile) -> Callable[[Term], Floats | None]:
    """Return a function to the largest magnitude of what a term scales; biases and gains have none."""

    def of(term: Term) -> Floats | None:
        return profile.of(term).largest if len(profile.infos[term.tensor].shape) > 1 else None

    return of


def _input_range(binding: Binding, profile: Profile, calibration: Calibration) -> Callable[[Term], Floats | None]:
    """Return a function to the largest magnitude of the inputs that a reader's term scales."""

    def of(term: Term) -> Floats | None:
        absmax = calibration.absmax.get(term.tensor)
        if absmax is None:
            return None
        dims, shape = binding.roles[term.tensor].dims, profile.infos[term.tensor].shape
        batch = tuple(size for what, size in zip(dims, shape, strict=True) if what not in {"out", "in"})
        wanted = (*batch, shape[dims.index("in")])
        if absmax.shape not in {wanted, wanted[-1:]}:
            message = f"{term.tensor}: expected input ranges of shape {wanted}, found {absmax.shape}. Calibrate again."
            raise PlanError(message)
        order = [at for at, what in enumerate(dims) if what not in {"out", "in"}] + [dims.index("in")]
        full = np.expand_dims(np.broadcast_to(absmax, wanted), -1)  # the last is the output dimension
        full = np.moveaxis(full, range(full.ndim), [*order, dims.index("out")])
        over = tuple(at for at, size in enumerate(term.index.shape) if size == 1 and full.shape[at] != 1)
        return np.fmax.reduce(full, axis=over, keepdims=True) if over else full

    return of


def _log2(values: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        found: Floats = np.log2(values)
    return found


def _log2_ratio(top: Floats, bottom: Floats) -> Floats:
    """Return log2(top / bottom), 0 where one of them is 0."""
    with np.errstate(invalid="ignore"):
        found = _log2(top) - _log2(bottom)
    return np.where(np.isfinite(found), found, 0.0)


def _less(middle: Callable[[Floats], np.floating[Any]], exponents: Floats) -> Floats:
    """Return exponents less their mean or median, 0 where they are not finite."""
    finite = np.isfinite(exponents)
    return np.where(finite, exponents - (middle(exponents[finite]) if finite.any() else 0.0), 0.0)
