"""Which declared line claims which tensor of a checkpoint.

Strict on purpose: a tensor that no line claims, or a declared one that is missing, means that the declaration does not
describe this file, and a rescale that trusted it could change the model. Then nothing is bound.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vrscope.arch.flow import TOP, Family, Line
from vrscope.checkpoint.source import TensorInfo
from vrscope.errors import FamilyError

Indices = tuple[tuple[str, int], ...]  # placeholder values without the layer: (("x", 3),)


@dataclass(slots=True)
class Claimed:
    """The tensors of one line in one layer, for one set of indices."""

    line: Line
    scope: str
    layer: int | None
    indices: Indices
    weight: TensorInfo | None = None
    bias: TensorInfo | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """All claims of a family on a checkpoint, with the prefix that fits; `ignored` are tolerated buffers."""

    prefix: str
    claims: tuple[Claimed, ...]
    layers: Mapping[str, int]
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A name with placeholders, ready to be compared part by part."""

    parts: tuple[str, ...]
    line: Line | None
    scope: str
    which: str  # "weight", "bias" or "ignored"

    @property
    def key(self) -> str:
        return ".".join("#" if part.isdigit() or _placeholder(part) else part for part in self.parts)


def match(family: Family, tensors: Mapping[str, TensorInfo], counts: Mapping[str, int]) -> Match:
    """Return the claims of `family` on all of `tensors`.

    Parameters
    ----------
    family
        The declaration.
    tensors
        Every tensor of the checkpoint.
    counts
        Number of layers in each stack, from the configuration.

    Raises
    ------
    FamilyError
        If a tensor is claimed by no line, or a required one is missing, under every prefix the family knows. The
        message is that of the prefix that fits best.
    """
    best: tuple[int, FamilyError] | None = None
    for prefix in family.prefixes:
        claims, ignored, strays = _claim(family, prefix, tensors)
        problem = _stray(family, strays, tensors) or _missing(family, claims, counts, prefix)
        if problem is None:
            return Match(prefix, tuple(claims.values()), counts, tuple(ignored))
        if best is None or len(strays) < best[0]:
            best = (len(strays), problem)
    if best is None:
        message = f"family {family.name!r} has no prefix, so no tensor can be claimed. Give it prefixes = ['']."
        raise FamilyError(message)
    raise best[1]


def _claim(
    family: Family, prefix: str, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[tuple[object, ...], Claimed], list[str], list[str]]:
    patterns = defaultdict(list)
    for pattern in _patterns(family, prefix):
        patterns[pattern.key].append(pattern)
    claims: dict[tuple[object, ...], Claimed] = {}
    ignored, strays = list[str](), list[str]()
    for name in tensors:
        parts = tuple(name.split("."))
        key = ".".join("#" if part.isdigit() else part for part in parts)
        for pattern in patterns.get(key, ()):
            found = _indices(pattern.parts, parts)
            if found is None:
                continue
            if pattern.line is None:
                ignored.append(name)
                break
            layer = found.pop("i", None)
            indices = tuple(sorted(found.items()))
            at = (pattern.line.stem, pattern.scope, layer, indices)
            claim = claims.setdefault(at, Claimed(pattern.line, pattern.scope, layer, indices))
            if getattr(claim, pattern.which) is not None:
                message = (
                    f"{name}: family {family.name!r} expects one {pattern.which} there, found "
                    f"{getattr(claim, pattern.which).name} as well. Remove the one that is not used."
                )
                raise FamilyError(message)
            setattr(claim, pattern.which, tensors[name])
            break
        else:
            (ignored if name.startswith(family.aside) else strays).append(name)
    return claims, ignored, strays


def _patterns(family: Family, prefix: str) -> Iterable[_Pattern]:
    for scope, lines in family.lines.items():
        path = "" if scope == TOP else family.stacks[scope].path
        for line in lines:
            stem = (path + line.stem).replace("{p}", prefix)
            weights, biases = line.suffixes
            for suffix in weights:
                yield _Pattern(tuple((stem + suffix).split(".")), line, scope, "weight")
            for suffix in biases if line.bias != "none" else ():
                yield _Pattern(tuple((stem + suffix).split(".")), line, scope, "bias")
    for name in family.ignore:
        yield _Pattern(tuple(name.replace("{p}", prefix).split(".")), None, TOP, "ignored")


