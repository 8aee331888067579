"""The page as a file: what it holds, what it leaves out, and what no name or missing value can do to it."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report_samples as samples

from vrscope.errors import OutputError
from vrscope.report import figures, html
from vrscope.report.headline import badge, headline
from vrscope.tables import Report, from_json, to_json

PACKAGE = Path(html.__file__).parent
ORDER = [
    "verdict", "damage", "limits", "depth", "tails", "histograms", "tensors", "plan", "proof", "weight-error",
    "provenance",
]  # fmt: skip
VOID = {"meta", "link", "input", "br", "wbr"}


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.elements[-1][1], data))
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.elements if tag == "section"]

    @property
    def payload(self) -> dict:
        return json.loads(next(data for attrs, data in self.scripts if attrs.get("id") == "payload"))


@pytest.fixture(scope="module")
def source() -> str:
    return html.render(samples.run_report())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawings out, where a test is about the rest."""
    for name in ("damage_bars", "depth_panel", "histogram_panel"):
        monkeypatch.setattr(figures, name, lambda *_, **__: "<svg></svg>")
    monkeypatch.setattr(figures, "heat_map", lambda *_, **__: ("<svg></svg>", (0.0, 0.0, 1.0, 1.0)))


def only(report: Report, *tables: str) -> Report:
    return replace(report, tables={name: report.tables[name] for name in tables})


def test_sections_stand_in_the_order_of_the_story(page: Page) -> None:
    assert page.sections == ORDER
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a" and attrs["href"] != "#main"]
    assert links == [f"#{name}" for name in ORDER]


def test_page_of_a_small_llama_is_far_below_three_megabytes(source: str) -> None:
    assert len(source.encode()) < 1_000_000


