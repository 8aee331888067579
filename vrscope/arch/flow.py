"""The declaration of an architecture: one line per tensor saying what it reads and writes, one per operation.

`families.toml` holds the declarations; this module reads them strictly (an unknown key is an error) and knows nothing
of any family or checkpoint. A tensor line is `stem = "reads -> writes"`; the stem of an optional tensor ends in `?`,
one of an optional set in `?set`. Before the arrow stands nothing (a matrix), `embed`, `norm[axes]` or `conv`; the word
`fixed` alone means that no scale ever touches the tensor. Operations without weights are `dot`, `pass`, `gated`, `act`,
`add` and, for everything no scale passes through, `opaque`.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrscope.arch.layout import Layout, parse_layout
from vrscope.errors import FamilyError

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, before it joined the standard library
    import tomli as tomllib

TOP = "top"  # the scope of lines that stand outside every stack of layers
OPERATIONS = {"dot": (2, 0), "pass": (1, 1), "gated": (2, 1), "act": (1, 1), "add": (1, 1)}  # inputs, outputs
OPAQUE = "opaque"  # any number of both
RIGID, RESIDUAL = "rigid", "residual"
KINDS = (RIGID, RESIDUAL)  # of spaces: no scale at all, or one that every layer's writers share
_LINE = re.compile(r"(?:(?P<kind>embed|norm|conv)(?:\[(?P<axes>[^\]]*)\])?\s+)?(?P<reads>.+?)\s*->\s*(?P<writes>.+)")


@dataclass(frozen=True, slots=True)
class Line:
    """One declared tensor stem.

    Attributes
    ----------
    stem
        Name on disk without its last part (`weight`, `bias`); `{p}` is the prefix, `{i}` the layer, `{x}` an expert.
    kind
        "linear", "embed", "norm", "conv" or "fixed".
    reads, writes
        Layouts of the input and output dimension; None for "fixed".
    required
        Whether every layer (or, outside the layers, the file) must have it.
    group
        Name of the set of optional lines it belongs to, which a layer has all or none of; "" = none.
    dims
        What each stored dimension of the weight is; a word that stands twice spreads over both dimensions.
    bias
        "none", "optional" or "required".
    gain
        "w", or "1+w" where the stored gain is the real one minus one.
    axes
        For a norm, the axes it normalises over and its gain runs along; empty = the whole space.
    eps
        For a norm, where its eps stands: alternatives parted by `|`, each a configuration key or a number.
    suffixes
        Names of weight and bias, behind the stem; the weight's may be empty (`{x}.down_proj_bias`).
    """

    stem: str
    kind: str
    reads: Layout | None
    writes: Layout | None
    required: bool
    group: str
    dims: tuple[str, ...]
    bias: str
    gain: str
    axes: tuple[str, ...]
    eps: str
    suffixes: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation without weights: name, kind, input spaces, output spaces and RoPE axis (None = no rotation)."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rope: str | None


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of layers: the path of one layer, the configuration key that counts them, and axis sizes of its own."""

    path: str
    count: str
    sizes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """A declared architecture; the fields are the keys of its table in `families.toml`.

    Attributes
    ----------
    name
        Name of the declaration.
    model_types
        The `model_type` values of config.json that it covers.
    when
        Configuration values that must hold for it, for example `{"do_layer_norm_before": False}`; a silent
        configuration counts as the value in `unless_said`.
    prefixes
        The texts `{p}` may stand for; one of them must fit the whole file.
    stacks
        The stacks of layers by scope.
    lines
        The tensor lines by scope; scope "top" stands outside the layers.
    operations
        Operations, tried in every scope.
    spaces
        Space name to `(axes, kind)`; a name with a placeholder stands for every index. The kind is "" or one of
        `KINDS`.
    sizes
        Axis to the expression that gives its size from the configuration.
    rope
        Pair layout: "half", "interleaved" or "none"; `rotary` is the expression of the rotated share of the head.
    act
        Configuration key of the activation; alternatives are parted by `|`, one in quotes is the name itself.
    tied
        Head stem, embedding stem, and whether they are tied when the configuration is silent; None = never tied.
    one_of
        Sets of lines of which every layer that can have them has exactly one.
    require
        Configuration keys that, if they are there, must have this value: any other makes the declaration invalid.
    refuse
        Configuration keys that make the declaration invalid when set, with the reason.
    ignore
        Buffers that may lie in the file and that no scale touches.
    inside
        Key under which a configuration nests that of the declared model, "" = it does not.
    aside
        Beginnings of the names of whole parts, such as a vision tower, that only write into the residual stream.
    """

    name: str
    model_types: tuple[str, ...]
    when: Mapping[str, Any]
    unless_said: Mapping[str, Any]
    prefixes: tuple[str, ...]
    stacks: Mapping[str, Stack]
    lines: Mapping[str, tuple[Line, ...]]
    operations: tuple[Operation, ...]
    spaces: Mapping[str, tuple[tuple[str, ...], str]]
    sizes: Mapping[str, str]
    rope: str
    rotary: str
    act: str | None
    tied: tuple[str, str, bool] | None
    one_of: tuple[tuple[str, ...], ...]
    refuse: Mapping[str, str]
    require: Mapping[str, Any]
    ignore: tuple[str, ...]
    inside: str
    aside: tuple[str, ...]


