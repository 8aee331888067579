"""The dataflow of one checkpoint: its claimed tensors with every space named and every axis sized.

A node is one declared tensor of the file. Space names become unique per layer ("model.layers.0:v"), alternatives are
decided by what is present, and axis sizes come from the configuration or, where it is silent, from the shapes.
"""

from __future__ import annotations

import math
import re
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.flow import TOP, Family, Line, Operation, unnumbered
from vrscope.arch.layout import Layout, choose, leaves, length
from vrscope.arch.match import Claimed, Indices, Match
from vrscope.arch.positions import positions
from vrscope.checkpoint.source import TensorInfo
from vrscope.errors import FamilyError

Scope = tuple[str, int | None]  # stack name and layer
Index = TypeVar("Index", bound=np.signedinteger)


@dataclass(frozen=True, slots=True)
class Node:
    """One claimed tensor (and its bias); `reads` and `writes` name spaces of this checkpoint."""

    line: Line
    scope: Scope
    indices: Indices
    weight: TensorInfo
    bias: TensorInfo | None
    reads: Layout | None
    writes: Layout | None


@dataclass(frozen=True, slots=True)
class Edge:
    """One operation of one layer, with its spaces named."""

    operation: Operation
    scope: Scope
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """All nodes and edges of a checkpoint, axes and kind of every space, and the axis sizes of every scope."""

    family: Family
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    axes: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, str]
    sizes: Mapping[Scope, Mapping[str, int]]
    paths: Mapping[Scope, str]
    _arrays: dict[tuple[str, bytes], NDArray[np.signedinteger]] = field(default_factory=dict, repr=False, compare=False)

    def shared(self, array: NDArray[Index]) -> NDArray[Index]:
        """Return a vector, read-only, that is one and the same for all that are equal: layers repeat each other."""
        array.setflags(write=False)
        found: Any = self._arrays.setdefault((array.dtype.str, array.tobytes()), array)
        return found  # type: ignore[no-any-return]

    def places(self, node: Node, side: Layout) -> dict[str, NDArray[np.int64]]:
        """Return where the elements of every space of one side of a node lie in its dimension."""
        return positions(side, self.axes, self.sizes[node.scope], batch_axes(node.line))


def batch_axes(line: Line) -> tuple[str, ...]:
    """Return the axes that a weight stores as dimensions of their own, such as the experts of a fused tensor."""
    return tuple(what for what in line.dims if what not in {"out", "in"})


def space_axes(family: Family, template: str) -> tuple[tuple[str, ...], str]:
    """Return the axes of a space named in a declaration, and its kind.

    A space that is not declared has one axis, of its own name: nothing can be shared with it by accident.
    """
    return family.spaces.get(unnumbered(template), ((unnumbered(template).replace("{}", ""),), ""))


def space_templates(line: Line) -> tuple[tuple[str, ...], ...]:
    """Return the alternatives of every leaf a line reads or writes."""
    sides = [side for side in (line.reads, line.writes) if side is not None]
    return tuple(leaf.names for side in sides for leaf in leaves(side))


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key of a configuration, None where any part is missing."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def values_of(expression: str, config: Mapping[str, Any], known: Mapping[str, int]) -> Iterator[float]:
    """Yield the values of an expression: alternatives parted by `|`, each numbers, keys and axes joined by `*+-/`.

    Operators are applied from left to right. An alternative with a key that the configuration lacks is passed over.
    """
    join = {"*": float.__mul__, "/": float.__truediv__, "+": float.__add__, "-": float.__sub__}
    for alternative in expression.split("|"):
        value: float | None = None
        for operator, word in re.findall(r"([*/+-]?)\s*([\w.]+)", alternative):
            number = float(word) if word[0].isdigit() else known.get(word, config_value(config, word))
            if not isinstance(number, int | float) or isinstance(number, bool) or number <= 0:
                value = None
                break
            value = float(number) if value is None else join[operator](value, float(number))
        if value is not None:
            yield value


