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
from vrscope.activations.buffers import oriented_shapes, zeros_together
from vrscope.activations.capture import Site, SiteMap
from vrscope.activations.losses import Loss, divergence, squared_error
from vrscope.activations.variants import varied
from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.executors import Executor, Serial
from vrscope.quant.loading import LoadedModel
from vrscope.quant.spool import Spool
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    from torch import Generator, Tensor

_SERIAL = Serial()
Rounding = Callable[[str, "Tensor"], "Tensor"]  # name and float32 values of a stored weight, to what they become


def _nobody() -> None:
    """Take no notice."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A model, the text it was calibrated on, and what it said to that.

    Attributes
    ----------
    loaded, checkpoint, roles
        The model, what it was made from, and the roles of what is stored.
    sites
        Where its linear weights are.
    sample, variants
        The text, and the windows that were added; numbers of windows run on from one to the other.
    outputs
        Of the model as it is, one matrix per window.
    copies
        Memory for weights that are rounded, by parameter; made when first needed, and kept.
    """

    loaded: LoadedModel
    checkpoint: Checkpoint
    roles: Mapping[str, TensorRole]
    sites: SiteMap
    sample: TextSample
    variants: list[tuple[int, ...]] = field(default_factory=list)
    outputs: Spool = field(default_factory=Spool)
    copies: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def rounded(self, rounding: Rounding, executor: Executor = _SERIAL) -> Iterator[None]:
        """Replace the linear weights that formats quantize while inside.

        `rounding` is called on the threads of the executor. One more copy of the weights is held from then on, until
        `copies` is cleared; this does not nest.
        """
        parts: dict[str, list[tuple[Tensor, Site]]] = {}
        running = {id(entry.parameter): entry.parameter for entry, _ in self.sites.held}
        originals = {key: parameter.data for key, parameter in running.items()}
        try:
            for key, parameter in running.items():
                parameter.data = self._copy(key, parameter.data)
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

    def _copy(self, key: int, values: Tensor) -> Tensor:
        import torch

        if key not in self.copies:
            self.copies[key] = torch.empty_like(values)
        return self.copies[key].copy_(values)

    def draw(self, windows: Sequence[int], generator: Generator) -> list[tuple[int, ...]]:
        """Return a variant of each of some windows, as `varied` makes them; the model has to predict tokens."""
        return [varied(self._window(number), self.outputs.read(number), generator) for number in windows]

    def add(self, variants: Sequence[tuple[int, ...]], told: Callable[[], None] = _nobody) -> list[int]:
        """Add windows, with what the model says to them as it is now, and return their numbers; `told` after each.

        Those to which it says infinity, or nothing that is a number, are left out; minus infinity rules a token out.
        """
        import torch

        numbers = []
        for variant in variants:
            output = self.loaded.run(variant)
            if float(output.sum(dtype=torch.float64)) < float("inf"):
                numbers.append(len(self.outputs))
                self.outputs.append(output)
                self.variants.append(variant)
            told()
        return numbers

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget what the model said to some windows, whose numbers are not used any more."""
        for number in numbers:
            self.outputs.drop(number)

    def losses(self, windows: Sequence[int]) -> NDArray[np.float64]:
        """Return the damage of the model as it is now at every token of some windows: see `Calibration`.

        It is infinite where outputs are not finite.
        """
        import torch

        found = []
        for number in windows:
            output = self.loaded.run(self._window(number))
            with torch.inference_mode():
                reference = self.outputs.read(number).to(self.loaded.device)
                found.append(self._loss(reference)(output, None).double().cpu().numpy())
        losses = np.concatenate(found)
        losses[np.isnan(losses)] = np.inf
        return losses

    def slopes(self, windows: Sequence[int], told: Callable[[], None] = _nobody) -> dict[str, NDArray[np.float32]]:
        """Return the first derivative of the damage on some windows by every linear weight, as the weights are now.

        By tensor, oriented as `Calibration.importance`; `told` after each window.

        Raises
        ------
        ModelError
            If the output or a slope is not finite.
        """
        names = (site.tensor for site in self.sites.sites if site.tensor not in self.sites.kept)
        sums = zeros_together(oriented_shapes(self.checkpoint, self.roles, names))

        def on_linear(used: tuple[Site, ...], inputs: Tensor, output: Tensor) -> None:
            add_products(sums, used, inputs, output, 1)

        tokens, memory = 0, None
        for number in windows:
            window = self._window(number)
            memory = self.outputs.read(number, memory)
            reference = memory.to(self.loaded.device)
            if not np.isfinite(
                run_backward(self.loaded, self.sites, window, on_linear, self._loss(reference), reference)
            ):
                raise ModelError(self._not_finite("the output of the rounded model"))
            tokens += len(window)
            told()
        found: dict[str, NDArray[np.float32]] = {}
        for name, total in sums.items():
            found[name] = total.div_(tokens).numpy()
            if not np.isfinite(found[name]).all():
                raise ModelError(self._not_finite(name))
        return found

    def _window(self, number: int) -> tuple[int, ...]:
        given = self.sample.windows
        return given[number] if number < len(given) else self.variants[number - len(given)]

    def _loss(self, reference: Tensor) -> Loss:
        """Return the loss against what the model as it is said."""
        return (divergence if self.loaded.causal else squared_error)(reference)

    def _not_finite(self, where: str) -> str:
        return (
            f"{self.loaded.name}: expected finite gradients with rounded weights, found NaN or infinity at {where}. "
            "Leave this step out with --rounds 0."
        )
