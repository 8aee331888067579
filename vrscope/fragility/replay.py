"""Running a model without the layers in front of a changed weight: their outputs are known from the reference run.

While a model runs as it is, the output of every call of a decoder layer is kept. A later run in which only weights used
at call p or later differ has the same inputs and outputs at all calls before p, so these return what was kept. Nothing
is assumed of a family but that its layers are modules of one list which keep no state, and that is tried before it is
relied on: `Replay.prove` compares replays with whole runs bit by bit, and where they differ every run is a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vrscope.quant.layers import QuantizedWeight
from vrscope.quant.loading import LoadedModel
from vrscope.quant.memory import free_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHE_BYTES, CACHE_SHARE = 4 << 30, 4  # kept outputs: at most that, and a quarter of what is free
_PROOF_TOKENS = 32


@dataclass(slots=True)
class Tape:
    """The calls of the layers in one run of one window: which layer, and what it returned."""

    places: list[int] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    size_bytes: int = 0


@dataclass(slots=True)
class Replay:
    """A model with the tapes of its reference run.

    Attributes
    ----------
    loaded
        The model; the reference run is made with its weights as they are.
    layers
        The modules whose calls are kept; none if the model has no list of layers.
    tapes
        One per window, None where the window is run whole.
    room_bytes
        How much may be kept; windows beyond that are run whole.
    """

    loaded: LoadedModel
    layers: tuple[nn.Module, ...]
    tapes: list[Tape | None] = field(default_factory=list)
    room_bytes: int = CACHE_BYTES

    @classmethod
    def of(cls, loaded: LoadedModel, weights: Sequence[QuantizedWeight]) -> Replay:
        """Return a replay of the longest list of layers that holds such weights, switched off if it cannot be exact."""
        replay = cls(loaded, _find_layers(loaded.model, weights))
        free = free_memory(loaded.device)
        replay.room_bytes = min(CACHE_BYTES, CACHE_BYTES if free is None else free // CACHE_SHARE)
        return replay if replay.layers and replay.prove() else cls(loaded, ())

    @property
    def calls(self) -> int:
        """Number of layer calls in a run, 0 if every run is a whole one."""
        return max((len(tape.places) for tape in self.tapes if tape), default=0)

    def reference(self, window: tuple[int, ...]) -> Tensor:
        """Run the next window with the model as it is, and keep what the layers return."""
        room = self.room_bytes - sum(tape.size_bytes for tape in self.tapes if tape)
        tape = Tape() if self.layers and room > 0 else None
        if tape is None:
            output = self.loaded.run(window)
        else:
            with self._recorded(tape):
                output = self.loaded.run(window)
            tape = tape if tape.size_bytes <= room else None
        self.tapes.append(tape)
        return output

    def run(self, index: int, window: tuple[int, ...], first: int) -> Tensor:
        """Run window number `index` with the calls before number `first` returning what they returned before."""
        tape = self.tapes[index]
        if tape is None or first == 0:
            return self.loaded.run(window)
        with self._replayed(tape, first):
            return self.loaded.run(window)

    def first_call(self, weights: Sequence[QuantizedWeight]) -> int:
        """Return the first layer call that can use one of these weights, 0 if that is not known."""
        tape = next((tape for tape in self.tapes if tape), None)
        if tape is None:
            return 0
        wanted = {id(weight.parameter) for weight in weights}
        inside = [{id(parameter) for parameter in layer.parameters()} & wanted for layer in self.layers]
        if set().union(*inside) != wanted:
            return 0
        return next((call for call, place in enumerate(tape.places) if inside[place]), 0)

    def prove(self) -> bool:
        """Return whether replays of a short run give the bits of the whole run, from several calls on."""
        import torch

        ids = tuple(range(1, 1 + min(_PROOF_TOKENS, self.loaded.model.get_input_embeddings().weight.shape[0] - 1)))
        trial = Replay(self.loaded, self.layers)
        try:
            expected = trial.reference(ids)
            trial.reference(ids[::-1])  # so that whatever layers may keep to themselves is of another text
            if trial.tapes[0] is None or not trial.calls:
                return False
            starts = {1, trial.calls // 2, trial.calls - 1, trial.calls}
            return all(torch.equal(trial.run(0, ids, first), expected) for first in starts)
        except Exception:  # whatever a model's own code raises when a layer is left out
            return False

    @contextmanager
    def _recorded(self, tape: Tape) -> Iterator[None]:
        def wrap(place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*arguments: Any, **keywords: Any) -> Any:
                output = forward(*arguments, **keywords)
                tape.places.append(place)
                tape.outputs.append(_copy(output))
                tape.size_bytes += _size(output)
                return output

            return record

        with self._wrapped(wrap):
            yield

    @contextmanager
    def _replayed(self, tape: Tape, first: int) -> Iterator[None]:
        calls = iter(range(len(tape.places)))

        def wrap(place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def replay(*arguments: Any, **keywords: Any) -> Any:
                call = next(calls)
                if tape.places[call] != place:
                    message = "layers were called in another order than before"
                    raise RuntimeError(message)
                return _copy(tape.outputs[call]) if call < first else forward(*arguments, **keywords)

            return replay

        with self._wrapped(wrap):
            yield

    @contextmanager
    def _wrapped(self, wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        own = [layer.__dict__.get("forward") for layer in self.layers]  # a hooking library may have put one there
        try:
            for place, layer in enumerate(self.layers):
                layer.forward = wrap(place, layer.forward)
            yield
        finally:
            for layer, before in zip(self.layers, own, strict=True):
                layer.__dict__.pop("forward", None)
                if before is not None:
                    layer.forward = before


def _find_layers(model: Any, weights: Sequence[QuantizedWeight]) -> tuple[nn.Module, ...]:
    """Return the modules of the list that holds most of these weights, none if no list holds two modules."""
    from torch import nn

    wanted = {id(weight.parameter) for weight in weights}
    best: tuple[int, tuple[nn.Module, ...]] = (0, ())
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            held = len({id(parameter) for parameter in module.parameters()} & wanted)
            if held > best[0]:  # of nested lists the outer one, which comes first
                best = held, tuple(dict.fromkeys(module))
    return best[1]


def _copy(value: Any) -> Any:
    """Return a copy whose tensors no later operation in place can reach."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_copy(item) for item in value)
    if value is None:
        return None
    message = f"layers return {type(value).__name__}, which is not kept"
    raise TypeError(message)


def _size(value: Any) -> int:
    import torch

    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size(item) for item in value) if isinstance(value, tuple | list) else 0
