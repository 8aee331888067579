"""A family bound to a checkpoint: the role of every tensor, the spaces that may be scaled, and what may not, and why.

`bind` is the only way in. It refuses, by name, whatever it does not understand: an unknown `model_type`, a tensor no
line claims, a missing one, a shape that does not fit. It never guesses.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vrscope.arch.approximate import derive_approximate
from vrscope.arch.derive import derive
from vrscope.arch.families import families, families_for
from vrscope.arch.flow import TOP, Family
from vrscope.arch.graph import Graph, Node, build_graph, config_value, size_of
from vrscope.arch.layout import Layout, leaves
from vrscope.arch.match import match
from vrscope.arch.roles import BIAS, CONV, EMBED, FIXED, HEAD, LINEAR, NORM, OTHER, HeadSplit, TensorRole
from vrscope.arch.spaces import Space
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import CheckpointError, FamilyError

_KINDS = {"linear": LINEAR, "embed": EMBED, "norm": NORM, "conv": CONV, "fixed": FIXED}


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """A family bound to one checkpoint.

    Attributes
    ----------
    family
        Name of the declaration.
    roles
        Role of every tensor of the checkpoint.
    spaces
        The free spaces, in the order of the layers; approximate ones only if they were asked for.
    rigid
        `(space, reason)` for every space that cannot be scaled exactly.
    tied
        Whether the output head is the embedding matrix.
    """

    family: str
    roles: Mapping[str, TensorRole]
    spaces: tuple[Space, ...]
    rigid: tuple[tuple[str, str], ...]
    tied: bool


def find_family(config: Mapping[str, Any], declared: tuple[Family, ...] | None = None) -> Family:
    """Return the family whose `model_type` and conditions fit a configuration.

    Raises
    ------
    FamilyError
        If there is none, or the configuration sets something the family refuses.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        message = (
            "config.json: expected a model_type, found none. Without it the architecture is unknown: not rescaled."
        )
        raise FamilyError(message)
    declaring = families_for(kind) if declared is None else declared
    fitting = [family for family in declaring if kind in family.model_types]
    if not fitting:
        known = families() if declared is None else declared
        names = sorted({name for family in known for name in family.model_types})
        near = difflib.get_close_matches(kind, names, n=1)
        hint = f" ({near[0]!r} is a different one)" if near else ""
        message = (
            f"config.json: model_type {kind!r} is not a declared architecture{hint}, so it is not rescaled. "
            "`vrscope list families` names those that are; `vrscope analyze` and `measure` work without one."
        )
        raise FamilyError(message)
    for family in fitting:
        values = {key: config_value(config, key) for key in family.when}
        said = {key: family.unless_said.get(key) if value is None else value for key, value in values.items()}
        if all(said[key] == family.when[key] for key in said):
            for key, reason in family.refuse.items():
                value = config_value(config, key)
                if value is not None and value is not False:
                    message = f"config.json: {key} = {value!r}: {reason} Not rescaled."
                    raise FamilyError(message)
            for key, wanted in family.require.items():
                value = config_value(config, key)
                if value is not None and value != wanted:
                    message = f"config.json: expected {key} = {wanted!r}, found {value!r}: another model. Not rescaled."
                    raise FamilyError(message)
            return family
    message = f"config.json: model_type {kind!r} is declared, but not with {fitting[0].when}. Not rescaled."
    raise FamilyError(message)


