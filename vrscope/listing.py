"""What is supported, as text: one listing per table of the package. `vrscope list` and the README show these.

Each listing is `(headings, rows)`. It reads the tables themselves, so a new entry appears everywhere by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vrscope.errors import UnknownNameError

if TYPE_CHECKING:
    from vrscope.arch.flow import Family, Operation
    from vrscope.quant.formats import ScaleScope

Listing = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]


def listing(kind: str) -> Listing:
    """Return the headings and rows of one listing.

    Parameters
    ----------
    kind
        "families", "formats", "statistics" or "methods".

    Raises
    ------
    UnknownNameError
        If there is no such listing.
    """
    if kind not in _LISTINGS:
        raise UnknownNameError.of("listing", kind, _LISTINGS)  # noqa: EM101
    return _LISTINGS[kind]()


def _families() -> Listing:
    """Return one row per kind of rescale: families that differ in names alone share that of the first."""
    from vrscope.arch.families import families

    rows: dict[tuple[str, str, str], list[Family]] = {}
    for family in families():
        gains = sorted({line.gain for lines in family.lines.values() for line in lines if line.kind == "norm"})
        through = {_operation(operation) for operation in family.operations} - {""}
        through |= {"conv" for lines in family.lines.values() for line in lines if line.kind == "conv"}
        rows.setdefault((family.rope, " ".join(gains) or "none", "; ".join(sorted(through))), []).append(family)
    return ("family", "model_type", "rope", "norm gain", "scales move through"), [
        (alike[0].name, ", ".join(dict.fromkeys(name for family in alike for name in family.model_types)), *kind)
        for kind, alike in rows.items()
    ]


def _operation(operation: Operation) -> str:
    if operation.kind in {"opaque", "add"}:  # nothing passes the one; the other only says what shares a stream
        return ""
    spaces = " ".join((*operation.inputs, *(("->", *operation.outputs) if operation.outputs else ())))
    return f"{operation.kind} {spaces.replace('{x}', '')}"


def _formats() -> Listing:
    from vrscope.quant.formats import FORMATS

    rows = [(f.name, f"{f.bits_per_weight:.3g}", f.engine, _scope(f.scope), f.meaning) for f in FORMATS]
    return ("format", "bits per weight", "engine", "one scale per", "meaning"), rows


def _statistics() -> Listing:
    from vrscope.activations.statistics import ACTIVATION_STATISTICS
    from vrscope.stats.statistics import SPECTRAL_STATISTICS, STATISTICS

    rows = [(s.name, "weights", s.unit, s.meaning) for s in STATISTICS]
    rows += [(s.name, "weights", s.unit, f"{s.meaning} With --spectral.") for s in SPECTRAL_STATISTICS]
    rows += [(s.name, "activations", s.unit, s.meaning) for s in ACTIVATION_STATISTICS]
    return ("statistic", "of", "unit", "meaning"), rows


def _methods() -> Listing:
    from vrscope.rescale.methods import METHODS

    rows = [(m.name, ", ".join(name.replace("_", "-") for name in m.uses), m.meaning) for m in METHODS]
    return ("method", "options", "meaning"), rows


def _scope(scope: ScaleScope) -> str:
    size = f" of {scope.size}" if scope.size else ""
    return f"{scope.kind}{size}{', itself quantized' if scope.nested else ''}"


_LISTINGS: Mapping[str, Callable[[], Listing]] = {
    "families": _families,
    "formats": _formats,
    "statistics": _statistics,
    "methods": _methods,
}
