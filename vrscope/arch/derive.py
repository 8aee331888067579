"""Which scales leave a checkpoint's function unchanged: derived from its dataflow, never listed by hand.

Give every space a vector of log-scales. A matrix absorbs any such choice (rows times the scale of what it writes,
columns over the scale of what it reads), so only operations restrict it: attention scores need q and k to cancel, a
gated MLP passes the scale of its linear branch on, ReLU passes a positive one to its own degree, a norm swallows none
on its input. Spaces tied together this way share one free vector, on the axes that all their tensors have in common.
Its scales may be negative unless there is a ReLU among what ties them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.flow import RESIDUAL
from vrscope.arch.graph import Edge, Graph, Node, extent, values_of
from vrscope.arch.layout import leaves
from vrscope.arch.spaces import FREE, GAIN_PAIR, NORM_FOLD, RULES, Space, Term
from vrscope.arch.ties import Ties, head_inputs, tie_operations
from vrscope.errors import FamilyError

STREAM = "the residual stream: every layer adds to it, and norms would undo a scale only up to their eps"
OUTPUT = "an output that is used as it is"
USED = "used as it is by more than the tensors that read it"
TIED = "feeds the output head, which is the embedding matrix (tied) or not in the file"


def derive(graph: Graph, config: Mapping[str, Any], tied: bool) -> tuple[list[Space], list[tuple[str, str]]]:
    """Return the free spaces of a checkpoint, and for every other space the reason it cannot be scaled.

    Parameters
    ----------
    graph
        The dataflow.
    config
        The checkpoint's configuration (activation, rotary share).
    tied
        Whether the output head is the embedding matrix.
    """
    ties = Ties(graph)
    read = {leaf.names[0] for node in graph.nodes if node.reads is not None for leaf in leaves(node.reads)}
    for name in ties.group:
        if graph.kinds.get(name):
            ties.block(name, STREAM if graph.kinds[name] == RESIDUAL else USED if name in read else OUTPUT)
    tie_operations(graph, ties, config)
    _block_by_use(graph, ties, tied)
    uses, edges = index_uses(graph)
    spaces: list[Space] = []
    rigid: list[tuple[str, str]] = []
    for members in ties.groups():
        reason = next((ties.blocked[name] for name in members if name in ties.blocked), None)
        if reason is not None:
            rigid.extend((name, reason) for name in members)
        else:
            at = {number: edge for name in members for number, edge in edges[name]}
            spaces.append(make_space(graph, members, uses, [at[number] for number in sorted(at)], config))
    return spaces, rigid


Side = tuple[int, Node, str, int]  # number of the node, node, "out" or "in", sign of the power


def index_uses(graph: Graph) -> tuple[dict[str, list[Side]], dict[str, list[tuple[int, Edge]]]]:
    """Return for every space the sides of nodes, and the operations, that write or read it."""
    uses: dict[str, list[Side]] = defaultdict(list)
    for number, node in enumerate(graph.nodes):
        for side, layout, sign in (("out", node.writes, 1), ("in", node.reads, -1)):
            if layout is not None and not (side == "in" and node.line.kind in {"norm", "embed"}):
                for leaf in leaves(layout):
                    uses[leaf.names[0]].append((number, node, side, sign))
    edges: dict[str, list[tuple[int, Edge]]] = defaultdict(list)
    for number, edge in enumerate(graph.edges):
        for space in (*edge.inputs, *edge.outputs):
            edges[space].append((number, edge))
    return uses, edges


def _block_by_use(graph: Graph, ties: Ties, tied: bool) -> None:
    for node in graph.nodes:
        for leaf in leaves(node.reads) if node.reads is not None and node.line.kind == "norm" else ():
            ties.block(leaf.names[0], "goes into a norm, which undoes a scale only up to its eps")
    block_ends(graph, ties, dict.fromkeys(head_inputs(graph), TIED) if tied else {})


def block_ends(graph: Graph, ties: Ties, heads: Mapping[str, str]) -> None:
    """Block what nothing reads or nothing writes; `heads` holds the input of a head, with the reason to block it."""
    written, read = set[str](), set[str]()
    for node in graph.nodes:
        for side, names in ((node.writes, written), (node.reads, read)):
            names |= {leaf.names[0] for leaf in leaves(side)} if side is not None else set()
    written |= {space for edge in graph.edges for space in edge.outputs}
    read |= {space for edge in graph.edges for space in edge.inputs}
    for name in ties.group:
        if name in heads:
            if heads[name]:
                ties.block(name, heads[name])
        elif name not in read:
            ties.block(name, "an output of the model")
        elif name not in written:
            ties.block(name, "written by nothing that carries a scale")


def make_space(
    graph: Graph,
    members: Mapping[str, int],
    sides: Mapping[str, list[Side]],
    edges: list[Edge],
    config: Mapping[str, Any],
) -> Space:
    """Return the space of a group of spaces that share a scale, each to its power.

    Parameters
    ----------
    graph
        The dataflow.
    members
        Member to power.
    sides
        From `index_uses`: the sides of tensors that write or read each space.
    edges
        The operations that write or read a member, in order.
    config
        The checkpoint's configuration (rotary share).
    """
    name = next((space for edge in edges for space in edge.inputs if space in members), min(members))
    uses = _uses(graph, members, sides)
    axes = [axis for axis in graph.axes[name] if all(axis in have for _, _, _, _, have in uses)]
    scope = next(node.scope for node, *_ in uses)
    sizes = graph.sizes[scope]
    ties_on = {edge.operation.rope for edge in edges if edge.operation.rope} if graph.family.rope != "none" else set()
    labels = [_labels(axis, sizes[axis], axis in ties_on, graph, config) for axis in axes]
    shape = tuple(int(label.max()) + 1 if label.size else 0 for label in labels)
    terms = []
    for node, side, space, power, have in uses:
        ids = _ids(have, axes, labels, shape, sizes)
        terms.extend(_terms(graph, node, (side, space, power), ids))
    norms = all(node.line.kind == "norm" for node, side, *_ in uses if side == "out")
    rule = next((RULES[kind] for kind in RULES for edge in edges if edge.operation.kind == kind), None)
    if rule is None:
        rule = NORM_FOLD if norms else FREE
    elif rule == RULES["dot"] and norms:
        rule = GAIN_PAIR
    shown = tuple("pair" if axis in ties_on else axis for axis in axes)
    size = int(np.prod(shape, dtype=np.int64))
    linear = all(edge.operation.kind != "act" for edge in edges)
    return Space(name, rule, scope[1], size, shape, shown, tuple(terms), signed=linear)


Use = tuple[Node, str, str, int, tuple[str, ...]]  # node, "out" or "in", space, power, axes its dimension carries


def _uses(graph: Graph, members: Mapping[str, int], sides: Mapping[str, list[Side]]) -> list[Use]:
    """Return every side of every node that writes or reads one of the spaces, in the order of the nodes."""
    uses: list[tuple[int, Use]] = []
    for space in members:
        for number, node, side, sign in sides.get(space, ()):
            axes = graph.axes[space]
            if node.line.kind == "norm" and _short_gain(graph, node, space):
                axes = node.line.axes
            uses.append((number, (node, side, space, sign * members[space], axes)))
    return [use for _, use in sorted(uses, key=lambda pair: pair[0])]


def _short_gain(graph: Graph, node: Node, space: str) -> bool:
    """Whether a norm's gain runs only along the axes it normalises over, shared by the others."""
    sizes = graph.sizes[node.scope]
    full = int(np.prod([sizes[axis] for axis in graph.axes[space]], dtype=np.int64))
    return bool(node.line.axes) and node.weight.numel != full


