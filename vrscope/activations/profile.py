"""What flows through a model on a text: statistics of every linear input and of the residual stream.

In: a loaded model and windows of tokens. Out: an `ActivationProfile`, a plain value. The windows run once; only running
sums are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vrscope.activations.capture import Site, SiteMap, find_sites, watching
from vrscope.activations.channels import ChannelPart, ChannelStatistics, ChannelSums, channel_part
from vrscope.activations.residual import ResidualStream, ResidualSums, watching_layers
from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.progress import Progress, silent
from vrscope.quant.loading import LoadedModel, load_model, release, resolve_device
from vrscope.quant.memory import require_run_memory
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    from torch import Tensor

_MARKS = 256  # values by which an input is recognised as the one of the layer before


@dataclass(frozen=True, slots=True)
class LinearInput:
    """The inputs of one linear weight.

    Attributes
    ----------
    tensor
        Name on disk; of stacked experts, all inputs of all experts together.
    role
        Its role.
    shared_with
        The first tensor that always saw the same inputs, such as q_proj for k_proj; the tensor itself if it is first.
    statistics
        Per channel and pooled; without tokens, all NaN.
    """

    tensor: str
    role: TensorRole
    shared_with: str
    statistics: ChannelStatistics


@dataclass(frozen=True, slots=True)
class ExpertInput:
    """What one expert of a mixture saw: how many tokens, and the largest magnitude in the inputs of its matrices."""

    role: str
    layer: int | None
    expert: int
    tokens: int
    absmax: float


@dataclass(frozen=True, slots=True)
class ActivationProfile:
    """Statistics of the activations of one model on one text.

    Attributes
    ----------
    tokens, windows
        Size of the text.
    inputs
        The linear inputs by tensor, in the order of the checkpoint.
    residual
        The hidden state that enters each layer, and leaves the last.
    experts
        One entry per role, layer and expert of a mixture; with 0 tokens if it was never chosen.
    unseen
        Linear weights on disk that the model holds or should hold, but that no run used; experts are not among them.
    """

    tokens: int
    windows: int
    inputs: Mapping[str, LinearInput]
    residual: tuple[ResidualStream, ...]
    experts: tuple[ExpertInput, ...]
    unseen: tuple[str, ...]


def profile_checkpoint(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    sample: TextSample,
    where: tuple[str, str],
    progress: Progress = silent,
) -> ActivationProfile:
    """Load a checkpoint's model, run a text through it once, and return the statistics of its activations.

    Parameters
    ----------
    where
        Device ("auto", "cpu" or "cuda") and dtype ("float32" or "bfloat16").

    Raises
    ------
    ModelError
        As `profile_activations`, or if the model cannot be built, or would not fit into memory with its activations.
    """
    device, dtype = resolve_device(where[0]), where[1]
    require_run_memory(checkpoint, device, dtype, max(map(len, sample.windows)))
    loaded = load_model(checkpoint, device, dtype, copies=1)
    try:
        return profile_activations(loaded, checkpoint, roles, sample, progress)
    finally:
        del loaded
        release()


def profile_activations(
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    sample: TextSample,
    progress: Progress = silent,
    *,
    sites: SiteMap | None = None,
    joined: Mapping[str, Sequence[str]] | None = None,
) -> ActivationProfile:
    """Run a text through a model once and return the statistics of its activations.

    Parameters
    ----------
    loaded, checkpoint, roles
        A model, what it was made from, and the roles of what is stored.
    sample
        The text.
    progress
        Is told of the tokens.
    sites
        From `find_sites` of the first three, if it is known already.
    joined
        Further entries of `inputs`: a name, and the tensors whose inputs are taken together under it.

    Raises
    ------
    ModelError
        If an activation is NaN or infinite, with the place where that begins; if a token is not in the model's
        vocabulary, or memory runs out.
    """
    sites = sites or find_sites(loaded, checkpoint, roles)
    collector = _Collector(loaded.name, sample)
    done = 0
    with watching(sites, collector.on_linear) as seen, watching_layers(loaded.model, collector.on_state):
        for number, window in enumerate(sample.windows):
            collector.window = number
            if loaded.run(window).isnan().any():
                raise _bad(loaded.name, "the model's output", number, collector.last)
            done += len(window)
            progress("activations", done, sample.tokens, "tokens")
    return _profile(collector, sites, seen, roles, joined or {})


class _Collector:
    """The running sums of one profile."""

    def __init__(self, name: str, sample: TextSample) -> None:
        self.name = name
        self.sample = sample
        self.window = 0
        self.inputs: dict[Site, ChannelSums] = {}
        self.leader: dict[Site, Site] = {}  # the first site that always saw the same inputs
        self.residual: dict[int, ResidualSums] = {}
        self.last = ""  # the linear weight that ran last
        self._given: tuple[Tensor, Tensor, ChannelPart, Site] | None = None
        self._states: set[tuple[int, int]] = set()

    def on_linear(self, sites: tuple[Site, ...], inputs: Tensor, output: Tensor) -> None:
        """Add the inputs of one product."""
        del output
        if sites[0].index:  # stacked experts that run in one product see zeros for tokens routed elsewhere
            inputs = inputs[inputs.any(dim=1)]
        part, leader = self._part(inputs, sites[0])
        if part.bad_count:
            raise _bad(self.name, f"the inputs of {sites[0].tensor}", self.window, self.last)
        for site in sites:
            if site not in self.inputs:
                self.inputs[site] = ChannelSums(inputs.shape[1])
                self.leader[site] = leader
            if self.leader[site] != leader:
                self.leader[site] = site
            self.inputs[site].add(part)
        self.last = sites[0].tensor

    def on_state(self, layer: int, state: Tensor) -> None:
        """Add the hidden state that enters a layer, once per window."""
        if (self.window, layer) in self._states:
            return
        self._states.add((self.window, layer))
        sums = self.residual.setdefault(layer, ResidualSums(state.shape[1]))
        if not sums.add(self.window, state):
            raise _bad(self.name, f"the hidden state at layer {layer}", self.window, self.last)

    def total(self, sites: Sequence[Site], channels: int) -> ChannelStatistics:
        """Return the statistics of the inputs of several sites, together."""
        sums = ChannelSums(channels)
        for site in sites:
            sums.add(self.inputs[site])
        return sums.statistics()

    def _part(self, inputs: Tensor, site: Site) -> tuple[ChannelPart, Site]:
        """Return what these inputs add, and the site that saw them first: q, k and v are given the same tensor."""
        import torch

        marks = inputs.detach().flatten()[:: max(1, inputs.numel() // _MARKS)]
        if self._given is not None:
            # The tensor is held, so its memory cannot have been given to another; the marks show a change in place.
            given, before, part, leader = self._given
            same = given.data_ptr() == inputs.data_ptr() and given.shape == inputs.shape
            if same and torch.equal(before, marks):
                return part, leader
        part = channel_part(inputs)
        self._given = inputs, marks.clone(), part, site
        return part, site


def _bad(name: str, where: str, window: int, last: str) -> ModelError:
    after = f"after {last}" if last else "before the first linear layer"
    return ModelError(
        f"{name}: expected finite activations, found NaN or infinity in {where} (window {window + 1}), {after}; all "
        "before are finite. Look for NaN in the weights with `vrscope analyze --weights-only`, or use --dtype float32."
    )


def _profile(
    collector: _Collector,
    sites: SiteMap,
    seen: set[Site],
    roles: Mapping[str, TensorRole],
    joined: Mapping[str, Sequence[str]],
) -> ActivationProfile:
    by_tensor: dict[str, list[Site]] = {}
    for site in sites.sites:
        by_tensor.setdefault(site.tensor, []).append(site)
    inputs: dict[str, LinearInput] = {}
    unseen = list(sites.unmatched)
    experts: dict[tuple[str, int | None, int], tuple[int, float]] = {}
    widths = {site: running.matrix().shape[1] for running, own in sites.held for site in own}
    for tensor, own in by_tensor.items():
        role = roles[tensor]
        used = [site for site in own if site in seen]
        for site in own:
            expert = _expert(site, role)
            if expert is not None:
                experts[role.role, role.layer, expert] = _tokens_and_absmax(collector.inputs.get(site))
        if not used and _expert(own[0], role) is None:
            unseen.append(tensor)
            continue
        leader = collector.leader[used[0]] if used else own[0]
        inputs[tensor] = LinearInput(tensor, role, leader.tensor, collector.total(used, widths[own[0]]))
    for name, tensors in joined.items():
        own = [site for tensor in tensors for site in by_tensor.get(tensor, ())]
        used = [site for site in own if site in seen]
        if used:
            role = replace(roles[tensors[0]], tensor=name)
            inputs[name] = LinearInput(name, role, name, collector.total(used, widths[own[0]]))
    return ActivationProfile(
        collector.sample.tokens,
        len(collector.sample.windows),
        inputs,
        tuple(collector.residual[layer].stream(layer) for layer in sorted(collector.residual)),
        tuple(ExpertInput(*key, *value) for key, value in experts.items()),
        tuple(unseen),
    )


def _tokens_and_absmax(sums: ChannelSums | None) -> tuple[int, float]:
    if sums is None:
        return 0, float("nan")
    return sums.tokens, float(sums.statistics().pooled.absmax)


def _expert(site: Site, role: TensorRole) -> int | None:
    """Return the number of the expert that a matrix belongs to, None if it is not one of several."""
    if site.index:
        return site.index[0]
    found = re.search(r"experts\.(\d+)\.", role.tensor)
    return int(found[1]) if found else None