def bind(checkpoint: Checkpoint, declared: tuple[Family, ...] | None = None, approximate: bool = False) -> Binding:
    """Return the binding of a checkpoint to its family.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    declared
        The families to choose from; None = those that ship with vrscope.
    approximate
        Whether spaces count whose scales a norm undoes only up to its eps.

    Raises
    ------
    CheckpointError
        If the checkpoint is already quantized.
    FamilyError
        If the architecture is unknown or the file does not fit its declaration.
    """
    if checkpoint.quantization is not None:
        message = (
            f"{checkpoint.name}: already quantized ({checkpoint.quantization.rstrip('.')}), and scales cannot move "
            "through stored integers exactly. Rescale the original float checkpoint, then quantize."
        )
        raise CheckpointError(message)
    family = find_family(checkpoint.config, declared)
    config = own_config(family, checkpoint.config)
    counts = {}
    for scope, stack in family.stacks.items():
        count = size_of(stack.count, config, {})
        if count is None:
            message = f"config.json: expected the number of layers as {stack.count}, found none. Not rescaled."
            raise FamilyError(message)
        counts[scope] = count
    found = match(family, checkpoint.tensors, counts)
    graph = build_graph(family, found, config)
    tied = _tied(family, checkpoint)
    spaces, rigid = derive(graph, config, tied)
    if approximate:
        more, reasons = derive_approximate(graph, config, tied and _said_tied(family, checkpoint))
        spaces += more
        known = [(name, reasons.get(name, reason)) for name, reason in rigid]
        rigid = [(name, reason) for name, reason in known if reason is not None]
    spaces.sort(key=lambda space: (space.layer is None, space.layer or 0))
    roles = {role.tensor: role for node in graph.nodes for role in _roles(graph, node, found.prefix)}
    for name in found.ignored:
        roles[name] = TensorRole(name, name, None, OTHER, ())
    return Binding(family.name, {name: roles[name] for name in checkpoint.tensors}, tuple(spaces), tuple(rigid), tied)


def own_config(family: Family, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the declared model; older ones do not nest it."""
    own = config.get(family.inside) if family.inside else None
    return own if isinstance(own, Mapping) else config


def _tied(family: Family, checkpoint: Checkpoint) -> bool:
    """Return whether head and embedding are one; a config that says so is believed, as runtimes may ignore the head."""
    if family.tied is None:
        return False
    return _said_tied(family, checkpoint) or f"{family.tied[0]}.weight" not in checkpoint.tensors


def _said_tied(family: Family, checkpoint: Checkpoint) -> bool:
    """Return whether the configuration ties head and embedding; without a head and not tied, the model has none."""
    said = [config.get("tie_word_embeddings") for config in (checkpoint.config, own_config(family, checkpoint.config))]
    default = family.tied is not None and family.tied[2]
    return next((bool(value) for value in said if value is not None), default)


def _roles(graph: Graph, node: Node, prefix: str) -> Iterator[TensorRole]:
    role = node.line.stem.replace("{p}", "").replace(".{x}", "").replace(".{h}", "").replace(".{g}", "")
    if len(graph.family.stacks) > 1 and node.scope[0] != TOP:
        role = f"{node.scope[0]}.{role}"
    kind = _KINDS[node.line.kind]
    if graph.family.tied is not None and node.line.stem == graph.family.tied[0]:
        kind = HEAD
    elif kind == LINEAR and node.scope[0] == TOP:
        kind = OTHER  # a pooler or projection outside the layers: quantizers treat it as they like
    heads = [*_splits(graph, node, node.writes, "out"), *_splits(graph, node, node.reads, "in")]
    layer = node.scope[1]
    yield TensorRole(node.weight.name, role, layer, kind, node.line.dims, tuple(heads))
    if node.bias is not None:
        splits = tuple(HeadSplit(s.part, s.unit, s.count, 0, s.index) for s in _splits(graph, node, node.writes, "out"))
        yield TensorRole(node.bias.name, role + ".bias", layer, BIAS, ("out",), splits)


def _splits(graph: Graph, node: Node, layout: Layout | None, side: str) -> Iterator[HeadSplit]:
    """Yield how one dimension divides into heads: the axes of its space but the last, channel, axis."""
    if layout is None or side not in node.line.dims or node.line.kind != "linear":
        return
    for leaf in leaves(layout):
        space = leaf.names[0]
        axes = graph.axes[space]
        if len(axes) < 2 or not {"g", "h"} & set(axes):
            continue
        sizes = graph.sizes[node.scope]
        count = int(np.prod([sizes[axis] for axis in axes[:-1]]))
        dim = node.line.dims.index(side)
        index = np.full(node.weight.shape[dim], -1, np.int64)
        places = graph.places(node, layout)[space]
        index[places] = np.arange(count).reshape(*places.shape[:-1], 1)
        grouped = "r" not in axes and "h" not in axes and sizes.get("r", 1) > 1
        yield HeadSplit(space.rsplit(":", 1)[-1], "kv group" if grouped else "head", count, dim, graph.shared(index))
