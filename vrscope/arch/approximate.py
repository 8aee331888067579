"""Spaces whose scale a norm undoes up to its eps: one scale per norm group, or one for a whole residual stream.

They are derived from the same dataflow as the exact ones. What differs: a norm's input may be scaled (by one factor
over everything the norm averages), and so may a residual stream, if every tensor that writes into it follows. A tied
head is the embedding matrix, so what it reads has to carry the inverse scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.derive import OUTPUT, USED, Side, block_ends, index_uses, make_space
from vrscope.arch.flow import RESIDUAL, TOP
from vrscope.arch.graph import Edge, Graph, Node, config_value
from vrscope.arch.layout import Leaf, leaves
from vrscope.arch.spaces import Limit, Space, Term
from vrscope.arch.ties import Ties, head_inputs, tie_operations

ABSORB, RESIDUAL_RULE = "absorb", "residual"
ASIDE = "a part of the model that is not declared writes into it too"


def derive_approximate(
    graph: Graph, config: Mapping[str, Any], tied: bool
) -> tuple[list[Space], dict[str, str | None]]:
    """Return the approximate spaces of a checkpoint, and of all spaces that share a scale with a norm's input why not.

    The reason is None for the members of the spaces that are returned.

    Parameters
    ----------
    graph
        The dataflow.
    config
        The checkpoint's configuration (activation, eps).
    tied
        Whether the configuration says that the output head is the embedding matrix.
    """
    ties = Ties(graph)
    _block_rigid(graph, ties)
    tie_operations(graph, ties, config)
    heads = dict.fromkeys(head_inputs(graph), "") if tied else {}
    block_ends(graph, ties, heads)
    head = next((name for name in heads if name in ties.group), None)
    if head is not None:
        for name in _written_by_embedding(graph):
            ties.tie(name, head, -1)
    norms = _norms(graph)
    uses, edges = index_uses(graph)
    spaces: list[Space] = []
    reasons: dict[str, str | None] = {}
    for members in ties.groups():
        absorbing = {name: norms[name] for name in members if name in norms}
        if not absorbing:
            continue
        reason = next((ties.blocked[name] for name in members if name in ties.blocked), None)
        reason = reason or _opposed(members, absorbing) or _unknown_eps(absorbing, config)
        reasons |= dict.fromkeys(members, reason)
        if reason is not None:
            continue
        sign = 1 if members[next(iter(absorbing))] > 0 else -1
        oriented = {name: sign * power for name, power in members.items()}
        ordered = {number: edge for name in members for number, edge in edges[name]}
        spaces.append(_space(graph, oriented, absorbing, (uses, [ordered[n] for n in sorted(ordered)]), config))
    return spaces, reasons


def _block_rigid(graph: Graph, ties: Ties) -> None:
    inside = {leaf.names[0] for node in graph.nodes if node.scope[0] != TOP for leaf in _read(node)}
    for name in ties.group:
        kind = graph.kinds.get(name)
        if kind == RESIDUAL and name not in inside:
            ties.block(name, OUTPUT)  # the last layer's output: what it feeds is one use of it among others
        elif kind == RESIDUAL and graph.family.aside:
            ties.block(name, ASIDE)
        elif kind and kind != RESIDUAL:
            ties.block(name, USED)


def _read(node: Node) -> tuple[Leaf, ...]:
    return leaves(node.reads) if node.reads is not None else ()


def _written(node: Node) -> tuple[Leaf, ...]:
    return leaves(node.writes) if node.writes is not None else ()


def _written_by_embedding(graph: Graph) -> set[str]:
    assert graph.family.tied is not None
    return {leaf.names[0] for node in graph.nodes if node.line.stem == graph.family.tied[1] for leaf in _written(node)}


def _norms(graph: Graph) -> dict[str, list[Node]]:
    """Return for every space the norms that read it."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.line.kind == "norm":
            for leaf in _read(node):
                found.setdefault(leaf.names[0], []).append(node)
    return found


