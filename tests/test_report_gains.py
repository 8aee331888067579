"""The story of a rescale on page and console: shares with their errors, who earned the gain, and what remains."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import report_samples as samples

from vrscope.quant.metrics import paired_change
from vrscope.report.blocks import Figures, Points, Section, Table
from vrscope.report.gains import gains
from vrscope.report.html import render
from vrscope.report.limits import limits
from vrscope.report.removed import removed
from vrscope.tables import Report, from_json, to_json
from vrscope.verdict import verdict
from vrscope.views import show_report

NEW = ("gains", "exponents", "layer_error")


def small() -> Report:
    """Two formats, four spaces, numbers that can be added up by hand."""
    rows = [
        ("l.0:in", "norm fold", 0, "int4", "awq", "search", 0.30, 0.06),
        ("l.0:v", "v.o", 0, "int4", "cle", "start", 0.10, 0.08),
        ("l.1:in", "norm fold", 1, "int4", "awq", "grid", 0.50, 0.10),
        ("l.1:v", "v.o", 1, "int4", "none", "", 0.10, 0.10),
        ("l.0:in", "norm fold", 0, "nf4", "awq", "search", 0.20, 0.10),
        ("l.1:in", "norm fold", 1, "nf4", "awq", "grid", 0.20, 0.22),
    ]
    names = ["space", "rule", "layer", "format", "method", "stage", "damage_before", "damage_after"]
    return Report("plan", {"model": "m"}, (), {"gains": pd.DataFrame(rows, columns=names)})


def block(section: Section | None, caption: str) -> Table:
    assert section is not None
    return next(b for b in section.blocks if isinstance(b, Table) and b.caption.startswith(caption))


def cells(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_the_error_of_a_share_is_that_of_a_ratio_of_paired_means() -> None:
    rng = np.random.default_rng(4)
    before = rng.lognormal(-1, 1, 5000)
    after = 0.4 * before * rng.lognormal(0, 0.5, 5000)
    rows = [
        {"kl": values.mean(), "kl_sem": values.std(ddof=1) / math.sqrt(values.size), **paired_change(values, before)}
        for values in (before, after)
    ]
    found = removed(*rows, "kl")
    assert found is not None and found.clear
    ratio = after.mean() / before.mean()
    assert found.share == pytest.approx(1 - ratio)
    residual = (after - ratio * before) / before.mean()  # influence function of the ratio
    assert found.sem == pytest.approx(residual.std(ddof=1) / math.sqrt(5000), rel=1e-9)
    draws = rng.integers(0, 5000, (400, 5000))
    assert found.sem == pytest.approx((after[draws].mean(1) / before[draws].mean(1)).std(), rel=0.12)
    assert found.percent == f"{100 * found.share:.2f} ± {100 * found.sem:.2f} %"


@pytest.mark.parametrize("value", [None, math.nan, 0.0])
def test_a_share_of_nothing_is_none(value: float | None) -> None:
    assert removed({"kl": value}, {"kl": 1.0}, "kl") is None
    without = removed({"kl": 2.0}, {"kl": 1.0}, "kl")
    assert without is not None and math.isnan(without.sem) and not without.clear and without.percent == "50 %"


def test_the_first_finding_says_by_what_share_each_format_fell() -> None:
    report = samples.story_report()
    first = report.verdict[0]
    assert first["level"] == "good"
    said = "Quantization damage fell by 60.00 ± 0.57 % with int4-g64 and 42.00 ± 0.95 % with nf4 (mean KL"
    assert first["text"].startswith(said)
    frame = report.tables["damage"].copy()
    frame.loc[(frame["format"] == "nf4") & (frame["checkpoint"] == "rescaled"), ["kl", "change"]] = [0.5, 0.246]
    worse = verdict(dict(report.tables) | {"damage": frame}, report.provenance)[0]
    assert worse["level"] == "bad" and "rose by 96.9 ± 3.3 % with nf4" in worse["text"]
    broken = verdict(report.tables, dict(report.provenance) | {"equivalent": "not equivalent"})
    assert broken[0]["text"].startswith("NOT EQUIVALENT")


def test_without_measured_damage_the_share_is_called_predicted() -> None:
    found = verdict(small().tables, {})
    assert "predicted to remove 66 % of the damage of int4 and 20 % of the damage of nf4" in found[0]["text"]
    assert (
        "int4: 97 % of the predicted gain comes from norm fold; scales from awq 2, cle 1 (4 spaces)" in found[1]["text"]
    )
    assert "34 % of the predicted damage remains, the largest part of it in l.1:in (29 %)" in found[1]["text"]


def test_tables_of_the_section_add_up() -> None:
    section = gains(small())
    assert cells(block(section, "Predicted and measured")) == [
        ["int4", "1", "0.3400", "66.0 %"],
        ["nf4", "0.4000", "0.3200", "20.0 %"],
    ]
    top = cells(block(section, "The 3 spaces that earned most, of 4"))
    assert [row[0] for row in top] == ["l.1:in", "l.0:in", "l.0:v"]
    assert top[1][2:5] == ["awq, search", "0.300 → 0.0600", "0.200 → 0.100"]
    assert top[2][4] == "–" and top[2][5] == "2.7 %"
    methods = cells(block(section, "Spaces by the method"))
    assert methods[0] == ["awq", "2", "norm fold 2", "search 1, grid 1", "97.3 %"]
    assert sorted(row[0] for row in methods[1:]) == ["cle", "left alone"]


def test_bars_by_rule_and_layer_say_their_numbers() -> None:
    section = gains(small())
    assert section is not None
    by_rule, by_layer = (b for b in section.blocks if isinstance(b, Figures))
    assert (
        by_rule.title == "Predicted damage by what ties the scales" and len(by_rule.items) == len(by_layer.items) == 2
    )
    assert (
        'aria-label="predicted damage, nats per token, before and after: norm fold 0.800 and 0.160; v.o'
        in by_rule.items[0].svg
    )
    assert "before it is largest in layer 1 with 0.600 of 1" in by_layer.items[0].svg
    assert "after it is largest in layer 1 with 0.200 of 0.340" in by_layer.items[0].svg


def test_exponents_are_shares_of_the_scales_of_a_rule_and_layer() -> None:
    report = small()
    rows = [
        ("a", "v.o", 0, 1, 3),
        ("a", "v.o", 0, 0, 1),
        ("b", "v.o", 1, -2, 4),
        ("c", "q.k", 0, 0, 9),
        ("d", "v.o", None, 2, 5),
    ]
    frame = pd.DataFrame(rows, columns=["space", "rule", "layer", "exponent", "count"])
    section = gains(replace(report, tables=dict(report.tables) | {"exponents": frame}))
    assert section is not None
    (drawn,) = section.payload.values()  # nothing to draw of q.k, whose scales are all 1
    assert drawn["rows"] == ["k = +1", "k = 0", "k = −1", "k = −2"] and drawn["columns"] == [0, 1]
    assert np.array_equal(drawn["values"], [[0.75, 0], [0.25, 0], [0, 0], [0, 1]])
    counts = cells(block(section, "Scales by exponent"))
    assert counts == [["2", "5", "0"], ["1", "3", "0"], ["0", "1", "9"], ["−2", "4", "0"]]


def test_output_errors_have_a_line_per_checkpoint_and_medians() -> None:
    section = gains(samples.story_report())
    assert section is not None
    panels = [b for b in section.blocks if isinstance(b, Figures) and b.title.startswith("Output error")]
    assert [b.title.split()[-1] for b in panels] == ["int4-g64", "nf4"]
    assert [item.title for item in panels[0].items] == list(samples.LINEARS)
    assert panels[0].items[0].detail == "median over layers unchanged"
    assert "--series-0" in panels[0].items[1].svg and "--series-1" in panels[0].items[1].svg
    table = block(section, "Relative output error")
    frame = samples.layer_error().query("role == 'mlp.up_proj' and format == 'nf4' and checkpoint == 'rescaled'")
    row = next(r for r in cells(table) if r[:2] == ["mlp.up_proj", "nf4"])
    assert float(row[3]) == pytest.approx(frame["relative_output_error"].median(), rel=1e-3)
    assert row[4] == "−40.0 %"


def test_what_no_scale_can_fix_is_a_short_list_with_the_owners_of_the_rest() -> None:
    report = samples.story_report()
    section = limits(report)
    assert section is not None and section.title == "What no scale can fix here"
    points = section.blocks[0]
    assert isinstance(points, Points)
    starts = [start for start, _ in points.items]
    assert starts[:3] == ["int4-g64:", "nf4:", "int8, int8-row:"]
    assert starts[3:] == ["30 spaces without an exact scale:", "1 space without an exact scale:"]
    owners = block(section, "The 5 largest owners")
    frame = report.tables["gains"].query("format == 'nf4'").nlargest(5, "damage_after")
    assert [row[-5].text for row in owners.rows[5:]] == frame["space"].tolist()
    assert all(b.fold for b in section.blocks if isinstance(b, Table) and b is not owners)
    before = limits(samples.run_report())
    assert before is not None and before.title == "What this plan could not change"
    alone = limits(small())
    assert alone is not None and len(alone.blocks) == 2


def test_an_encoder_has_no_nats() -> None:
    report = samples.encoder_report()
    section = gains(replace(report, tables=dict(report.tables) | {"gains": small().tables["gains"]}))
    assert block(section, "Predicted and measured").heads[1].unit == "relative error squared"


def test_sections_stand_below_the_headline_and_names_stay_text() -> None:
    report = samples.story_report()
    page = render(report)
    places = [page.index(f'<section id="{name}"') for name in ("verdict", "damage", "gains", "limits", "depth")]
    assert places == sorted(places)
    assert "not on this page" not in page
    assert render(from_json(to_json(report))) == page
    hostile = render(samples.hostile_report(report))
    assert "<script>alert(1)" not in hostile and "<img" not in hostile and 'id="gains"' in hostile


@pytest.mark.parametrize("missing", [math.nan, None, math.inf, -1.0, 0.0, "text"])
@pytest.mark.parametrize("table", NEW)
def test_gaps_do_no_harm(table: str, missing: object) -> None:
    report = samples.story_report()
    frame = report.tables[table].head(30).astype(object)
    for name in ("layer", "damage_before", "damage_after", "exponent", "count", "relative_output_error"):
        if name in frame.columns:
            frame[name] = missing
    tables = {name: report.tables[name].head(30) for name in NEW} | {table: frame}
    assert 'id="gains"' in render(Report("run", {}, (), tables))
    bare = {name: pd.DataFrame({"other": [1, 2]}) for name in tables}
    assert 'id="gains"' in render(Report("run", {}, (), bare))
    assert gains(Report("run", {}, (), {})) is None


def test_the_console_sums_by_rule_and_shows_all_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(small())
    out = capsys.readouterr().out
    assert "by rule" in out and "l.0:v" not in out.split("by rule")[1]
    assert "awq 2" in out and "80.0%" in out
    show_report(small(), everything=True)
    assert "l.0:v" in capsys.readouterr().out