DEFAULTS: Mapping[str, Any] = {
    "model_types": [],
    "when": {},
    "unless_said": {},
    "prefixes": [""],
    "stacks": {},
    "op": {},
    "spaces": {},
    "sizes": {},
    "rope": "none",
    "rotary": "",
    "act": "",
    "tied": {},
    "one_of": [],
    "refuse": {},
    "require": {},
    "ignore": [],
    "inside": "",
    "aside": [],
    "dims": "out in",
    "bias": "optional",
    "norm_bias": "none",
    "gain": "w",
    "eps": "",
}


def read_families(path: Path, base: Path | None = None, model_type: str | None = None) -> tuple[Family, ...]:
    """Return the families declared in a TOML file, in order.

    Parameters
    ----------
    path
        The file.
    base
        Another such file whose families those of `path` may be `like`, and whose prelude they share. Its own families
        come after those of `path`, so that the latter are found first.
    model_type
        Leave out, without looking at them, the families that are not for it.

    Raises
    ------
    FamilyError
        If a file is not TOML, holds an unknown key, a line does not parse, or `path` declares a name of `base` again;
        the message names the place.
    """
    tables, known = _tables(path), {} if base is None else _tables(base)
    prelude = _merge(known.pop("prelude", {}), tables.pop("prelude", {}))
    again = sorted(set(tables) & set(known))
    if again:
        message = f"{path}: [{again[0]}] is declared already. Choose another name; model_types may be the same."
        raise FamilyError(message)
    every = {**tables, **known}
    wanted = [name for name in every if model_type is None or model_type in every[name].get("model_types", ())]
    return tuple(_family(name, _inherit(name, every), prelude) for name in wanted)


