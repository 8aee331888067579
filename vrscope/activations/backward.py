"""One window through a running model forwards and backwards, for what watches its linear layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vrscope.activations.capture import OnLinear, Site, SiteMap, watching
from vrscope.activations.losses import Loss
from vrscope.quant.loading import LoadedModel, limits_named

if TYPE_CHECKING:
    from torch import Tensor


def run_backward(
    loaded: LoadedModel,
    sites: SiteMap,
    window: tuple[int, ...],
    on_linear: OnLinear,
    loss: Loss,
    memory: Tensor | None = None,
) -> float:
    """Run one window both ways and return its loss; if that is not finite, nothing is run backwards.

    Parameters
    ----------
    loaded, sites
        The model, and where its linear weights are.
    window
        The tokens.
    on_linear
        As in `watching`; a hook registered on the output gets its gradient `(tokens, out)`.
    loss
        Of the output.
    memory
        Where its gradient by the output is written, float32 and of the shape of the output; what `loss` compares with
        may lie there.

    Raises
    ------
    ModelError
        If memory runs out, or the model has too few positions.
    """
    import torch

    def differentiable(module: object, arguments: object, output: Tensor) -> Tensor:
        del module, arguments
        return output.detach().requires_grad_(True)

    handle = loaded.model.get_input_embeddings().register_forward_hook(differentiable)
    ids = torch.tensor([window], device=loaded.device)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with limits_named(loaded.name, len(window)), torch.enable_grad(), watching(sites, on_linear):
            if loaded.causal:
                output = loaded.model(**arguments, use_cache=False).logits.float()
            else:
                output = loaded.model(**arguments).last_hidden_state.float()
            gradient = torch.empty_like(output) if memory is None else memory[None]
            with torch.no_grad():
                found = float(loss(output[0], gradient[0]).sum(dtype=torch.float64))
            if math.isfinite(found):
                output.backward(gradient)  # from all of it: from a part, zeros as large would be made first
    finally:
        handle.remove()
    return found


def add_products(
    sums: Mapping[str, Tensor], used: tuple[Site, ...], inputs: Tensor, output: Tensor, power: int
) -> None:
    """Once the gradient g of a linear output arrives, add the sum over tokens of (g x)^power for every weight.

    Parameters
    ----------
    sums
        By tensor, oriented `(..., out, in)`; layers whose tensors are missing are passed over.
    used, inputs, output
        As `watching` shows them.
    power
        1 for the slope by each weight, 2 for its importance.
    """
    wanted = [site for site in used if site.tensor in sums]
    if not wanted or not inputs.shape[0] or not output.requires_grad:
        return
    rows = _raised(inputs.detach(), power)

    def add(gradient: Tensor) -> None:
        for site in wanted:
            slopes, total = _raised(gradient[:, site.outputs], power).T, sums[site.tensor][site.index][site.rows]
            if total.device == rows.device:
                total.addmm_(slopes, rows)  # in one step, without memory for the product
            else:
                total += (slopes @ rows).to(total.device)

    output.register_hook(add)  # type: ignore[no-untyped-call]


def _raised(values: Tensor, power: int) -> Tensor:
    return values.float() if power == 1 else values.float() ** power
