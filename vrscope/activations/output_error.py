"""How far the output of every linear layer is off when its weight alone is quantized, on real inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vrscope.activations.capture import Site, find_sites, run_windows, watching
from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint
from vrscope.progress import Progress, silent
from vrscope.quant.formats import Format
from vrscope.quant.loading import LoadedModel
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "errors of layer outputs"


def output_errors(
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    formats: Sequence[Format],
    sample: TextSample,
    progress: Progress = silent,
) -> dict[tuple[str, str], float]:
    """Return the relative output error of every linear weight in every format.

    That is the root of sum |(W - Q(W)) x|^2 over sum |W x|^2, over the tokens x of a text and, for stacks, over
    all experts. Inputs are those of the unquantized model and stay in floating point, biases count for nothing.

    Returns
    -------
    dict
        `(tensor, format)` to the error; NaN for a weight that no token reached is left out.
    """
    sites = find_sites(loaded, checkpoint, roles)
    sums: dict[tuple[str, str], list[float]] = {}
    known: dict[Site, list[Tensor]] = {}

    def on_linear(used: tuple[Site, ...], inputs: Tensor, output: Tensor) -> None:
        del output
        rows = inputs.detach().float()
        for site in used:
            if site.tensor in sites.kept or not rows.shape[0]:
                continue
            if site not in known:
                stored = checkpoint.read(site.tensor)
                weight = site.matrix(stored, roles[site.tensor]).float().contiguous().to(rows.device)
                known[site] = [weight, *(weight - entry.roundtrip(weight) for entry in formats)]
            power = float((rows @ known[site][0].T).square().sum())
            for entry, error in zip(formats, known[site][1:], strict=True):
                total = sums.setdefault((site.tensor, entry.name), [0.0, 0.0])
                total[0] += float((rows @ error.T).square().sum())
                total[1] += power
            if len(sample.windows) == 1:
                del known[site]  # used once

    with watching(sites, on_linear):
        run_windows(loaded, sample, progress, STAGE)
    return {key: (error / power) ** 0.5 for key, (error, power) in sums.items() if power > 0}
