"""The filter that sees every matrix product of a run and recognises the weight in it.

Importing this module imports torch, so `vrscope.activations.capture` does it inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from vrscope.quant.products import PRODUCTS, Product

if TYPE_CHECKING:
    from vrscope.activations.capture import OnLinear, Site
    from vrscope.activations.matching import Running

Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape and strides of a matrix (out, in)
_CASTS = frozenset((Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half))


class Watch(TorchFunctionMode):
    """Tells `on_linear` of every product with a weight of `held`; results are the same to the last bit."""

    def __init__(self, held: Sequence[tuple[Running, tuple[Site, ...]]], on_linear: OnLinear) -> None:
        super().__init__()
        self.seen: set[Site] = set()
        self._held = held
        self._on_linear = on_linear
        self._places: dict[Place, tuple[Running, tuple[Site, ...]]] = {}
        self._casts: Any = WeakTensorKeyDictionary()  # a converted weight to the parameter it was made from
        self._parameters = {id(running.parameter): running.parameter for running, _ in held}
        self._addresses: list[int] = []
        self._moved()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function; if it is a product with a known weight, report it."""
        kwargs = kwargs or {}
        if func in _CASTS:
            result = func(*args, **kwargs)
            if id(args[0]) in self._parameters and result is not args[0]:
                self._casts[result] = args[0]
            return result
        for how in PRODUCTS.get(func, ()):
            if len(args) > max(how.inputs, how.weight) and isinstance(args[how.weight], Tensor):
                if how.batched:
                    found = [self._sites(matrix, how.transposed) for matrix in _stacked(args[how.weight])]
                    if any(found):
                        return self._batched(func, how, args, kwargs, found)
                elif sites := self._sites(args[how.weight], how.transposed):
                    return self._single(func, how, args, kwargs, sites)
        return func(*args, **kwargs)

    def _single(
        self, func: Callable[..., Any], how: Product, args: tuple[Any, ...], kwargs: dict[str, Any], sites: Any
    ) -> Tensor:
        flip = how.flipped
        given = args[how.inputs]
        inputs, replaced = _rows(given, flip)
        if given.requires_grad and torch.is_grad_enabled():  # so that the rows shown are part of the graph
            args = (*args[: how.inputs], replaced, *args[how.inputs + 1 :])
        result = func(*args, **kwargs)
        output, again = _rows(result, flip)
        self._tell(sites, inputs, output)
        # A copy, as the model may go on to add to it in place, which would change what was shown.
        return again.clone() if result.requires_grad else result

    def _batched(
        self, func: Callable[..., Any], how: Product, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any
    ) -> Tensor:
        given = args[how.inputs]
        inputs = given.unbind(0)
        if given.requires_grad and torch.is_grad_enabled():
            args = (*args[: how.inputs], torch.stack(inputs), *args[how.inputs + 1 :])
        result = func(*args, **kwargs)
        outputs = result.unbind(0)
        for sites, matrix, output in zip(found, inputs, outputs, strict=True):
            if sites:
                self._tell(sites, matrix, output)
        return torch.stack(outputs) if result.requires_grad else result

    def _tell(self, sites: tuple[Site, ...], inputs: Tensor, output: Tensor) -> None:
        self.seen.update(sites)
        self._on_linear(sites, inputs, output)

    def _sites(self, weight: Tensor, transposed: bool) -> tuple[Site, ...]:
        """Return the sites that a matrix holds, none if it is not a known weight."""
        if weight.ndim != 2 or weight.layout != torch.strided:
            return ()
        weight = self._casts.get(weight, weight)
        order = (1, 0) if transposed else (0, 1)
        strides, shape = weight.stride(), weight.shape
        place = weight.data_ptr(), tuple(shape[k] for k in order), tuple(strides[k] for k in order)
        found = self._places.get(place)
        # Weights may have been replaced since, and the memory given to something else.
        if found is None or found[0].matrix().data_ptr() != place[0]:
            found = self._places.get(place) if self._moved() else None
        return found[1] if found else ()

    def _moved(self) -> bool:
        """Return whether parameters lie elsewhere than before; if so, take note of where."""
        addresses = [parameter.data_ptr() for parameter in self._parameters.values()]
        if addresses == self._addresses:
            return False
        self._addresses = addresses
        self._places = {}
        for running, sites in self._held:
            matrix = running.matrix()
            self._places[matrix.data_ptr(), tuple(matrix.shape), matrix.stride()] = running, sites
        return True


def _rows(tensor: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    """Return `(..., tokens, channels)`, or `(..., channels, tokens)` if `flip`, as `(tokens, channels)`; and back."""
    upright = tensor.transpose(-1, -2) if flip else tensor
    flat = upright.reshape(-1, upright.shape[-1])
    back = flat.view(upright.shape)
    return flat, back.transpose(-1, -2) if flip else back


def _stacked(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.unbind(0) if weight.ndim == 3 else ()
