"""How the rows (or columns) of a stored matrix divide into spaces.

A layout is a small expression: `q|k|v` is concatenation, `n*(...)` repeats its body along axis `n`, and a leaf names a
space; `a,b` as a leaf means the first of the two that the checkpoint really uses. The same expression describes rows,
biases and convolution channels. From it follows the size of the dimension; `positions` says where its elements lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from vrscope.errors import FamilyError

_TOKEN = re.compile(r"\s*([A-Za-z_][\w]*(?:\{[^}]*\})?(?:\s*,\s*[A-Za-z_][\w]*(?:\{[^}]*\})?)*|[|*()])")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A space, or the alternatives of which the first one in use counts."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """Its body, once for every index of an axis."""

    axis: str
    body: Layout


@dataclass(frozen=True, slots=True)
class Concat:
    """Its parts, one after the other."""

    parts: tuple[Layout, ...]


Layout = Leaf | Repeat | Concat


def parse_layout(text: str, where: str) -> Layout:
    """Return the layout that `text` describes.

    Raises
    ------
    FamilyError
        If `text` is not a layout; `where` names the declaration.
    """
    layout = _parsed(text)
    if layout is None:
        message = f"{where}: {text!r} is not a layout. Write `a|b`, `n*(a|b)` or a name of a space."
        raise FamilyError(message)
    return layout


@cache  # families say the same again and again
def _parsed(text: str) -> Layout | None:
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match.group(1).replace(" ", ""))
        position = match.end()
    layout, rest = _concat(tokens) if tokens else (None, tokens)
    return None if rest else layout


def _concat(tokens: list[str]) -> tuple[Layout | None, list[str]]:
    parts: list[Layout] = []
    while True:
        part, tokens = _item(tokens)
        if part is None:
            return None, tokens
        parts.append(part)
        if not tokens or tokens[0] != "|":
            return (parts[0] if len(parts) == 1 else Concat(tuple(parts))), tokens
        tokens = tokens[1:]


def _item(tokens: list[str]) -> tuple[Layout | None, list[str]]:
    if not tokens or tokens[0] in {"|", "*", ")"}:
        return None, tokens
    if tokens[0] == "(":
        body, rest = _concat(tokens[1:])
        return (body, rest[1:]) if body is not None and rest and rest[0] == ")" else (None, tokens)
    if len(tokens) > 1 and tokens[1] == "*":
        body, rest = _item(tokens[2:])
        return (None, rest) if body is None else (Repeat(tokens[0], body), rest)
    return Leaf(tuple(tokens[0].split(","))), tokens[1:]


def leaves(layout: Layout) -> tuple[Leaf, ...]:
    """Return the leaves of a layout, in order."""
    if isinstance(layout, Leaf):
        return (layout,)
    parts = (layout.body,) if isinstance(layout, Repeat) else layout.parts
    return tuple(leaf for part in parts for leaf in leaves(part))


def choose(layout: Layout, pick: Callable[[tuple[str, ...]], str]) -> Layout:
    """Return the layout with every leaf reduced to the one name that `pick` returns."""
    if isinstance(layout, Leaf):
        return Leaf((pick(layout.names),))
    if isinstance(layout, Repeat):
        return Repeat(layout.axis, choose(layout.body, pick))
    return Concat(tuple(choose(part, pick) for part in layout.parts))


def length(
    layout: Layout, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], outer: tuple[str, ...] = ()
) -> tuple[int, dict[tuple[str, ...], int]]:
    """Return the number of elements as a constant plus, for each set of unknown axes, a factor.

    Parameters
    ----------
    layout
        A layout whose leaves have one name each.
    axes
        The axes of every space, for example `{"q": ("g", "r", "d")}`.
    sizes
        The axis sizes known so far; `h` always equals `g` times `r`.
    outer
        Axes that enclosing repetitions already run over.
    """
    if isinstance(layout, Leaf):
        free = [axis for axis in axes[layout.names[0]] if axis not in outer]
        known = math.prod(sizes[axis] for axis in free if axis in sizes)
        unknown = tuple(sorted(axis for axis in free if axis not in sizes))
        return (0, {unknown: known}) if unknown else (known, {})
    if isinstance(layout, Concat):
        constant, factors = 0, dict[tuple[str, ...], int]()
        for part in layout.parts:
            more, others = length(part, axes, sizes, outer)
            constant += more
            for unknown, factor in others.items():
                factors[unknown] = factors.get(unknown, 0) + factor
        return constant, factors
    constant, factors = length(layout.body, axes, sizes, outer + expand(layout.axis))
    times = sizes.get(layout.axis)
    if times is None:
        merged = {tuple(sorted((*unknown, layout.axis))): factor for unknown, factor in factors.items()}
        return 0, merged | ({(layout.axis,): constant} if constant else {})
    return constant * times, {unknown: factor * times for unknown, factor in factors.items()}


def expand(axis: str) -> tuple[str, ...]:
    """Return the axes that an axis name covers: `h` (heads) is KV groups times query heads per group."""
    return ("h", "g", "r") if axis == "h" else (axis,)
