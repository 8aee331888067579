"""Which spaces must share a scale, and which can have none: what the operations between tensors demand.

A group is a set of spaces that carry one scale, each to a power of its own. Nothing here knows of tensors' elements;
`spaces` turns a group into terms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vrscope.arch.graph import Graph, config_value
from vrscope.arch.layout import leaves

HOMOGENEOUS = {"relu": 1, "relu2": 2, "relu_squared": 2}  # act(s x) = s^degree act(x) for s > 0


class Ties:
    """Spaces tied into groups, each member with the power at which it carries the group's scale."""

    def __init__(self, graph: Graph) -> None:
        sides = [node.reads for node in graph.nodes if node.line.kind != "embed"] + [
            node.writes for node in graph.nodes
        ]
        names = {leaf.names[0] for side in sides if side is not None for leaf in leaves(side)}
        names |= {space for edge in graph.edges for space in (*edge.inputs, *edge.outputs)}
        self.group = {name: {name: 1} for name in sorted(names)}
        self.blocked: dict[str, str] = {}

    def tie(self, first: str, second: str, power: int) -> None:
        """Let `second` carry the scale of `first` to `power`; block both where that cannot be."""
        ours, theirs = self.group[first], self.group[second]
        if ours is theirs or abs(theirs[second]) != 1:
            if ours is not theirs or ours[second] != ours[first] * power:
                self.block(first, "would have to carry two different scales")
            return
        factor = ours[first] * power * theirs[second]
        for name, own in theirs.items():
            ours[name] = factor * own
            self.group[name] = ours

    def block(self, name: str, reason: str) -> None:
        """Note why a space, and with it its group, can have no scale; the first reason stays."""
        self.blocked.setdefault(name, reason)

    def groups(self) -> list[dict[str, int]]:
        """Return every group once, as member to power."""
        return list({id(group): group for group in self.group.values()}.values())


def tie_operations(graph: Graph, ties: Ties, config: Mapping[str, Any]) -> None:
    """Tie and block spaces as the operations between tensors demand."""
    for edge in graph.edges:
        kind = edge.operation.kind
        if kind == "dot":
            ties.tie(edge.inputs[0], edge.inputs[1], -1)
        elif kind == "pass":
            ties.tie(edge.inputs[0], edge.outputs[0], 1)
        elif kind == "gated":
            ties.block(edge.inputs[0], "feeds the activation of a gate, which no scale passes through")
            ties.tie(edge.inputs[1], edge.outputs[0], 1)
        elif kind == "act":
            name = _activation(graph, config)
            degree = HOMOGENEOUS.get(name)
            if degree is None:
                for space in (*edge.inputs, *edge.outputs):
                    ties.block(space, f"activation {name}: no scale passes through it")
            else:
                ties.tie(edge.inputs[0], edge.outputs[0], degree)
        elif kind == "opaque":
            for space in (*edge.inputs, *edge.outputs):
                ties.block(space, f"at the {edge.operation.name.replace('_', ' ')}, which no scale passes through")
        else:  # added to what the tensors write there
            ties.tie(edge.inputs[0], edge.outputs[0], 1)


def _activation(graph: Graph, config: Mapping[str, Any]) -> str:
    """Return the first activation that the configuration names; a quoted alternative is the name itself."""
    for word in (graph.family.act or "").split("|"):
        name = word.strip().strip("'") if "'" in word else config_value(config, word.strip())
        if isinstance(name, str):
            return name
    return "unknown"


def head_inputs(graph: Graph) -> tuple[str, ...]:
    """Return the spaces that the output head may read, the first that exists being the one; it may not be stored."""
    if graph.family.tied is None:
        return ()
    depth = str(1 + max((node.scope[1] for node in graph.nodes if node.scope[1] is not None), default=-1))
    for line in graph.family.lines["top"]:
        if line.stem == graph.family.tied[0] and line.reads is not None:
            names = [name.replace("{L}", depth) for leaf in leaves(line.reads) for name in leaf.names]
            return tuple(re.sub(r"\{(\d+)\}", r"\1", name) for name in names)
    return ()
