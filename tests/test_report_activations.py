"""The section on activations: what it shows, in which order, and that gaps and hostile names do it no harm."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from report_samples import HOSTILE

from vrscope.report.activations import activations
from vrscope.report.blocks import Figures, Table, Text
from vrscope.report.html import render
from vrscope.tables import Report
from vrscope.verdict import verdict


def frames() -> dict[str, pd.DataFrame]:
    layers = list(range(6))
    residual = pd.DataFrame(
        {
            "layer": layers,
            "top1": [1.0, 30, 2000, 2100, 2100, 40],
            "top2": [0.9, 20, 500, 510, 520, 30],
            "top3": [0.8, 10, 100, 110, 120, 20],
            "median_abs": [0.1, 0.5, 1.0, 1.2, 1.5, 2.0],
            "top1_ratio": [10.0, 60, 2000, 1750, 1400, 20],
            "massive": [False, False, True, True, True, False],
            "peak_channel": [3] * 6,
            "peak_position": [0] * 6,
        }
    )
    names = [f"layers.{k}.{role}.weight" for k in layers for role in ("q", "k", "down")]
    inputs = pd.DataFrame(
        {
            "tensor": names,
            "shared_with": [name.replace(".k.", ".q.") for name in names],
            "layer": [k for k in layers for _ in range(3)],
            "tokens": 64,
            "channel_spread": [float(k * k) for k in range(18)],
            "outlier_channels": 1,
        }
    )
    inputs.loc[17, "tensor"] = inputs.loc[17, "shared_with"] = HOSTILE
    experts = pd.DataFrame({"role": "mlp.w1", "layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "tokens": [5, 0, 3, 2]})
    return {"residual": residual, "activations": inputs, "outlier_dimensions": inputs.head(0), "experts": experts}


def test_the_section_shows_magnitudes_and_the_worst_inputs() -> None:
    section = activations(Report("analyze", {}, (), frames()))
    assert section is not None
    figure, layers, inputs, none, experts = section.blocks
    assert isinstance(figure, Figures) and [swatch.text for swatch in figure.legend][-1] == "median"
    assert "largest is 2,100 at layer 3" in figure.items[0].label
    assert figure.items[0].svg.count("var(--series-0)") and figure.items[0].svg.count("var(--ink)")
    assert isinstance(layers, Table) and "massive activations at 3 of 6 depths" in layers.fold
    assert [row[5].look for row in layers.rows] == ["num"] * 2 + ["num bad"] * 3 + ["num"]
    assert isinstance(inputs, Table) and len(inputs.rows) == 12
    spreads = [row[-2].text for row in inputs.rows]
    assert spreads[:3] == ["289", "225", "196"]  # numbers 17, 15 and 14; 16 shares its inputs with 15
    assert [row[1].text for row in inputs.rows[:3]] == ["0", "1", "0"]
    assert isinstance(none, Text) and "No input dimension" in none.text
    assert isinstance(experts, Table) and [row[3].text for row in experts.rows] == ["1", "0"]


def test_the_page_holds_the_section_and_hostile_names_stay_text() -> None:
    page = render(Report("analyze", {"model": "m"}, (), frames()))
    assert 'id="activations"' in page and "<script>alert(1)" not in page and "<img" not in page


@pytest.mark.parametrize("value", [math.nan, math.inf, None, 0.0, -1.0])
def test_values_that_cannot_be_drawn_leave_gaps(value: float | None) -> None:
    tables = frames()
    for name in ("top1", "top2", "top3", "median_abs"):
        tables["residual"][name] = tables["residual"][name].astype(object)
        tables["residual"].loc[2, name] = value
    assert 'id="activations"' in render(Report("analyze", {}, (), tables))
    for name in ("top1", "top2", "top3", "median_abs"):
        tables["residual"][name] = value
    section = activations(Report("analyze", {}, (), tables))
    assert section is not None and not isinstance(section.blocks[0], Figures)


def test_tables_without_columns_are_no_error() -> None:
    bare = {name: pd.DataFrame({"other": [1, 2]}) for name in frames()}
    section = activations(Report("analyze", {}, (), bare))
    assert section is not None
    assert activations(Report("analyze", {}, (), {})) is None
    render(Report("analyze", {}, (), bare))


def test_a_single_depth_is_drawn() -> None:
    tables = {"residual": frames()["residual"].head(1)}
    assert 'id="activations"' in render(Report("analyze", {}, (), tables))


def test_the_verdict_names_the_largest_state_the_most_uneven_input_and_idle_experts() -> None:
    tables = frames()
    tables["activations"] = pd.concat(
        [tables["activations"], pd.DataFrame([{"tensor": "pooler", "layer": None, "channel_spread": 1e6}])]
    )
    texts = [finding["text"] for finding in verdict(tables, {})]
    assert texts[0].startswith("Massive activations at 3 of 6 depths. Largest hidden state against its median: 2000")
    assert "2000 times, entering layer 2; the peak is at channel 3, position 0" in texts[0]
    assert "289 times the median one" in texts[1]
    assert texts[2] == "1 of 4 experts saw no token of this text."