def test_page_refers_to_nothing_outside(source: str, page: Page) -> None:
    for tag, attrs in page.elements:
        assert tag not in {"img", "iframe", "object", "embed", "base", "form", "audio", "video", "image"}
        for key in ("src", "href", "action", "data", "srcset"):
            assert attrs.get(key, "#").startswith("#") or attrs[key] == "data:,"
    assert set(re.findall(r"https?://[^\s\"'<>)]+", source)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\((?!#)|@import", source)


def test_policy_allows_the_one_script_by_its_hash(page: Page) -> None:
    policy = next(attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv"))
    script = next(data for attrs, data in page.scripts if "id" not in attrs)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]


def test_ids_are_unique_and_every_reference_has_its_target(source: str, page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    used = re.findall(r"url\(#([^)]+)\)", source) + [
        attrs["href"][1:] for _, attrs in page.elements if attrs.get("href", "").startswith("#")
    ]
    assert set(used) <= set(page.ids)


def test_same_report_gives_the_same_bytes_also_through_results_json(source: str) -> None:
    assert html.render(from_json(to_json(samples.run_report()))) == source


def test_figures_are_described_themed_and_carry_no_metadata(source: str, page: Page) -> None:
    drawings = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("class") != "ruler"]
    assert len(drawings) == 1 + 7 + 2 + 8
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 20 for attrs in drawings)
    body = source.split("</style>", 1)[1]
    assert not re.search(r"(fill|stroke): ?#[0-9a-f]{6}", body)
    assert "<metadata" not in source
    assert "matplotlib" not in source.lower()
    for axis in ("nats per token", "std of weights", "layer, counted from 1", "(weight − mean) / std", "count"):
        assert axis in page.text


def test_verdict_and_provenance_are_shown_in_full(page: Page) -> None:
    report = samples.run_report()
    for finding in report.verdict:
        assert finding["text"] in page.text
    for words in ("2.13.0", "sample.txt (shipped)", "2,048", "x86_64 Linux", "granularity: channel", "vrscope run"):
        assert words in page.text


def test_blind_formats_are_marked_unchanged_and_explained(page: Page) -> None:
    assert page.text.count("unchanged out of reach") >= 2
    assert "the plan's factors are constant there as well" in page.text
    assert "−6.0 %" in page.text
    assert "residual (30)" in page.text


def test_tensor_rows_travel_complete_and_exact_to_five_digits(page: Page) -> None:
    frame = samples.run_report().tables["tensors"]
    data = page.payload["tensors"]
    assert data["count"] == len(frame) == 272
    heads = list(frame.columns)
    packed = dict(zip(heads, data["columns"], strict=True))
    for name in heads:
        column = packed[name]
        if "text" in column:
            assert [column["text"][k] for k in column["rows"]] == frame[name].tolist()
        else:
            values = np.array(column["rows"], dtype=float)
            np.testing.assert_allclose(values, frame[name].astype(float), rtol=5e-5)
    assert packed["layer"]["rows"][0] is None


def test_raw_tvr_is_labelled_not_equivalent_everywhere(undrawn: None) -> None:
    page = Page(html.render(samples.raw_report()))
    title = page.text.split(": vrscope report")[0]
    assert "NOT EQUIVALENT" in title
    assert ("body", {"class": "broken"}) in page.elements
    assert "Raw TVR shifts means and zeroes biases." in page.text
    assert page.text.count("rescaled (NOT EQUIVALENT)") > 12
    assert not re.search(r"rescaled(?! \(NOT EQUIVALENT\)| checkpoint)", page.text.split("Provenance Everything")[0])
    assert "not quantized" in page.text
    assert "×10³⁵" in page.text


def test_encoders_show_relative_error_and_cosine_instead_of_kl(undrawn: None) -> None:
    page = Page(html.render(replace(only(samples.encoder_report(), "damage"), verdict=())))
    assert "relative error" in page.text
    assert "cosine" in page.text
    assert "no causal head" in page.text
    assert "mean KL" not in page.text
    assert "perplexity" not in page.text


def test_equivalence_is_stated_in_the_words_of_the_proof() -> None:
    def stated(words: object) -> tuple[str, str] | None:
        found = badge(Report("run", {"equivalent": words}))
        return None if found is None else (found.level, found.name)

    assert stated("bit-equal") == ("good", "Bit-equal")
    assert stated("equal up to rounding") == ("note", "Equal up to rounding")
    assert stated("not equivalent") == ("bad", "NOT EQUIVALENT")
    assert stated("who knows") == ("note", "who knows")
    assert stated(None) is None


def test_title_is_the_hub_id_or_the_last_part_of_a_path() -> None:
    for model, title in (("a/b", "a/b"), ("/home/me/b/", "b"), ("./b", "b"), ("C:\\m\\b", "b"), ("", "Unnamed model")):
        assert headline(Report("run", {"model": model})).model == title


@pytest.mark.parametrize(
    ("tables", "sections"),
    [
        (["tensors", "depth_law", "histograms"], ["depth", "tails", "histograms", "tensors"]),
        (["damage", "weight_error"], ["damage", "weight-error"]),
        (["spaces", "matrices", "unreachable", "reach"], ["limits", "depth", "plan"]),
        (["proof"], ["proof"]),
        ([], []),
    ],
)
def test_a_section_is_there_only_if_its_table_is(tables: list[str], sections: list[str], undrawn: None) -> None:
    page = Page(html.render(only(samples.run_report(), *tables)))
    assert page.sections == ["verdict", *sections, "provenance"]


def test_a_report_of_nothing_is_still_a_page(undrawn: None) -> None:
    assert Page(html.render(Report("analyze", {}))).sections == []


@pytest.mark.parametrize("table", sorted(samples.run_report().tables))
def test_empty_tables_and_missing_columns_leave_the_rest_standing(table: str, undrawn: None) -> None:
    report = samples.small_report()
    frame = report.tables[table]
    variants = [frame.head(0), frame.drop(columns=frame.columns), frame.assign(**dict.fromkeys(frame.columns))]
    variants += [frame.drop(columns=[column]) for column in frame.columns]
    variants += [frame.assign(**{column: None}) for column in frame.columns]
    for variant in variants:
        page = Page(html.render(replace(report, tables={**report.tables, table: variant})))
        assert "provenance" in page.sections
        assert "nan" not in page.text.lower().replace("nan_count", "").split("what the columns mean")[0].split()


@pytest.mark.parametrize(
    ("layers", "roles", "title"),
    [(0, 7, "no layers"), (1, 7, "one layer"), (200, 2, "200 layers"), (2, 100, "100 roles")],
)
def test_models_of_unusual_shape_are_drawn(layers: int, roles: int, title: str) -> None:
    frame = samples.shaped_tensors(layers, roles)
    page = Page(html.render(Report("analyze", {"model": title}, (), {"tensors": frame})))
    expected = ["depth", "tails", "tensors"] if layers else ["tensors"]
    assert page.sections == ["verdict", *expected, "provenance"]
    drawn = sum(tag == "svg" for tag, _ in page.elements) - 1
    assert drawn == (min(roles, 24) + 2 if layers else 0)
    if roles == 100:
        assert "24 of 100 roles are drawn" in page.text


def test_broken_values_are_drawn_as_gaps() -> None:
    report = samples.small_report()
    stats = report.tables["tensors"].copy()
    stats[["std", "kurtosis_excess", "tvr_ratio"]] = [np.nan, np.inf, -np.inf]
    stats.loc[stats.index[0], ["std", "kurtosis_excess"]] = [0.0, -1.8]
    damage = report.tables["damage"].assign(kl_sem=np.nan, top1=np.inf)
    bins = pd.DataFrame([
        {"tensor": "flat", "edges": [0, 0, 0], "counts": [1, 2]},
        {"tensor": "short", "edges": [0, 1], "counts": [1, 2]},
        {"tensor": "text", "edges": "no", "counts": None},
        {"tensor": "none", "edges": [-1, 0, 1], "counts": [0, 0]},
        {"tensor": "fine", "edges": [-1, 0, 1], "counts": [5, 0]},
    ])  # fmt: skip
    tables = {**report.tables, "tensors": stats, "damage": damage, "histograms": bins}
    page = Page(html.render(replace(report, tables=tables)))
    assert page.sections == ORDER
    assert "fine" in page.text
    assert "short" not in page.text


@pytest.fixture(scope="module")
def hostile() -> Page:
    return Page(html.render(samples.hostile_report()))


def test_hostile_names_stay_text(hostile: Page) -> None:
    tags = [tag for tag, _ in hostile.elements]
    assert tags.count("script") == 2
    assert not {"img", "x", "iframe"} & set(tags)
    assert not [key for _, attrs in hostile.elements for key in attrs if key.startswith("on")]
    assert "<script>alert(1)</script>" in hostile.text
    assert "{{7*7}}" in hostile.text
    assert "49" not in hostile.text.replace("49152", "").replace("0.49", "").split("Provenance")[-1]


def test_hostile_names_cannot_hide_characters(hostile: Page) -> None:
    everything = hostile.text + json.dumps(hostile.payload, ensure_ascii=False)
    everything += "".join(value for _, attrs in hostile.elements for value in attrs.values())
    assert not set(everything) & set("\u202e\u2028\x00\x1b\ud800")
    assert "\\u202e\\u2028$\\frac$\\x00\\x1b" in hostile.text
    assert "lone\\ud800" in hostile.text


def test_payload_cannot_leave_its_script_element(hostile: Page) -> None:
    raw = next(data for attrs, data in hostile.scripts if attrs.get("id") == "payload")
    assert raw.isascii()
    assert not set(raw) & set("<>&")
    assert any("<script>alert(1)</script>" in name for name in hostile.payload["tensors"]["columns"][0]["text"])
    assert "x" * 500 in hostile.payload["tensors"]["columns"][0]["text"]


def test_page_is_written_whole_or_refused_in_one_line(tmp_path: Path, undrawn: None) -> None:
    target = tmp_path / "deep" / "report.html"
    html.write(samples.small_report(), target)
    assert target.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written .* Choose a folder"):
        html.write(samples.small_report(), tmp_path / "file" / "report.html")


def test_report_package_sees_only_tables_and_errors() -> None:
    for module in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("vrscope"):
                    assert name.split(".")[1] in {"report", "tables", "errors"}, f"{module.name} imports {name}"


def test_importing_the_page_loads_nothing_heavy() -> None:
    code = "import sys, vrscope.report.html; print(sorted({'matplotlib', 'pandas', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_colours_reach_contrast_aa(scheme: str) -> None:
    style = (PACKAGE / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))

    def luminance(colour: str) -> float:
        channels = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "muted", "accent", "good", "bad", "warn"):
        assert contrast(name, "paper") >= 4.5, name
    for name in ("good", "bad", "warn"):
        assert contrast(name, f"{name}-wash") >= 4.5, name
        assert contrast("ink", f"{name}-wash") >= 4.5, name
    for name in ("series-0", "series-1", "series-2", "series-3", "series-4", "law", "yardstick", "target"):
        assert contrast(name, "paper") >= 3.0, name


def test_every_colour_of_a_figure_has_a_variable_in_the_style() -> None:
    from vrscope.report.svg import VARIABLES

    style = (PACKAGE / "templates" / "style.css").read_text(encoding="utf-8")
    for name in VARIABLES.values():
        assert f"{name}: #" in style, name
