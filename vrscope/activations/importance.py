"""How much the output minds an error of each weight, measured with gradients on a calibration text.

To second order the damage of a weight error e is half of e' F e, with F the Fisher information of the predictions.
Its diagonal is the mean over tokens of (g x)^2 for the weight's input x and the gradient g at its output, with labels
drawn from the model itself, and half of sum(F e^2) then is the mean KL in nats (Martens 2020, arXiv 1412.1193,
sections 5 and 9). One pass forwards and one backwards give it for all weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.activations.backward import add_products, run_backward
from vrscope.activations.buffers import oriented_shapes, zeros_together
from vrscope.activations.capture import Site, SiteMap, find_sites
from vrscope.activations.losses import drawn, projected
from vrscope.activations.profile import profile_activations
from vrscope.activations.trial import Trial
from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.progress import Progress, silent
from vrscope.quant.loading import LoadedModel, fuse_attention, load_model, release, resolve_device
from vrscope.quant.memory import require_calibration_memory
from vrscope.quant.spool import Spool
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    from torch import Generator, Tensor

HELD_OUT_SHARE = 4  # one window in so many is held out
SEED = 0  # of the labels that are drawn
_PROBE = 64  # tokens on which attention in one step has to say the same


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What a text tells of every linear weight.

    Attributes
    ----------
    importance, held_out
        By tensor, oriented `(..., out, in)` with batch dimensions such as experts in front: the second derivative of
        the damage by each weight, from the windows to search on and from those held out. The damage is the mean KL per
        token in nats, for encoders the mean squared relative error of the last hidden state. One text window serves as
        both.
    absmax
        By tensor: largest magnitude of each input channel over all windows, `(..., in)`.
    tokens, held_out_tokens
        How many tokens the two are from.
    causal
        Whether damage is KL.
    text
        Name of the text.
    unseen
        Linear weights that no token reached, or that the running model does not use by themselves.
    trial
        The model and what it said to the text, if it was to be kept; for encoders, if there are two windows at least.
    """

    importance: Mapping[str, NDArray[np.float32]]
    held_out: Mapping[str, NDArray[np.float32]]
    absmax: Mapping[str, NDArray[np.float64]]
    tokens: int
    held_out_tokens: int
    causal: bool
    text: str
    unseen: tuple[str, ...]
    trial: Trial | None = None


def calibrate(
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    sample: TextSample,
    progress: Progress = silent,
    keep: bool = False,
) -> Calibration:
    """Run a text forwards and backwards through a model and return how important each linear weight is.

    Every fourth window, and the last, are held out. Labels are drawn with a fixed seed. With `keep` the model and its
    outputs, which go to a temporary file, are part of the result.

    Raises
    ------
    ModelError
        If memory would not suffice, or an activation or a gradient is not finite.
    """
    import torch

    keep = keep and (loaded.causal or len(sample.windows) > 1)
    require_calibration_memory(checkpoint, loaded.device, sample.window, tried=keep)
    sites = find_sites(loaded, checkpoint, roles)
    quantized = [site for site in sites.sites if site.tensor not in sites.kept]
    shapes = oriented_shapes(checkpoint, roles, (site.tensor for site in quantized))
    parts = [_Sums.of(shapes) for _ in range(2 if len(sample.windows) > 1 else 1)]
    absmax = {name: np.zeros((*shape[:-2], shape[-1])) for name, shape in shapes.items()}
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    trial = Trial(loaded, checkpoint, roles, sites, sample) if keep else None
    done = 0
    for number, window in enumerate(sample.windows):
        held = len(parts) > 1 and (number % HELD_OUT_SHARE == HELD_OUT_SHARE - 1 or number == len(sample.windows) - 1)
        if not _one_window(loaded, sites, window, (parts[held], absmax), generator, trial.outputs if trial else None):
            profile_activations(loaded, checkpoint, roles, sample, sites=sites)  # says where that begins
            raise ModelError(_not_finite(loaded.name, "the output"))
        parts[held].tokens += len(window)
        done += len(window)
        progress("calibrating", done, sample.tokens, "tokens")
    seen = parts[0].seen | parts[-1].seen
    unseen = tuple(dict.fromkeys([site.tensor for site in quantized if site not in seen] + list(sites.unmatched)))
    tables = [part.mean(checkpoint.name) for part in parts]
    return Calibration(
        tables[0],
        tables[-1],
        absmax,
        parts[0].tokens,
        parts[-1].tokens,
        loaded.causal,
        sample.name,
        unseen,
        trial,
    )


def calibrate_checkpoint(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    sample: TextSample,
    device: str,
    progress: Progress = silent,
    keep: bool = False,
) -> Calibration:
    """Load a checkpoint's model, calibrate it as `calibrate` does, and let go of the model unless it is to be kept.

    Attention is computed in one step where that is possible.
    """
    loaded = load_model(checkpoint, resolve_device(device), "float32", copies=1)
    fuse_attention(loaded, sample.windows[0][:_PROBE])
    try:
        return calibrate(loaded, checkpoint, roles, sample, progress, keep)
    finally:
        del loaded
        release()


@dataclass(slots=True)
class _Sums:
    """Sums over tokens of (g x)^2."""

    sums: dict[str, Tensor]
    seen: set[Site]
    tokens: int = 0

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> _Sums:
        return cls(zeros_together(shapes), set())

    def mean(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Return the sums over the number of tokens, in the same memory."""
        found = {}
        for tensor, total in self.sums.items():
            values: NDArray[np.float32] = total.div_(max(self.tokens, 1)).numpy()
            if not np.isfinite(values).all():
                raise ModelError(_not_finite(name, tensor))
            found[tensor] = values
        return found


def _not_finite(name: str, where: str) -> str:
    return (
        f"{name}: expected finite outputs and gradients, found NaN or infinity at {where}. The model's activations "
        "overflow on this text; `vrscope analyze` says where that begins."
    )


def _one_window(
    loaded: LoadedModel,
    sites: SiteMap,
    window: tuple[int, ...],
    into: tuple[_Sums, Mapping[str, NDArray[np.float64]]],
    generator: Generator,
    outputs: Spool | None,
) -> bool:
    """Run one window both ways and add what it tells to the sums and the largest magnitudes, if the loss is finite.

    Returns
    -------
    bool
        Whether it is.
    """
    part, absmax = into

    def on_linear(used: tuple[Site, ...], inputs: Tensor, output: Tensor) -> None:
        wanted = [site for site in used if site.tensor in part.sums]
        if not wanted or not inputs.shape[0]:
            return
        top = inputs.detach().float().abs().amax(dim=0).double().cpu().numpy()
        for site in wanted:
            np.maximum(absmax[site.tensor][site.index], top, out=absmax[site.tensor][site.index])
            part.seen.add(site)
        add_products(part.sums, used, inputs, output, 2)

    loss = (drawn if loaded.causal else projected)(generator)

    def spooled(output: Tensor, gradient: Tensor | None) -> Tensor:
        if outputs is not None:
            outputs.append(output)
        return loss(output, gradient)

    return math.isfinite(run_backward(loaded, sites, window, on_linear, spooled))