def _opposed(members: Mapping[str, int], absorbing: Mapping[str, list[Node]]) -> str | None:
    """Return a reason if one scale would enlarge the input of one norm and shrink that of another."""
    signs = {members[name] > 0 for name in absorbing}
    return "would enlarge the input of one norm and shrink that of another" if len(signs) > 1 else None


def _unknown_eps(absorbing: Mapping[str, list[Node]], config: Mapping[str, Any]) -> str | None:
    for nodes in absorbing.values():
        for node in nodes:
            if norm_eps(node.line.eps, config) is None:
                where = f"config.json does not give it as {node.line.eps}" if node.line.eps else "it is not declared"
                return f"goes into the norm {node.line.stem.replace('{p}', '')}, whose eps is unknown: {where}"
    return None


def norm_eps(expression: str, config: Mapping[str, Any]) -> float | None:
    """Return the first known value of an eps: alternatives parted by `|`, each a number or a configuration key."""
    for word in expression.split("|"):
        try:
            value = float(word)
        except ValueError:
            value = config_value(config, word.strip())
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
            return float(value)
    return None


def _space(
    graph: Graph,
    members: Mapping[str, int],
    absorbing: Mapping[str, list[Node]],
    uses: tuple[Mapping[str, list[Side]], list[Edge]],
    config: Mapping[str, Any],
) -> Space:
    """Return a group as a space whose scales are constant over everything that one of its norms averages."""
    averaged = [
        (set(graph.axes[name]), set(node.line.axes or graph.axes[name]))
        for name, nodes in absorbing.items()
        for node in nodes
    ]
    free = set.intersection(*(have - over for have, over in averaged))
    full = make_space(graph, members, *uses, config)
    keep = [at for at, axis in enumerate(full.axes) if axis in free]
    shape = tuple(full.shape[at] for at in keep)
    kept_ids = np.unravel_index(np.arange(full.size), full.shape)
    merged = np.zeros(full.size, np.int64)
    for at, size in zip(keep, shape, strict=True):
        merged = merged * size + kept_ids[at]
    index = np.append(merged, -1).astype(np.int32)  # what no scale touches stays so
    eps = max(norm_eps(node.line.eps, config) or 0.0 for nodes in absorbing.values() for node in nodes)
    residual = any(graph.kinds.get(name) == RESIDUAL for name in members)
    inputs, one_plus = _inputs(graph, {term.tensor for term in full.terms if term.power > 0})
    return replace(
        full,
        name=next(iter(absorbing)),
        rule=RESIDUAL_RULE if residual else ABSORB,
        size=int(np.prod(shape, dtype=np.int64)),
        shape=shape,
        axes=tuple(full.axes[at] for at in keep),
        terms=tuple(replace(term, index=_merged(graph, index, term)) for term in full.terms),
        limit=Limit(eps, max(members[name] for name in absorbing), inputs, frozenset(one_plus)),
        signed=False,  # a norm takes a scale away but not its sign
    )


def _merged(graph: Graph, numbers: NDArray[np.int32], term: Term) -> NDArray[np.int32]:
    """Return the index of a term whose scales get other numbers; -1 is the last of these."""
    return graph.shared(numbers[term.index.reshape(-1)]).reshape(term.index.shape)


def _inputs(graph: Graph, writers: set[str]) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Return for every matrix among the writers the gain and bias of the norm it reads, and which gains are 1+w."""
    gains = {leaf.names[0]: node for node in graph.nodes if node.line.kind == "norm" for leaf in _written(node)}
    found: dict[str, tuple[str, ...]] = {}
    one_plus = set[str]()
    for node in graph.nodes:
        if node.weight.name in writers and node.line.kind == "linear":
            for leaf in _read(node):
                norm = gains.get(leaf.names[0])
                if norm is not None:
                    found[node.weight.name] = tuple(part.name for part in (norm.weight, norm.bias) if part is not None)
                    one_plus |= {norm.weight.name} if norm.line.gain == "1+w" else set()
    return found, one_plus
