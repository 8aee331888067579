"""The section on activations: the hidden state by layer, the worst linear inputs, outlier dimensions, experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vrscope.report import figures
from vrscope.report.blocks import Block, Cell, Figure, Figures, Head, Section, Swatch, Table, Text
from vrscope.report.columns import flags, frame_of, head, numbers, texts
from vrscope.report.text import MISSING, number
from vrscope.tables import Report

if TYPE_CHECKING:
    import pandas as pd

_WORST, _DIMENSIONS = 12, 40
_TOPS = ("top1", "top2", "top3")


def activations(report: Report) -> Section | None:
    """Return what flows through the model: the hidden state by layer, linear inputs, outlier dimensions, experts."""
    blocks: list[Block] = []
    residual, inputs = frame_of(report, "residual"), frame_of(report, "activations")
    outliers, experts = frame_of(report, "outlier_dimensions"), frame_of(report, "experts")
    if residual is not None:
        blocks += _magnitudes(residual)
        blocks.append(_layer_table(report, residual))
    if inputs is not None:
        blocks.append(_input_table(report, inputs))
    if outliers is not None:
        blocks.append(_outlier_table(report, outliers))
    elif inputs is not None and "outlier_dimensions" in report.tables:
        blocks.append(Text("No input dimension is an outlier dimension of LLM.int8."))
    if experts is not None:
        blocks.append(_expert_table(experts))
    if not blocks:
        return None
    lead = (
        "What flows through the model on the text. A few values of the hidden state may be thousands of times larger "
        "than the rest (massive activations), mostly at the first token; input channels of very different reach are "
        "what makes activations hard to quantize."
    )
    return Section("activations", "Activations", lead, tuple(blocks))


def _magnitudes(frame: pd.DataFrame) -> list[Block]:
    """Draw the three largest magnitudes and the median over layers, if any can stand on a log axis."""
    layers = numbers(frame, "layer")
    lines = [numbers(frame, name) for name in (*_TOPS, "median_abs")]
    known = np.isfinite(layers)
    if not any((line[known] > 0).any() for line in lines):
        return []
    top = np.nan_to_num(lines[0], nan=-np.inf)
    worst = int(np.argmax(np.where(known, top, -np.inf)))
    label = (
        f"Largest, second and third largest and median magnitude over {int(known.sum())} depths; the largest is "
        f"{number(top[worst])} at layer {number(layers[worst])}, where the median is {number(lines[-1][worst])}."
    )
    svg = figures.magnitude_lines(layers[known], [line[known] for line in lines], label)
    names = ("largest", "second largest", "third largest")
    legend = [Swatch(f"--series-{k}", "line", name) for k, name in enumerate(names)]
    legend.append(Swatch("--ink", "line", "median"))
    note = "The three largest of each window of the text and the median of all values; means over windows."
    return [Figures((Figure(svg, "Magnitudes of the hidden state by layer", label),), tuple(legend), note=note)]


def _layer_table(report: Report, frame: pd.DataFrame) -> Table:
    columns = (
        *_TOPS,
        "median_abs",
        "top1_ratio",
        "over_1000",
        "absmax",
        "peak_window",
        "peak_position",
        "peak_channel",
    )
    labels = {"absmax": "peak"} | {
        "top1": "largest",
        "top2": "second",
        "top3": "third",
        "median_abs": "median",
        "top1_ratio": "ratio",
    }
    data = {name: numbers(frame, name) for name in columns}
    heads = [
        head(report, "residual", "layer"),
        *(head(report, "residual", n, label=labels.get(n, "")) for n in columns),
    ]
    massive = flags(frame, "massive")
    layers = numbers(frame, "layer")
    rows = []
    for k in range(len(frame)):
        cells = [Cell(number(data[name][k]), "num") for name in columns]
        if massive[k]:
            ratio = columns.index("top1_ratio")
            cells[ratio] = Cell(cells[ratio].text, "num bad")
        rows.append((Cell(number(layers[k]), "num"), *cells))
    found = sum(item is True for item in massive)
    fold = f"Show all: massive activations at {found} of {number(len(rows))} depths"
    note = "Massive: above 100 and at least 1000 times the median."
    return Table("Hidden state at the entry of each layer", tuple(heads), tuple(rows), note, fold)


def _input_table(report: Report, frame: pd.DataFrame) -> Table:
    columns = ("tokens", "absmax", "mean_abs", "std", "kurtosis_excess", "channel_spread", "outlier_channels")
    labels = {"absmax": "|x| max", "mean_abs": "mean |x|"}
    data = {name: numbers(frame, name) for name in columns}
    names, firsts = texts(frame, "tensor"), texts(frame, "shared_with")
    followers: dict[str, int] = {}
    for name, first in zip(names, firsts, strict=True):
        followers[first or name] = followers.get(first or name, 0) + 1
    own = [k for k, name in enumerate(names) if (firsts[k] or name) == name]
    spread = np.where(np.isnan(data["channel_spread"]), -1.0, data["channel_spread"])
    own.sort(key=lambda k: -spread[k])
    heads = (
        Head("input of"),
        Head("also of", "", "How many more weights have the same inputs.", numeric=True),
        *(head(report, "activations", name, label=labels.get(name, "")) for name in columns),
    )
    rows = tuple(
        (
            Cell(names[k] or MISSING, "name"),
            Cell(number(followers[names[k]] - 1), "num"),
            *(Cell(number(data[name][k]), "num") for name in columns),
        )
        for k in own[:_WORST]
    )
    caption = f"Linear inputs with the most uneven channels, {len(rows)} of {number(len(own))}"
    return Table(caption, heads, rows)


def _outlier_table(report: Report, frame: pd.DataFrame) -> Table:
    columns = ("channel", "layers", "layer_share", "position_share", "absmax")
    data = {name: numbers(frame, name) for name in columns}
    roles = texts(frame, "roles")
    heads = [head(report, "outlier_dimensions", "roles", numeric=False, label="inputs of")]
    heads += [head(report, "outlier_dimensions", name, label="|x| max" if name == "absmax" else "") for name in columns]
    order = np.argsort(-np.nan_to_num(data["layer_share"]), kind="stable")[:_DIMENSIONS].tolist()
    rows = tuple(
        (Cell(roles[k] or MISSING, "name wide"), *(Cell(number(data[name][k]), "num") for name in columns))
        for k in order
    )
    note = "Magnitude 6 or more at 6 % of the positions or more, in a quarter of the layers or more."
    fold = f"Show {len(rows)} of {number(len(frame))}" if len(frame) > 10 else ""
    return Table("Outlier dimensions of LLM.int8", tuple(heads), rows, note, fold)


def _expert_table(frame: pd.DataFrame) -> Table:
    tokens, layers, roles = numbers(frame, "tokens"), numbers(frame, "layer"), texts(frame, "role")
    groups: dict[tuple[str, float], list[int]] = {}
    for k, role in enumerate(roles):
        groups.setdefault((role, float(layers[k])), []).append(k)
    heads = (
        Head("role"),
        Head("layer", numeric=True),
        Head("experts", numeric=True),
        Head(
            "without tokens", "experts", "How many were never chosen: nothing is known of their inputs.", numeric=True
        ),
        Head("fewest", "tokens", "Tokens of the expert with the fewest.", numeric=True),
        Head("most", "tokens", "Tokens of the expert with the most.", numeric=True),
    )
    rows = []
    for (role, layer), at in groups.items():
        idle = int((tokens[at] == 0).sum())
        cells = [number(layer), number(len(at)), number(idle), number(tokens[at].min()), number(tokens[at].max())]
        looks = ["num", "num", "num bad" if idle else "num", "num", "num"]
        rows.append((Cell(role or MISSING, "name"), *(Cell(t, look) for t, look in zip(cells, looks, strict=True))))
    return Table("Tokens of the experts", heads, tuple(rows), fold=f"Show all: {number(len(rows))} groups of experts")