def _tables(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: not a readable TOML file of families ({error})."
        raise FamilyError(message) from error
    wrong = sorted(name for name, table in tables.items() if not isinstance(table, Mapping))
    if wrong:
        message = f"{path}: {wrong[0]!r} is not a table. Each family is a table: [name]."
        raise FamilyError(message)
    return tables


def _inherit(name: str, tables: Mapping[str, Any], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    table: dict[str, Any] = copy.deepcopy(tables[name])
    parent = table.pop("like", None)
    if parent is None:
        return table
    if parent not in tables or parent in seen:
        message = f"[{name}]: like = {parent!r} names no earlier family. Declared: {', '.join(tables)}."
        raise FamilyError(message)
    base = _inherit(parent, tables, (*seen, name))
    base.pop("model_types", None)
    for stem in table.pop("drop", []):
        holders = [lines for lines in base.values() if isinstance(lines, dict) and _spelled(lines, stem)]
        if not holders:
            message = f"[{name}].drop: {parent!r} has no line {stem!r}."
            raise FamilyError(message)
        for lines in holders:
            for key in _spelled(lines, stem):
                del lines[key]
    return _merge(base, table)


def _spelled(lines: Mapping[str, Any], stem: str) -> list[str]:
    """Return the keys that declare a stem: `stem`, `stem?` or `stem?set`."""
    return [key for key in lines if key.partition("?")[0] == stem]


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the entries of `over`: `stem` replaces `stem?` and the reverse; "" or {} removes an entry."""
    merged = dict(base)
    for key, value in over.items():
        twins = _spelled(merged, key.partition("?")[0])
        if value and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
            continue
        for old in twins:
            del merged[old]
        if value != "" or not twins:
            merged[key] = value
    return merged


def _family(name: str, table: Mapping[str, Any], prelude: Mapping[str, Any]) -> Family:
    scopes = {TOP, *table.get("stacks", {})}
    unknown = sorted(set(table) - set(DEFAULTS) - scopes)
    if unknown:
        message = (
            f"[{name}]: unknown key {unknown[0]!r}. Known: {', '.join([*DEFAULTS, *sorted(scopes), 'like', 'drop'])}."
        )
        raise FamilyError(message)
    get = dict(DEFAULTS) | dict(table)
    spaces = dict(prelude.get("spaces", {})) | get["spaces"]
    tied = get["tied"]
    if tied and set(tied) != {"head", "embedding", "default"}:
        message = f"[{name}].tied: expected head, embedding and default, found {', '.join(tied)}."
        raise FamilyError(message)
    return Family(
        name=name,
        model_types=tuple(get["model_types"]),
        when=get["when"],
        unless_said=get["unless_said"],
        prefixes=tuple(get["prefixes"]),
        stacks={scope: _stack(f"[{name}].stacks.{scope}", stack) for scope, stack in get["stacks"].items()},
        lines={
            scope: tuple(_line(f"[{name}].{scope}", stem, value, get) for stem, value in get.get(scope, {}).items())
            for scope in (TOP, *get["stacks"])
        },
        operations=tuple(_operation(f"[{name}].op.{key}", key, text) for key, text in get["op"].items()),
        spaces={unnumbered(key): _space(f"[{name}].spaces.{key}", text) for key, text in spaces.items()},
        sizes=dict(prelude.get("sizes", {})) | get["sizes"],
        rope=_one_of(f"[{name}].rope", get["rope"], ("half", "interleaved", "none")),
        rotary=str(get["rotary"] or prelude.get("rotary", "1")),
        act=get["act"] or None,
        tied=(tied["head"], tied["embedding"], bool(tied["default"])) if tied else None,
        one_of=tuple(tuple(groups) for groups in get["one_of"]),
        refuse=get["refuse"],
        require=get["require"],
        ignore=(*prelude.get("ignore", []), *get["ignore"]),
        inside=get["inside"],
        aside=tuple(get["aside"]),
    )


def _stack(where: str, table: Mapping[str, Any]) -> Stack:
    if set(table) - {"sizes"} != {"path", "count"} or "{i}" not in table["path"]:
        message = f"{where}: expected path (with {{i}} for the layer), count and perhaps sizes, found {dict(table)}."
        raise FamilyError(message)
    return Stack(table["path"], table["count"], table.get("sizes", {}))


def _line(where: str, key: str, value: str | Mapping[str, Any], family: Mapping[str, Any]) -> Line:
    options = {"flow": value} if isinstance(value, str) else dict(value)
    unknown = set(options) - {"flow", "dims", "bias", "gain", "eps", "weight", "shift"}
    flow = str(options.get("flow", ""))
    match = _LINE.fullmatch(flow.strip())
    (stem, optional, group), where = key.partition("?"), f"{where}.{key!r}"
    if unknown or (match is None and flow.strip() != "fixed"):
        found = f"unknown option {sorted(unknown)[0]!r}" if unknown else f"{flow!r}"
        message = f"{where}: expected 'reads -> writes', 'fixed' or a table with flow, dims, bias, gain; found {found}."
        raise FamilyError(message)
    kind = "fixed" if match is None else match["kind"] or "linear"
    norm = kind == "norm"
    dims = {"embed": "in out", "norm": "out", "conv": "out single taps"}.get(kind, family["dims"])
    usual = {"fixed": "optional", "embed": "none", "norm": family["norm_bias"]}.get(kind, family["bias"])
    return Line(
        stem=stem,
        kind=kind,
        reads=None if match is None else parse_layout(match["reads"], where),
        writes=None if match is None else parse_layout(match["writes"], where),
        required=not optional,
        group=group,
        dims=tuple(str(options.get("dims", dims)).split()),
        bias=_one_of(f"{where}.bias", options.get("bias", usual), ("none", "optional", "required")),
        gain=_one_of(f"{where}.gain", options.get("gain", family["gain"] if norm else "w"), ("w", "1+w")),
        axes=tuple((match["axes"] or "").split()) if match is not None else (),
        eps=str(options.get("eps", family["eps"])) if norm else "",
        suffixes=(
            (options["weight"],) if "weight" in options else (".weight", ".gamma") if norm else (".weight", ""),
            (options["shift"],) if "shift" in options else (".bias", ".beta") if norm else (".bias",),
        ),
    )


def _operation(where: str, name: str, text: str) -> Operation:
    before, _, after = text.partition("->")
    words = before.split()
    rope = next((word.removeprefix("rope:") for word in words if word.startswith("rope:")), None)
    kind, *inputs = [word for word in words if not word.startswith("rope:")] or [""]
    outputs = after.split()
    if OPERATIONS.get(kind) != (len(inputs), len(outputs)) and not (kind == OPAQUE and inputs):
        message = f"{where}: expected an operation such as 'dot q k rope:d' or 'gated gate up -> h', found {text!r}."
        raise FamilyError(message)
    return Operation(name, kind, tuple(inputs), tuple(outputs), rope)


def _space(where: str, text: str) -> tuple[tuple[str, ...], str]:
    words = text.split()
    if not words or not all(re.fullmatch(r"[A-Za-z]\w*", word) for word in words):
        message = f"{where}: expected axis names, and optionally {' or '.join(KINDS)}, found {text!r}."
        raise FamilyError(message)
    return tuple(word for word in words if word not in KINDS), next((word for word in words if word in KINDS), "")


def _one_of(where: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        message = f"{where}: expected one of {', '.join(known)}, found {value!r}."
        raise FamilyError(message)
    return value


def unnumbered(name: str) -> str:
    """Return the name of a space with its placeholders emptied: how a family declares it."""
    return re.sub(r"\{[^}]*\}", "{}", name)