def _labels(axis: str, size: int, rotated: bool, graph: Graph, config: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return for every index of an axis the number of its scale, which RoPE partners share."""
    plain = np.arange(size)
    if not rotated:
        return plain
    share = next(values_of(graph.family.rotary, config, {axis: size}), 1.0)
    if share > 1:
        message = (
            f"config.json: {graph.family.rotary}: expected a rotated share of at most 1, found {share}. Not rescaled."
        )
        raise FamilyError(message)
    span = int(size * share) // 2 * 2
    turned = plain[:span] % (span // 2) if graph.family.rope == "half" else plain[:span] // 2
    return np.concatenate([turned, np.arange(size - span) + span // 2])


def _ids(
    have: tuple[str, ...],
    axes: list[str],
    labels: list[NDArray[np.int64]],
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
) -> NDArray[np.int64]:
    """Return the number of the scale for every element of a space with axes `have`, shaped by those axes."""
    ids = np.zeros([sizes[axis] for axis in have], np.int64)
    for axis, label, stride in zip(axes, labels, np.cumprod((1, *shape[:0:-1]))[::-1], strict=True):
        view = [1] * len(have)
        view[have.index(axis)] = -1
        ids = ids + (label * int(stride)).reshape(view)
    return ids


def _terms(graph: Graph, node: Node, use: tuple[str, str, int], ids: NDArray[np.int64]) -> list[Term]:
    """Return the terms of a node's weight, and of its bias when its output is scaled."""
    side, space, power = use
    layout = node.writes if side == "out" else node.reads
    assert layout is not None
    along = "out" if node.line.kind == "conv" else side
    batch = [at for at, what in enumerate(node.line.dims) if what not in {"out", "in"} and what in graph.axes[space]]
    count = extent(node, along)
    if node.line.kind == "norm" and _short_gain(graph, node, space):
        flat = ids.reshape(count)
    else:
        places = graph.places(node, layout)[space]
        ids = np.broadcast_to(ids, places.shape)
        flat = np.full([*(node.weight.shape[at] for at in batch), count], -1, np.int64)
        lead = np.indices(places.shape)[: len(batch)] if batch else ()
        flat[(*lead, places)] = ids
    index = graph.shared(flat.reshape(-1).astype(np.int32))  # kept for every channel of the checkpoint
    kept = {*batch, *(at for at, what in enumerate(node.line.dims) if what == along)}
    view = [size if at in kept else 1 for at, size in enumerate(node.weight.shape)]
    terms = [Term(node.weight.name, index.reshape(view), power, node.line.gain if side == "out" else "w")]
    if side == "out" and node.bias is not None:
        shared = len(node.bias.shape) - flat.ndim  # a bias per expert, where the space is the same for all
        own = node.bias.shape if flat.size == node.bias.numel else (*[1] * shared, *flat.shape)
        terms.append(Term(node.bias.name, index.reshape(own), power, "w"))
    return terms