def _placeholder(part: str) -> str | None:
    return part[1:-1] if re.fullmatch(r"\{[ixhg]\}", part) else None


def _indices(pattern: tuple[str, ...], parts: tuple[str, ...]) -> dict[str, int] | None:
    """Return the placeholder values if `parts` is an instance of `pattern`; "01" is not a layer number."""
    found: dict[str, int] = {}
    for expected, part in zip(pattern, parts, strict=True):
        place = _placeholder(expected)
        if place is None:
            if expected != part:
                return None
        elif part.isascii() and part.isdigit() and str(int(part)) == part:
            found[place] = int(part)
        else:
            return None
    return found


def _stray(family: Family, strays: list[str], tensors: Mapping[str, TensorInfo]) -> FamilyError | None:
    if not strays:
        return None
    shown = ", ".join(repr(name) for name in strays[:3]) + (f" and {len(strays) - 3} more" if len(strays) > 3 else "")
    return FamilyError(
        f"{shown} ({tensors[strays[0]].shard}): not claimed by family {family.name!r}, so a rescale could change the "
        "model's output. Declare the tensor in the family; `vrscope analyze` and `measure` work without one."
    )


def _missing(
    family: Family, claims: Mapping[tuple[object, ...], Claimed], counts: Mapping[str, int], prefix: str
) -> FamilyError | None:
    present: dict[tuple[str, str, int | None], list[Claimed]] = defaultdict(list)
    for claim in claims.values():
        present[claim.line.stem, claim.scope, claim.layer].append(claim)
        layers = counts.get(claim.scope)
        if layers is not None and claim.layer is not None and claim.layer >= layers:
            expected = f"{layers} layers in config.json"
            return _refusal(family, _full(family, claim.scope, claim.line, prefix, claim.layer), expected, "one more")
    for scope, lines in family.lines.items():
        for layer in [None] if scope == TOP else range(counts[scope]):
            numbers: set[tuple[Indices, ...]] = set()
            problem = _sets(family, lines, {stem for stem, s, at in present if (s, at) == (scope, layer)})
            if problem is not None:
                return _refusal(family, _full_path(family, scope, prefix, layer) + problem[0], *problem[1:])
            for line in lines:
                found = present.get((line.stem, scope, layer), [])
                name = _full(family, scope, line, prefix, layer)
                if not found and line.required:
                    return _refusal(family, name, "a tensor of that name", "none")
                for claim in found:
                    if claim.weight is None:
                        return _refusal(family, name, "its weight", "only a bias")
                    if claim.bias is None and line.bias == "required":
                        return _refusal(family, name, "a bias", "only the weight")
                if found and "{x}" in line.stem:
                    numbers.add(tuple(sorted(claim.indices for claim in found)))
            if len(numbers) > 1 or any(row != tuple((("x", n),) for n in range(len(row))) for row in numbers):
                path = _full_path(family, scope, prefix, layer)
                return _refusal(family, path, "the same experts, counted from 0, for every matrix", "different ones")
    return None


def _sets(family: Family, lines: Iterable[Line], present: set[str]) -> tuple[str, str, str] | None:
    """Return where, expected and found if a layer has part of a set of lines, or not exactly one of several sets."""
    sets: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if line.group:
            sets[line.group].append(line.stem)
    for stems in sets.values():
        absent = [stem for stem in stems if stem not in present]
        if absent and len(absent) < len(stems):
            return absent[0], "a tensor of that name", "none"
    for names in family.one_of:
        held = [name for name in names if name in sets and sets[name][0] in present]
        if any(name in sets for name in names) and len(held) != 1:
            stems = [sets[name][0] for name in names if name in sets]
            return stems[0], f"one of {', '.join(stems)}", "several" if held else "none"
    return None


def _full_path(family: Family, scope: str, prefix: str, layer: int | None) -> str:
    path = "" if scope == TOP else family.stacks[scope].path
    return path.replace("{p}", prefix).replace("{i}", str(layer))


def _full(family: Family, scope: str, line: Line, prefix: str, layer: int | None) -> str:
    return _full_path(family, scope, prefix, layer) + line.stem.replace("{p}", prefix)


def _refusal(family: Family, where: str, expected: str, found: str) -> FamilyError:
    return FamilyError(
        f"{where}: family {family.name!r} expects {expected}, found {found}. The file is incomplete or of another "
        "architecture, so it is not rescaled; `vrscope analyze` and `measure` work without a family."
    )
