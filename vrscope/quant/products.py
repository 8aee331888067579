"""Which functions of torch multiply inputs with a weight, and a mode that rounds the inputs of some weights.

Importing this module imports torch, so others do it inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class Product:
    """Where a function takes inputs and weight.

    Attributes
    ----------
    inputs, weight
        Positions among the arguments.
    transposed
        Whether the weight's last dimensions are `(in, out)`.
    batched
        Whether both are stacks of matrices.
    flipped
        Whether inputs and outputs are `(in, tokens)` and `(out, tokens)`.
    """

    inputs: int
    weight: int
    transposed: bool
    batched: bool = False
    flipped: bool = False


_X_W = Product(0, 1, transposed=True)
_W_X = Product(1, 0, transposed=False, flipped=True)
PRODUCTS: dict[Any, tuple[Product, ...]] = {
    linear: (Product(0, 1, transposed=False),),
    torch.addmm: (Product(1, 2, transposed=True),),
    Tensor.addmm: (Product(1, 2, transposed=True),),
    torch.bmm: (Product(0, 1, transposed=True, batched=True),),
    Tensor.bmm: (Product(0, 1, transposed=True, batched=True),),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), (_X_W, _W_X)),
}


class RoundedInputs(TorchFunctionMode):
    """Rounds what is multiplied with one of some weights, whatever module does it: layers, Conv1D, stacked experts.

    Weights are known by their memory, so views of them count: one expert, or one half of a joint matrix.

    Parameters
    ----------
    weights
        Parameters, none of which shares memory with anything else that is multiplied.
    roundtrip
        From the float32 inputs `(tokens, in)` of one product to what they are dequantized to.
    """

    def __init__(self, weights: Sequence[Tensor], roundtrip: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._known = {weight.untyped_storage().data_ptr() for weight in weights if weight.numel()}
        self._roundtrip = roundtrip

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function; if it is a product with one of the weights, round its inputs first."""
        for how in PRODUCTS.get(func, ()):
            if len(args) > max(how.inputs, how.weight) and self._is_known(args[how.weight]):
                rounded = self._rounded(args[how.inputs], how)
                args = (*args[: how.inputs], rounded, *args[how.inputs + 1 :])
                break
        return func(*args, **(kwargs or {}))

    def _is_known(self, weight: Any) -> bool:
        strided = isinstance(weight, Tensor) and weight.layout == torch.strided
        return strided and weight.untyped_storage().data_ptr() in self._known

    def _rounded(self, inputs: Tensor, how: Product) -> Tensor:
        upright = inputs.transpose(-1, -2) if how.flipped else inputs
        matrices = upright.unbind(0) if how.batched else [upright.reshape(-1, upright.shape[-1])]
        rounded = torch.stack([self._roundtrip(matrix.float()).to(inputs.dtype) for matrix in matrices])
        back = rounded.reshape(upright.shape)
        return back.transpose(-1, -2) if how.flipped else back
