"""A model kept to be tried: what its output loses when its weights are rounded, and the slope of that by every weight.

The importance of `vrscope.activations.importance` is known before anything is rounded and takes errors of different
weights to be unrelated. With all weights rounded at once their errors add up to some shift of the output; the slope at
that point tells for every weight which way it would have to move to undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.activations.backward import add_products, run_backward
from vrscope.activations.capture import Site, SiteMap
from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.executors import Executor, Serial
from vrscope.quant.loading import LoadedModel
from vrscope.quant.spool import Spool
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    from torch import Tensor

_SERIAL = Serial()
Rounding = Callable[[str, "Tensor"], "Tensor"]  # name and float32 values of a stored weight, to what they become


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A model, the text it was calibrated on, and what it said to that.

    Attributes
    ----------
    loaded, checkpoint, roles
        The model, what it was made from, and the roles of what is stored.
    sites
        Where its linear weights are.
    sample
        The text.
    outputs
        Of the model as it is, one matrix per window of the text.
    """

    loaded: LoadedModel
    checkpoint: Checkpoint
    roles: Mapping[str, TensorRole]
    sites: SiteMap
    sample: TextSample
    outputs: Spool = field(default_factory=Spool)

    @contextmanager
    def rounded(self, rounding: Rounding, executor: Executor = _SERIAL) -> Iterator[None]:
        """Replace the linear weights that formats quantize while inside; one more copy of them is held meanwhile.

        `rounding` is called on the threads of the executor.
        """
        parts: dict[str, list[tuple[Tensor, Site]]] = {}
        running = {id(entry.parameter): entry.parameter for entry, _ in self.sites.held}
        originals = {key: parameter.data for key, parameter in running.items()}
        try:
            for parameter in running.values():
                parameter.data = parameter.data.clone()
            for entry, sites in self.sites.held:
                for site in sites:
                    if site.tensor not in self.sites.kept:
                        parts.setdefault(site.tensor, []).append((entry.matrix()[site.outputs], site))

            def replace(name: str) -> None:
                values = rounding(name, self.checkpoint.read(name).float())
                for matrix, site in parts[name]:
                    matrix.copy_(site.matrix(values, self.roles[name]))

            for _ in executor.map(replace, parts):
                pass  # for its errors
            yield
        finally:
            for key, parameter in running.items():
                parameter.data = originals[key]

    def damage(self, windows: Sequence[int]) -> float:
        """Return the damage of the model as it is now on some windows, per token: see `Calibration`.

        It is infinite where outputs are not finite.
        """
        import torch

        total, loss = 0.0, _divergence if self.loaded.causal else _squared_error
        for number in windows:
            output = self.loaded.run(self.sample.windows[number])
            with torch.inference_mode():
                total += float(loss(self.outputs.read(number).to(output.device), output))
        found = total / sum(len(self.sample.windows[number]) for number in windows)
        return found if np.isfinite(found) else float("inf")

    def slopes(self, windows: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Return the first derivative of the damage on some windows by every linear weight, as the weights are now.

        By tensor, oriented as `Calibration.importance`.

        Raises
        ------
        ModelError
            If the output or a slope is not finite.
        """
        import torch

        sums: dict[str, Tensor] = {}
        for name in {site.tensor: None for site in self.sites.sites if site.tensor not in self.sites.kept}:
            blank = torch.empty(self.checkpoint.tensors[name].shape, device="meta")
            sums[name] = torch.zeros(blank.permute(self.roles[name].order).shape)

        def on_linear(used: tuple[Site, ...], inputs: Tensor, output: Tensor) -> None:
            add_products(sums, used, inputs, output, 1)

        tokens = 0
        for number in windows:
            window = self.sample.windows[number]
            reference = self.outputs.read(number).to(self.loaded.device)
            loss = _divergence if self.loaded.causal else _squared_error
            if not np.isfinite(run_backward(self.loaded, self.sites, window, on_linear, _against(loss, reference))):
                raise ModelError(self._not_finite("the output of the rounded model"))
            tokens += len(window)
        found: dict[str, NDArray[np.float32]] = {}
        for name in list(sums):
            found[name] = (sums.pop(name) / tokens).numpy()
            if not np.isfinite(found[name]).all():
                raise ModelError(self._not_finite(name))
        return found

    def _not_finite(self, where: str) -> str:
        return (
            f"{self.loaded.name}: expected finite gradients with rounded weights, found NaN or infinity at {where}. "
            "Leave this step out with --rounds 0."
        )


def _against(loss: Callable[[Tensor, Tensor], Tensor], reference: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: loss(reference, output)


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return the sum over tokens of KL(reference || logits) in nats."""
    import torch

    return torch.nn.functional.kl_div(
        torch.log_softmax(logits, dim=-1), torch.log_softmax(reference, dim=-1), reduction="sum", log_target=True
    )


def _squared_error(reference: Tensor, states: Tensor) -> Tensor:
    """Return the sum over tokens of the squared relative error of states."""
    import torch

    size = reference.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    total: Tensor = ((states - reference) / size).square().sum()
    return total
