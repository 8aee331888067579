"""The residual stream: the hidden state that enters every layer, and its few enormous values.

"Massive activations" (Sun et al. 2024, arXiv 2402.17762) are single values of the hidden state, at few fixed channels
and mostly at the first token, that are larger than the median magnitude by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.activations.channels import ChannelStatistics, ChannelSums, channel_part

if TYPE_CHECKING:
    from torch import Tensor

TOP = 3
_SHIFT = 14  # low bits of a float32 that a bin leaves out: bins are 0.2 % wide
_BINS = 0x80000000 >> _SHIFT
OnState = Callable[[int, "Tensor"], None]


@dataclass(frozen=True, slots=True)
class Peak:
    """One large value: its magnitude, and the window, position in the window and channel where it stands."""

    magnitude: float
    window: int
    position: int
    channel: int


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """The hidden state at one depth.

    Attributes
    ----------
    layer
        The layer it enters, from 0; the number of layers for what leaves the last one.
    statistics
        Per channel and pooled.
    tops
        The largest, second and third largest magnitude of a window, each as mean over windows (as in the paper).
    peak
        The largest value of all windows.
    median
        Median magnitude, to 0.2 %.
    over_100, over_1000
        How many values are more than 100 and 1000 times the median.
    """

    layer: int
    statistics: ChannelStatistics
    tops: tuple[float, ...]
    peak: Peak
    median: float
    over_100: int
    over_1000: int


class ResidualSums:
    """Accumulates one residual stream."""

    def __init__(self, channels: int) -> None:
        self.sums = ChannelSums(channels)
        self._tops: list[NDArray[np.float64]] = []
        self._peak: Peak | None = None
        self._counts = np.zeros(_BINS, np.int64)

    def add(self, window: int, state: Tensor) -> bool:
        """Add a hidden state `(tokens, channels)`; False, and nothing added, if it holds NaN or infinity."""
        part = channel_part(state)
        if part.bad_count:
            return False
        self.sums.add(part)
        magnitudes = state.detach().float().abs().flatten()
        top = magnitudes.topk(min(TOP, magnitudes.numel()))
        self._tops.append(np.pad(top.values.double().cpu().numpy(), (0, TOP - len(top.values)), constant_values=np.nan))
        peak = Peak(float(top.values[0]), window, *divmod(int(top.indices[0]), state.shape[1]))
        self._peak = peak if self._peak is None or peak.magnitude > self._peak.magnitude else self._peak
        bits: NDArray[np.int32] = magnitudes.cpu().numpy().view(np.int32)
        self._counts += np.bincount(bits >> _SHIFT, minlength=_BINS)
        return True

    def stream(self, layer: int) -> ResidualStream:
        """Return what was accumulated."""
        median = self._median()
        over = [int(self._counts[_bin(factor * median) + 1 :].sum()) if median > 0 else 0 for factor in (100, 1000)]
        assert self._peak is not None, "made for a first window"
        tops = tuple(np.mean(self._tops, axis=0).tolist())
        return ResidualStream(layer, self.sums.statistics(), tops, self._peak, median, *over)

    def _median(self) -> float:
        """Return the median magnitude, linear within its bin."""
        total = int(self._counts.sum())
        if not total:
            return float("nan")
        below = np.cumsum(self._counts)
        place = int(np.searchsorted(below, total / 2))
        inside = (total / 2 - (below[place] - self._counts[place])) / self._counts[place]
        low, high = (_edge(place), _edge(place + 1))
        return float(low + inside * (high - low))


def layer_stacks(model: Any) -> list[Any]:
    """Return the outermost lists of modules with matrices in a model, such as its decoder layers."""
    from torch import nn

    found: list[Any] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            if any(parameter.ndim > 1 for parameter in module.parameters()):
                found.append(module)
    return found


@contextmanager
def watching_layers(model: Any, on_state: OnState) -> Iterator[None]:
    """Call `on_state(layer, state)` with the `(tokens, hidden)` state that enters each layer, and that leaves the last.

    Layers are counted from 0, in the order in which they run. Hooks are removed at the end.
    """
    handles = []
    offsets: dict[int, int] = {}  # of the stacks that ran so far: a vision tower may be there and not run

    def entering(stack: Any, number: int) -> Callable[..., None]:
        def hook(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = offsets.setdefault(id(stack), sum(len(other) for other in stacks if id(other) in offsets))
            _report(on_state, first + number, (*arguments, *named.values()))

        return hook

    def leaving(stack: Any) -> Callable[..., None]:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            _report(on_state, offsets[id(stack)] + len(stack), values)

        return hook

    stacks = layer_stacks(model)
    try:
        for stack in stacks:
            for number, layer in enumerate(stack):
                handles.append(layer.register_forward_pre_hook(entering(stack, number), with_kwargs=True))
            handles.append(stack[-1].register_forward_hook(leaving(stack)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _report(on_state: OnState, layer: int, values: tuple[Any, ...]) -> None:
    """Report the first tensor that looks like a hidden state of one window: `(1, tokens, hidden)`."""
    from torch import Tensor

    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[0] == 1:
            on_state(layer, value[0])
            return


def _bin(magnitude: float) -> int:
    return int(np.float32(magnitude).view(np.int32)) >> _SHIFT


def _edge(place: int) -> float:
    return float(np.int32(place << _SHIFT).view(np.float32)) if place < _BINS else float("inf")
