"""The section on std over depth: one panel per role with its fitted law, and what the plan made of the widths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.report import figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Head, Section, Swatch, Table
from vrscope.report.columns import frame_of, head, kind_order, numbers, texts
from vrscope.report.text import MISSING, number, plus_minus
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_PANELS = 24  # roles drawn; the law table lists all
Floats = NDArray[np.float64]
Points = dict[int, list[float]]


@dataclass(frozen=True, slots=True)
class _Role:
    """What is known of one role over depth: layers counted from 1 to the values of its tensors there."""

    kind: str
    before: Points = field(default_factory=dict)
    after: Points = field(default_factory=dict)
    target: Points = field(default_factory=dict)


def depth(report: Report) -> Section | None:
    """Return std over layers, one panel per role, with the fitted depth law and the TVR target."""
    laws, matrices = frame_of(report, "depth_law"), frame_of(report, "matrices")
    blocks: list[Block] = []
    panels = _panels(_roles(report), _laws(laws))
    if panels is not None:
        blocks.append(panels)
    if laws is not None:
        blocks.append(_law_table(report, laws))
    if matrices is not None and _planned(matrices):
        blocks.append(_matrix_table(matrices))
    if not blocks:
        return None
    lead = (
        "How wide the weights of each role are, layer by layer. LIR (layer index rescaling) starts layer l at "
        "σ/\u2060√l, which is p = 0.5 in the fitted law std = σ₁·l⁻ᵖ; weights that keep their width have p = 0."
    )
    return Section("depth", "Standard deviation by layer and role", lead, tuple(blocks))


def _roles(report: Report) -> dict[str, _Role]:
    """Collect std by role and layer: measured, after the plan, and the target; zero std cannot be drawn."""
    roles: dict[str, _Role] = {}
    tensors, matrices = frame_of(report, "tensors"), frame_of(report, "matrices")
    if tensors is not None:
        std, ratio = numbers(tensors, "std"), numbers(tensors, "tvr_ratio")
        target = np.divide(std, ratio, out=np.full(len(std), np.nan), where=ratio > 0)
        for name, kind in zip(texts(tensors, "role"), texts(tensors, "kind"), strict=True):
            roles.setdefault(name, _Role(kind))
        _collect(tensors, std, {name: role.before for name, role in roles.items()})
        _collect(tensors, target, {n: role.target for n, role in roles.items() if role.kind == "linear"})
    if matrices is not None:
        for name in texts(matrices, "role"):
            roles.setdefault(name, _Role("linear"))
        _collect(matrices, numbers(matrices, "std_after"), {name: role.after for name, role in roles.items()})
        wanted = numbers(matrices, "target_std")
        if np.isfinite(wanted).any():
            for role in roles.values():
                role.target.clear()
            _collect(matrices, wanted, {name: role.target for name, role in roles.items()})
    return {name: role for name, role in roles.items() if role.before or role.after}


def _collect(frame: pd.DataFrame, values: Floats, into: dict[str, Points]) -> None:
    for role, layer, value in zip(texts(frame, "role"), numbers(frame, "layer"), values, strict=True):
        if role in into and value > 0 and not np.isnan(layer):
            into[role].setdefault(int(layer) + 1, []).append(float(value))


def _line(points: Points) -> figures.DepthLine | None:
    if not points:
        return None
    layers = sorted(points)
    middle, low, high = (np.array([f(points[layer]) for layer in layers]) for f in (np.median, np.min, np.max))
    return figures.DepthLine(np.array(layers, dtype=np.float64), middle, low, high)


def _panels(roles: dict[str, _Role], fitted: dict[str, tuple[figures.Law, float]]) -> Figures | None:
    names = [name for name in roles if name in fitted or not fitted]
    names.sort(key=lambda name: kind_order(roles[name].kind))
    if not names:
        return None
    items = []
    moved = any(_differ(roles[name]) for name in names)
    for k, name in enumerate(names[:_PANELS]):
        role = roles[name]
        alike = [other for other in roles.values() if other.kind == role.kind]
        limits = _limits([x for other in alike for x in (other.before, other.after, other.target)])
        law, sem = fitted.get(name, (None, 0.0))
        lines = (_line(role.before), _line(role.after) if _differ(role) else None)
        svg = figures.depth_panel(f"depth-{k}", lines, law, _line(role.target), limits)
        detail = "" if law is None else f"p = {plus_minus(law.p, sem)}"
        items.append(Figure(svg, name or MISSING, "", detail))
    legend = [Swatch("--series-0", "line", "std in the original" if moved else "std")]
    if moved:
        legend.append(Swatch("--series-1", "line", "std after the plan, where it differs"))
    if fitted:
        legend.append(Swatch("--law", "dash", "fitted law σ₁·l⁻ᵖ"))
        legend.append(Swatch("--yardstick", "dot", "LIR yardstick σ₁/\u2060√l"))
    if any(roles[name].target for name in names):
        legend.append(Swatch("--target", "line", "TVR target"))
    note = (
        "Panels of one kind share their scale. Where a layer has several tensors of a role, the line is their median."
    )
    if len(names) > _PANELS:
        note += f" {_PANELS} of {number(len(names))} roles are drawn; the tables have them all."
    return Figures(tuple(items), tuple(legend), small=True, note=note)


def _differ(role: _Role) -> bool:
    """Return whether the plan moved the std of a role anywhere by more than rounding."""
    ratios = [np.median(role.after[k]) / np.median(role.before[k]) for k in role.after if k in role.before]
    return any(abs(ratio - 1) > 1e-6 for ratio in ratios) or not role.before


def _limits(groups: list[Points]) -> tuple[float, float]:
    """Return axis limits over all values, at least a factor of 4 apart."""
    values = [value for points in groups for found in points.values() for value in found]
    low, high = min(values), max(values)
    middle, reach = np.sqrt(low * high), max(2.0, 1.25 * np.sqrt(high / low))
    return float(middle / reach), float(middle * reach)


def _laws(frame: pd.DataFrame | None) -> dict[str, tuple[figures.Law, float]]:
    """Return the law of each role with the standard error of its exponent."""
    if frame is None:
        return {}
    sigma, p, sem = (numbers(frame, c) for c in ("sigma_1", "exponent_p", "exponent_sem"))
    return {
        role: (figures.Law(float(sigma[k]), float(p[k])), float(sem[k]))
        for k, role in enumerate(texts(frame, "role"))
        if sigma[k] > 0 and np.isfinite(p[k])
    }


def _law_table(report: Report, frame: pd.DataFrame) -> Table:
    names = ("layers", "exponent_p", "sigma_1", "r_squared")
    layers, p, sigma, square = (numbers(frame, c) for c in names)
    sem = numbers(frame, "exponent_sem")
    heads = (head(report, "depth_law", "role", numeric=False), *(head(report, "depth_law", name) for name in names))
    rows = tuple(
        (
            Cell(role or MISSING, "name"),
            Cell(number(layers[k]), "num"),
            Cell(plus_minus(p[k], sem[k]), "num"),
            Cell(number(sigma[k]), "num"),
            Cell(number(square[k], 3), "num"),
        )
        for k, role in enumerate(texts(frame, "role"))
    )
    return Table("Fitted depth law per role (LIR: p = 0.5; flat: p = 0)", heads, rows)


def _planned(frame: pd.DataFrame) -> bool:
    """Return whether the plan moved any std, or had a target to move it to."""
    before, after = numbers(frame, "std_before"), numbers(frame, "std_after")
    moved = np.abs(after - before) > 1e-6 * before
    return bool(moved.any() or np.isfinite(numbers(frame, "target_std")).any())


def _matrix_table(frame: pd.DataFrame) -> Table:
    """Sum the matrices up by role: median std before and after the plan, and how far from the target, if it has one."""
    columns = {"std_before": "std before", "std_after": "std after", "target_std": "target", "left": "after / target"}
    data = {name: numbers(frame, name) for name in columns}
    shown = [name for name in columns if np.isfinite(data[name]).any()]
    groups: dict[str, list[int]] = {}
    for k, role in enumerate(texts(frame, "role")):
        groups.setdefault(role, []).append(k)
    heads = (Head("role"), *(Head(columns[name], "", "Median over layers.", numeric=True) for name in shown))
    rows = []
    for role, at in groups.items():
        known = {name: data[name][at][np.isfinite(data[name][at])] for name in shown}
        cells = (Cell(number(np.median(v)) if len(v) else MISSING, "num") for v in known.values())
        rows.append((Cell(role or MISSING, "name"), *cells))
    note = "after / target is what exact scales could not reach: 1 is on target." if "left" in shown else ""
    return Table("Width per role before and after the plan, median over layers", heads, tuple(rows), note)
