"""The weights of a running model that a format quantizes, and the model with them quantized for a while.

Quantized are all linear layers but the output head: `nn.Linear`, the transposed `Conv1D` of GPT-2, and the stacked
experts of a mixture, each expert and each half of a joint gate and up matrix by itself. Embeddings, the output head,
norms, biases and routers that are plain parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vrscope.quant import bnb
from vrscope.quant.formats import Format

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One parameter of a running model that formats quantize.

    Attributes
    ----------
    name
        Of the parameter in the model.
    parameter
        `(out, in)`, or `(in, out)` if transposed, with experts in front if there are three dimensions.
    transposed
        Whether the last two dimensions are `(in, out)`.
    joint
        How gate and up share the outputs: "" not at all, "halves" one after the other, "pairs" alternating.
    """

    name: str
    parameter: nn.Parameter
    transposed: bool
    joint: str = ""

    def matrices(self, stored: Tensor) -> Iterator[Tensor]:
        """Yield views of `stored`, shaped like the parameter, as `(out, in)` matrices that are quantized one by one."""
        oriented = stored.transpose(-1, -2) if self.transposed else stored
        for matrix in oriented if oriented.ndim == 3 else [oriented]:
            if self.joint == "halves":
                yield from matrix.chunk(2)
            elif self.joint == "pairs":
                yield matrix[0::2]
                yield matrix[1::2]
            else:
                yield matrix


def quantized_weights(model: Any) -> list[QuantizedWeight]:
    """Return the weights of a transformers model that formats quantize, each once even if layers share it.

    A stack of experts is recognised by the attribute that transformers gives to such modules; three-dimensional
    parameters of other modules are left alone, as their orientation is not known.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kept = {id(parameter) for parameter in _kept(model)}
    found: dict[int, QuantizedWeight] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = cast("nn.Parameter", module.weight)
            transposed = not isinstance(module, nn.Linear)
            found.setdefault(id(weight), QuantizedWeight(f"{path}.weight", weight, transposed))
        elif hasattr(module, "is_transposed"):
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3:
                    stack = QuantizedWeight(f"{path}.{name}", weight, module.is_transposed, _joint(module, name))
                    found.setdefault(id(weight), stack)
    return [weight for key, weight in found.items() if key not in kept]


def kept_note(model: Any, entry: Format) -> str | None:
    """Return one sentence on linear weights that the format leaves unquantized, None if there are none."""
    if entry.replaces_layers and any(weight.parameter.ndim == 3 for weight in quantized_weights(model)):
        return f"{entry.name} leaves the stacked experts unquantized: bitsandbytes has no such layer."
    return None


@contextmanager
def quantized(model: Any, entry: Format, weights: list[QuantizedWeight] | None = None) -> Iterator[None]:
    """Quantize the model's linear weights while inside, and put the original ones back afterwards.

    Weights become their dequantized selves, in the model's dtype; if the format quantizes inputs, so does, in every
    call, what is multiplied with them (of experts only where they run one by one, "eager"). LLM.int8 replaces the
    layers by bitsandbytes' own instead. Memory: one more copy of the weights that are quantized.

    Parameters
    ----------
    model
        A transformers model.
    entry
        The format.
    weights
        Those of `quantized_weights(model)` to quantize; all by default.
    """
    if weights is None:
        weights = quantized_weights(model)
    with _real_layers(model, weights) if entry.replaces_layers else _roundtripped(weights, entry):
        yield


@contextmanager
def _roundtripped(weights: list[QuantizedWeight], entry: Format) -> Iterator[None]:
    originals = [weight.parameter.data for weight in weights]
    # bitsandbytes itself makes what is reported in its name: the compiled loops are tested against one version of it.
    roundtrip = entry.by_engine if entry.engine == "bitsandbytes" else entry.roundtrip
    try:
        for weight, original in zip(weights, originals, strict=True):
            weight.parameter.data = original.clone()
            for matrix in weight.matrices(weight.parameter.data):
                matrix.copy_(roundtrip(matrix.float().contiguous()))
        with _rounded_inputs(weights, entry):
            yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.parameter.data = original


@contextmanager
def _rounded_inputs(weights: list[QuantizedWeight], entry: Format) -> Iterator[None]:
    if entry.inputs is None:
        yield
        return
    from vrscope.quant.products import RoundedInputs

    # Each weight is a copy of its own by now, so that its memory tells it from all others.
    with RoundedInputs([weight.parameter.data for weight in weights], entry.inputs):
        yield


@contextmanager
def _real_layers(model: Any, weights: list[QuantizedWeight]) -> Iterator[None]:
    flat = {id(weight.parameter): weight for weight in weights if weight.parameter.ndim == 2}
    places = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent._modules.items()  # named_children would leave out a layer's second name
        if layer is not None and id(getattr(layer, "weight", None)) in flat
    ]
    made: dict[int, nn.Module] = {}
    try:
        for parent, name, layer in places:
            if id(layer) not in made:
                (matrix,) = flat[id(layer.weight)].matrices(layer.weight.data)
                made[id(layer)] = bnb.int8_linear(matrix.contiguous(), layer.bias)
            setattr(parent, name, made[id(layer)])
        with bnb.quiet():
            yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def _kept(model: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters of embeddings and output head, which stay as they are even if a linear layer shares them."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield from module.parameters()


def _joint(experts: Any, name: str) -> str:
    """Return how a parameter of a stack of experts joins gate and up."""
    if not (name.startswith("gate_up") and getattr(experts, "has_gate", True)):
        return ""
    return "halves" if getattr(experts, "is_concatenated", True) else "pairs"
