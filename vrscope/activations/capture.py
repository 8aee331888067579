"""The inputs and outputs of every linear layer of a running model, under the names that the weights have on disk.

While watched, a model runs through a filter that sees each matrix product and knows the weight in it by its place in
memory. One mechanism serves plain layers, transposed ones and stacked experts, whatever code calls them, and nothing
stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from vrscope.activations.matching import Index, Running
from vrscope.arch.roles import LINEAR, OTHER, TensorRole
from vrscope.checkpoint.source import Checkpoint
from vrscope.progress import Progress, silent
from vrscope.quant.layers import quantized_weights
from vrscope.quant.loading import LoadedModel
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Site:
    """One `(out, in)` matrix on disk, as the running model uses it.

    Attributes
    ----------
    tensor
        Name on disk.
    index
        Position along the stored batch dimensions (experts), () for a plain matrix.
    rows
        Which output rows of the stored `(out, in)` slice it is: all of them.
    outputs
        Which columns of the output belong to it: all, unless several stored matrices run as one.
    """

    tensor: str
    index: tuple[int, ...]
    rows: slice = field(hash=False)
    outputs: slice = field(hash=False)

    def matrix(self, stored: Tensor, role: TensorRole) -> Tensor:
        """Return the site's `(rows, in)` view of its tensor as read from disk."""
        return stored.permute(role.order)[self.index][self.rows]


OnLinear = Callable[[tuple[Site, ...], "Tensor", "Tensor"], None]


@dataclass(frozen=True, slots=True)
class SiteMap:
    """Where the linear weights of a checkpoint are in a running model.

    Attributes
    ----------
    sites
        All of them, in the order of the checkpoint.
    unmatched
        Names on disk of linear weights, or parts of them, that no parameter holds; and names in the model of stacked
        experts that hold no linear weight known on disk, as of an architecture that is not declared.
    kept
        Names on disk of those that quantization formats leave alone in a running model, such as routers.
    held
        The running matrices that hold them.
    """

    sites: tuple[Site, ...]
    unmatched: tuple[str, ...]
    kept: frozenset[str]
    held: tuple[tuple[Running, tuple[Site, ...]], ...]


def find_sites(loaded: LoadedModel, checkpoint: Checkpoint, roles: Mapping[str, TensorRole]) -> SiteMap:
    """Return where the linear weights of a checkpoint are in a model made from it; the output head is not among them.

    Parameters
    ----------
    loaded
        From `load_model`.
    checkpoint
        What it was loaded from; each linear weight is read once.
    roles
        Of which those of kind "linear" are looked for, and "other" ones that are matrices, such as projections
        outside the layers.

    Raises
    ------
    CheckpointError
        If a weight cannot be read.
    """
    index, quantized = _running(loaded.model)
    sites: list[Site] = []
    unmatched: list[str] = []
    kept: set[str] = set()
    held: dict[int, tuple[Running, list[Site]]] = {}
    for name, info in checkpoint.tensors.items():
        role = roles.get(name)
        if role is None or not info.is_float or not info.numel or not _is_matrix(role, info.shape):
            continue
        stored = checkpoint.read(name).permute(role.order)
        for at in product(*map(range, stored.shape[:-2])):
            found = index.find(name, at, stored[at])
            if found is None:
                unmatched.append(name)
                continue
            site = Site(name, at, slice(0, stored.shape[-2], 1), found.rows)
            sites.append(site)
            held.setdefault(id(found.running), (found.running, []))[1].append(site)
            if id(found.running.parameter) not in quantized:
                kept.add(name)
    known = {id(running.parameter) for running, _ in held.values()}
    stacks = [weight for weight in quantized_weights(loaded.model) if weight.parameter.ndim == 3]
    unmatched += [weight.name for weight in stacks if id(weight.parameter) not in known]
    pairs = tuple((running, tuple(own)) for running, own in held.values())
    return SiteMap(tuple(sites), tuple(dict.fromkeys(unmatched)), frozenset(kept), pairs)


@contextmanager
def watching(sites: SiteMap, on_linear: OnLinear) -> Iterator[set[Site]]:
    """Call `on_linear(sites, inputs, output)` for each linear layer that any model run inside uses.

    Inputs are `(tokens, in)` and outputs `(tokens, out)`, with the bias if the layer adds it in one step. For an expert
    the rows are the tokens routed to it, or all tokens with rows of zeros for the others if the model runs its experts
    in one product; for other layers row t is position t of the window. Both are the tensors of
    the run itself: with gradients enabled they are part of its graph. The value of the context is the set of sites
    seen so far. Weights may be replaced inside, as `quantized` does, as long as the parameters stay.
    """
    from vrscope.activations.watch import Watch

    with Watch(sites.held, on_linear) as watch:
        yield watch.seen


def run_windows(
    loaded: LoadedModel, sample: TextSample, progress: Progress = silent, stage: str = "activations"
) -> None:
    """Run all windows of a sample through a model, one by one, for what watches it; outputs are dropped.

    Raises
    ------
    ModelError
        If a token is not in the model's vocabulary, or memory runs out.
    """
    done = 0
    for window in sample.windows:
        loaded.run(window)
        done += len(window)
        progress(stage, done, sample.tokens, "tokens")


def _is_matrix(role: TensorRole, shape: tuple[int, ...]) -> bool:
    return role.kind in {LINEAR, OTHER} and {"out", "in"} <= set(role.dims) and len(role.dims) == len(shape)


def _running(model: Any) -> tuple[Index, frozenset[int]]:
    """Return the matrices of a model that can be linear weights, and the ids of the parameters that are quantized."""
    known = {id(weight.parameter): weight.transposed for weight in quantized_weights(model)}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    aside = {id(parameter) for module in tables if module is not None for parameter in module.parameters()}
    index = Index()
    for name, parameter in model.named_parameters():
        if parameter.ndim not in {2, 3} or not parameter.is_floating_point() or id(parameter) in aside:
            continue
        # Of a parameter whose module does not tell, both orientations are tried: the values decide.
        for transposed in [known[id(parameter)]] if id(parameter) in known else [False, True]:
            for at in product(*map(range, parameter.shape[:-2])):
                index.add(Running(name, parameter, at, transposed))
    return index, frozenset(known)