def size_of(expression: str, config: Mapping[str, Any], known: Mapping[str, int]) -> int | None:
    """Return the first whole value of a size expression, None if it has none."""
    return next((int(value) for value in values_of(expression, config, known) if value == int(value)), None)


def build_graph(family: Family, found: Match, config: Mapping[str, Any]) -> Graph:
    """Return the dataflow of a checkpoint whose tensors `found` has claimed.

    Raises
    ------
    FamilyError
        If a shape does not fit its layout, an axis has no size, or a space in use has no writer.
    """
    return _Builder(family, found, config).build()


class _Builder:
    """Holds the tables that are filled while a graph is built; used once."""

    def __init__(self, family: Family, found: Match, config: Mapping[str, Any]) -> None:
        self.family, self.match, self.config = family, found, config
        self.shared = {
            re.sub(r"\{[^}]*\}", "{}", name)
            for line in family.lines[TOP]
            for names in space_templates(line)
            for name in names
        }
        self.names: dict[tuple[str, Scope, Indices], str] = {}
        self.axes: dict[str, tuple[str, ...]] = {}
        self.kinds: dict[str, str] = {}
        self.top: dict[str, int] = {}
        self.local: dict[Scope, dict[str, int]] = {}

    def build(self) -> Graph:
        self.top.update(self._configured(self.family.sizes))
        for name, stack in self.family.stacks.items():
            own = self._configured({**self.family.sizes, **stack.sizes}) if stack.sizes else {}
            for layer in range(self.match.layers[name]):
                self.local[name, layer] = dict(own)
        claims = [claim for claim in self.match.claims if claim.weight is not None]
        nodes = self._resolve(claims)
        edges = tuple(self._edges(nodes, claims))
        self._check_writers(nodes, edges)
        self._solve(nodes)
        scopes = {(TOP, None), *(node.scope for node in nodes)}
        return Graph(
            self.family,
            nodes,
            edges,
            self.axes,
            self.kinds,
            {scope: dict(self._sizes(scope)) for scope in scopes},
            {scope: self._path(scope) for scope in scopes},
        )

    def _configured(self, expressions: Mapping[str, str]) -> dict[str, int]:
        """Return the axis sizes that the configuration gives, each from those before it."""
        sizes: dict[str, int] = {}
        for axis, expression in expressions.items():
            size = size_of(expression, self.config, sizes)
            if size is not None:
                sizes[axis] = size
        return sizes

    def _path(self, scope: Scope) -> str:
        if scope[0] == TOP:
            return ""
        path = self.family.stacks[scope[0]].path.replace("{p}", self.match.prefix)
        return path.replace("{i}", str(scope[1])).removesuffix(".")

    def _sizes(self, scope: Scope) -> ChainMap[str, int]:
        return ChainMap(self.local.setdefault(scope, {}), self.top) if scope[0] != TOP else ChainMap(self.top)

    def name(self, template: str, scope: Scope, indices: Indices) -> str:
        """Return the unique name of a space in one layer, and note its axes."""
        at = (template, scope, indices if "{" in template else ())
        if at not in self.names:
            self.names[at] = self._name(*at)
        return self.names[at]

    def _name(self, template: str, scope: Scope, indices: Indices) -> str:
        shared = re.sub(r"\{[^}]*\}", "{}", template) in self.shared or "{i" in template
        text = template
        for place, number in indices:
            text = text.replace("{" + place + "}", str(number))
        depth = self.match.layers.get(scope[0], next(iter(self.match.layers.values()), 0))
        text = text.replace("{i}", str(scope[1])).replace("{L}", str(depth))
        if scope[1] is not None:
            text = text.replace("{i+1}", str(scope[1] + 1))
        text = re.sub(r"\{(\d+)\}", r"\1", text)
        full = text if shared else f"{self._path(scope)}:{text}"
        self.axes[full], self.kinds[full] = space_axes(self.family, template)
        return full

    def _resolve(self, claims: list[Claimed]) -> tuple[Node, ...]:
        """Decide alternatives: a writer takes the first space that somebody reads, a reader the first written."""

        def options(claim: Claimed, side: Layout | None) -> Iterator[str]:
            for leaf in leaves(side) if side is not None else ():
                for template in leaf.names:
                    yield self.name(template, (claim.scope, claim.layer), claim.indices)

        read = {name for claim in claims for name in options(claim, claim.line.reads)}
        read |= {
            self.name(space, (claim.scope, claim.layer), claim.indices)
            for claim in claims
            for operation in self.family.operations
            for space in operation.inputs
        }

        def picker(claim: Claimed, used: set[str]) -> Any:
            def pick(names: tuple[str, ...]) -> str:
                full = [self.name(name, (claim.scope, claim.layer), claim.indices) for name in names]
                return next((name for name in full if name in used), full[-1])

            return pick

        writes = [None if c.line.writes is None else choose(c.line.writes, picker(c, read)) for c in claims]
        written = {leaf.names[0] for side in writes if side is not None for leaf in leaves(side)}
        written |= {name for claim in claims for name in self._outputs(claim, written)}
        nodes = []
        for claim, side in zip(claims, writes, strict=True):
            reads = None if claim.line.reads is None else choose(claim.line.reads, picker(claim, written))
            assert claim.weight is not None
            scope = (claim.scope, claim.layer)
            nodes.append(Node(claim.line, scope, claim.indices, claim.weight, claim.bias, reads, side))
        return tuple(nodes)

    def _outputs(self, claim: Claimed, written: set[str]) -> Iterator[str]:
        scope = (claim.scope, claim.layer)
        for operation in self.family.operations:
            if all(self.name(space, scope, claim.indices) in written for space in operation.inputs):
                yield from (self.name(space, scope, claim.indices) for space in operation.outputs)

    def _edges(self, nodes: tuple[Node, ...], claims: list[Claimed]) -> Iterator[Edge]:
        written = {leaf.names[0] for node in nodes if node.writes is not None for leaf in leaves(node.writes)}
        read = {leaf.names[0] for node in nodes if node.reads is not None for leaf in leaves(node.reads)}
        seen, lacking = set(), dict[str, tuple[str, str]]()
        for claim in claims:
            scope = (claim.scope, claim.layer)
            for operation in self.family.operations:
                inputs = tuple(self.name(space, scope, claim.indices) for space in operation.inputs)
                outputs = tuple(self.name(space, scope, claim.indices) for space in operation.outputs)
                at = (operation.name, inputs, outputs)
                if at in seen or any("{" in space for space in (*inputs, *outputs)):
                    continue
                have = [space in written for space in inputs]
                wanted = [space for space in outputs if space in read]
                if all(have) and (not outputs or wanted):
                    seen.add(at)
                    written.update(outputs)
                    yield Edge(operation, scope, inputs, outputs)
                elif not all(have):
                    lacking |= {space: (inputs[have.index(False)], operation.kind) for space in wanted}
        for space, (missing, kind) in lacking.items():
            if space not in written:
                message = (
                    f"{missing}: family {self.family.name!r} has no tensor that writes this space, which "
                    f"'{kind}' needs. The file is of another architecture, so it is not rescaled."
                )
                raise FamilyError(message)

    def _check_writers(self, nodes: tuple[Node, ...], edges: tuple[Edge, ...]) -> None:
        written = {leaf.names[0] for node in nodes if node.writes is not None for leaf in leaves(node.writes)}
        written |= {space for edge in edges for space in edge.outputs}
        for node in nodes:
            if node.reads is None or node.line.kind == "embed":
                continue
            for leaf in leaves(node.reads):
                if leaf.names[0] not in written:
                    message = (
                        f"{node.weight.name}: reads the space {leaf.names[0]!r}, which nothing in the file writes. "
                        f"The file does not fit family {self.family.name!r}, so it is not rescaled."
                    )
                    raise FamilyError(message)

    def _solve(self, nodes: tuple[Node, ...]) -> None:
        """Find the axes that the configuration does not give, from shapes; then check every shape."""
        for node in nodes:
            sizes = self._sizes(node.scope)
            for place, number in node.indices:
                sizes[place] = max(sizes.get(place, 0), number + 1)
            for dim, what in enumerate(node.line.dims[: len(node.weight.shape)]):
                if what not in {"out", "in"}:
                    sizes[what] = node.weight.shape[dim]
        self._check_heads(nodes)
        waiting = [(node, *item) for node in nodes for item in _dimensions(node)]
        while waiting:
            later = [item for item in waiting if not self._fits(*item)]
            if len(later) == len(waiting):
                node, dim, side = later[0]
                unknown = length(side, self.axes, self._sizes(node.scope))[1]
                message = (
                    f"{node.weight.name}: dimension {dim} of {list(node.weight.shape)} leaves the axes {list(unknown)} "
                    f"of family {self.family.name!r} without a size. config.json lacks a key that gives it."
                )
                raise FamilyError(message)
            waiting = later

    def _check_heads(self, nodes: tuple[Node, ...]) -> None:
        """Check that tensors stored one per head, or per expert the configuration counts, are all there."""
        counted = Counter((node.line.stem, node.scope, place) for node in nodes for place, _ in node.indices)
        for (stem, scope, place), count in counted.items():
            expected = self.top.get(place) if place == "x" else self._sizes(scope).get(place)
            if place in {"h", "g", "x"} and expected not in {None, count}:
                message = (
                    f"{self._path(scope)}.{stem}: family {self.family.name!r} expects {expected} of them, found "
                    f"{count}. The file is incomplete, so it is not rescaled."
                )
                raise FamilyError(message)

    def _fits(self, node: Node, dim: int, side: Layout) -> bool:
        """Check one dimension of one tensor; False = an axis is still unknown."""
        sizes, actual = self._sizes(node.scope), extent(node, node.line.dims[dim])
        constant, factors = length(side, self.axes, sizes, batch_axes(node.line))
        if factors:
            unknown, factor = next(iter(factors.items()))
            if len(factors) > 1 or len(unknown) > 1:
                return False
            if actual > constant and (actual - constant) % factor == 0:
                sizes[unknown[0]] = (actual - constant) // factor
                return True
            constant += factor
        if constant != actual and not (node.line.kind == "norm" and self._gain_fits(node, actual)):
            message = (
                f"{node.weight.name} ({node.weight.shard}): family {self.family.name!r} expects {constant} in "
                f"dimension {dim}, found {list(node.weight.shape)}. config.json and the weights disagree: not rescaled."
            )
            raise FamilyError(message)
        return True

    def _gain_fits(self, node: Node, actual: int) -> bool:
        sizes = self._sizes(node.scope)
        return bool(node.line.axes) and actual == int(np.prod([sizes.get(axis, 0) for axis in node.line.axes]))


def extent(node: Node, what: str) -> int:
    """Return the number of elements along "out" or "in", which a gain may spread over two stored dimensions."""
    return math.prod(size for size, is_what in zip(node.weight.shape, node.line.dims, strict=False) if is_what == what)


def _dimensions(node: Node) -> Iterator[tuple[int, Layout]]:
    """Yield the dimensions of a node's weight that a layout describes, with that layout."""
    for dim, what in enumerate(node.line.dims if node.line.kind != "fixed" else ()):
        if dim >= len(node.weight.shape):
            message = f"{node.weight.name}: expected {len(node.line.dims)} dimensions, found {list(node.weight.shape)}."
            raise FamilyError(message)
        if what in node.line.dims[:dim]:
            continue
        if what == "out" and node.writes is not None:
            yield dim, node.writes
            if node.line.kind == "conv" and node.reads is not None:
                yield dim, node.reads  # depthwise: one channel in, one out
        elif what == "in" and node.reads is not None and node.line.kind != "embed":
            yield dim, node.reads
