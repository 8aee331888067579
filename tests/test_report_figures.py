"""The figures: what is drawn is where the numbers say, and no name or setting of a user changes the drawing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
import report_samples as samples
from scipy import stats

from vrscope.report import figures, svg, text
from vrscope.report.damage import _groups

SVG = "{http://www.w3.org/2000/svg}"


def paths(drawing: str, colour: str, paint: str = "fill") -> list[np.ndarray]:
    """Return the corner points, shape (points, 2), of every path in one colour."""
    wanted = f"{paint}: var(--{colour})"
    found = [e.attrib["d"] for e in ET.fromstring(drawing).iter(f"{SVG}path") if wanted in e.attrib.get("style", "")]
    return [np.array([[float(x), float(y)] for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)]) for d in found]


def words(drawing: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(drawing).iter(f"{SVG}text")]


def test_bars_are_as_long_as_their_values_and_carry_error_bars() -> None:
    values, sems = np.array([0.2, 0.1, 0.3]), np.array([0.02, 0.01, 0.03])
    bars = [figures.Bars("a", values, sems), figures.Bars("b", values / 2, sems)]
    drawing = figures.damage_bars([[0, 1, 2]], ["x", "y", "z"], bars, "mean KL, nats per token")
    for colour, scale in (("series-0", 1.0), ("series-1", 0.5)):
        lengths = np.array([np.ptp(corners[:, 0]) for corners in paths(drawing, colour)])
        np.testing.assert_allclose(lengths / lengths.max(), values * scale / (scale * 0.3), rtol=2e-3)
    whole = np.ptp(paths(drawing, "series-0")[2][:, 0])
    spans = [np.ptp(p[:, 0]) for p in paths(drawing, "ink", "stroke") if len(p) == 2 and np.ptp(p[:, 1]) == 0]
    assert any(abs(span / whole - 2 * 0.03 / 0.3) < 2e-3 for span in spans)
    assert {"0.200 ± 0.020", "0.150 ± 0.030", "mean KL, nats per token", "x", "y", "z"} <= set(words(drawing))


def test_bars_that_were_not_measured_are_left_out() -> None:
    bars = [figures.Bars("a", np.array([0.2, np.nan]), np.array([np.nan, np.nan]))]
    drawing = figures.damage_bars([[0, 1]], ["x", "y"], bars, "unit")
    assert len(paths(drawing, "series-0")) == 1
    assert "0.2000" in words(drawing)


def test_formats_of_different_size_get_panels_of_their_own() -> None:
    assert _groups(np.array([0.25, 0.004, 0.27, 0.003])) == [[0, 2], [1, 3]]
    assert _groups(np.array([0.25, 0.2, 0.05])) == [[0, 1, 2]]
    assert _groups(np.array([0.3])) == [[0]]


def test_a_role_that_obeys_its_law_lies_on_it() -> None:
    layers = np.arange(1.0, 31.0)
    std = 0.1 * layers**-0.3
    line = figures.DepthLine(layers, std, std, std)
    drawing = figures.depth_panel("p", (line, None), figures.Law(0.1, 0.3), None, (0.02, 0.2))
    measured = next(p for p in paths(drawing, "series-0", "stroke") if len(p) == 30)
    law, yardstick = paths(drawing, "law", "stroke")[0], paths(drawing, "yardstick", "stroke")[0]
    np.testing.assert_allclose(np.interp(measured[:, 0], *law.T), measured[:, 1], atol=0.3)
    assert yardstick[0] == pytest.approx(law[0], abs=0.1)
    assert yardstick[-1, 1] > law[-1, 1] + 10  # lower on the page: LIR falls faster
    assert {"layer, counted from 1", "std of weights"} <= set(words(drawing))


def test_target_and_spread_of_experts_are_drawn() -> None:
    layers = np.arange(1.0, 5.0)
    flat = np.full(4, 0.05)
    line = figures.DepthLine(layers, flat, flat / 1.5, flat * 1.5)
    target = figures.DepthLine(layers, flat / 2, flat / 2, flat / 2)
    drawing = figures.depth_panel("p", (line, line), None, target, (0.01, 0.1))
    assert len(paths(drawing, "target", "stroke")) == 1
    assert "fill: var(--series-0); fill-opacity" in drawing  # the band from smallest to largest
    assert paths(drawing, "series-1", "stroke")
    assert not paths(drawing, "law", "stroke")


def test_every_cell_of_a_map_is_in_the_class_of_its_value() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 30, (9, 30))
    values[2, 3] = np.nan
    edges = (-10.0, 0.0, 10.0, 40.0)
    heat = figures.Heat(tuple("abcdefghi"), tuple(range(30)), values, edges, svg.HEAT[:5])
    drawing, (left, top, width, height) = figures.heat_map(heat, "heat", "label")
    seen = np.full(values.shape, -1)
    for k in range(5):
        for corners in np.split(paths(drawing, f"heat-{k}")[0], range(4, 10_000, 4)):
            if len(corners):
                x, y = corners.mean(axis=0)
                seen[int((y - top) / height * 9), int((x - left) / width * 30)] = k
    expected = np.where(np.isnan(values), -1, np.digitize(values, edges))
    np.testing.assert_array_equal(seen, expected)


def test_histogram_is_compared_with_the_normal_distribution() -> None:
    edges = np.linspace(-8, 8, 102)
    total = 1e6
    expected = total * np.diff(stats.norm.cdf(edges))
    drawing = figures.histogram_panel(edges, expected, total, "h", "label")
    curve = paths(drawing, "law", "stroke")[0]
    outline = paths(drawing, "series-0")[0]
    assert len(curve) == (expected >= 0.5).sum()
    for x, y in curve:  # the curve runs through the top of every bar
        tops = outline[np.abs(outline[:, 0] - x) < 1.6][:, 1]
        assert np.abs(tops - y).min() < 0.2


def test_names_are_escaped_and_never_read_as_formulas() -> None:
    bars = [figures.Bars("a", np.array([0.2]), np.array([0.1]))]
    for name in (samples.HOSTILE, "$\\frac{1}{$", "]]>", "模型 😀"):
        shown = text.visible(name)
        drawing = figures.damage_bars([[0]], [shown], bars, shown)
        assert text.shorten(shown, 18) in words(drawing)
        assert shown in words(drawing)
        assert shown in ET.fromstring(drawing).attrib["aria-label"]


def test_settings_of_the_user_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = [figures.Bars("a", np.array([0.2]), np.array([0.1]))]
    plain = figures.damage_bars([[0]], ["x"], bars, "unit")
    for key, value in {"font.size": 30, "text.usetex": True, "axes.grid": False, "svg.fonttype": "path"}.items():
        monkeypatch.setitem(mpl.rcParams, key, value)
    assert figures.damage_bars([[0]], ["x"], bars, "unit") == plain
    assert mpl.rcParams["font.size"] == 30


def test_drawings_bring_no_style_or_font_of_their_own() -> None:
    drawing = figures.histogram_panel(np.array([-1.0, 0.0, 1.0]), np.array([3.0, 4.0]), 7, "h", "label")
    for unwanted in ("<style", "font-family", "<?xml", "<!--", "xlink", 'width="216pt"'):
        assert unwanted not in drawing
