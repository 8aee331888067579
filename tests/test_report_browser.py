"""The page in real headless Chromium: sorting, searching, both colour schemes, a phone's width, and no request."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import report_samples as samples

from vrscope.report import html
from vrscope.tables import Report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}

Open = Callable[..., "Visit"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: none of chromium, google-chrome is installed")


@dataclass(frozen=True, slots=True)
class Visit:
    """An open page, and everything that went wrong or went out since it was opened."""

    page: Page
    trouble: list[str]

    def column(self, name: str) -> list[str]:
        head = self.page.locator(".explorer thead th")
        at = [text.split()[0] for text in head.all_inner_texts()].index(name)
        return self.page.locator(f".explorer tbody tr > :nth-child({at + 1})").all_inner_texts()

    def button(self, name: str) -> Locator:
        return self.page.locator(".explorer thead button", has_text=name).first

    @property
    def status(self) -> str:
        return self.page.locator(".count").inner_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    reports = {"run": samples.run_report(), "hostile": samples.hostile_report(), "large": large_report()}
    reports["story"] = samples.story_report()
    reports["hostile story"] = samples.hostile_report(reports["story"])
    for name, report in reports.items():
        html.write(report, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in reports}


def large_report() -> Report:
    """A model of 30,000 tensors: 300 experts in 100 layers."""
    rng = np.random.default_rng(1)
    count = 30_000
    frame = pd.DataFrame({
        "tensor": [f"model.layers.{k // 300}.experts.{k % 300}.w" for k in range(count)],
        "role": "experts.w", "layer": np.arange(count) // 300, "kind": "linear", "dtype": "BF16", "shape": "64x64",
        **{name: rng.lognormal(0, 3, count) for name in ("std", "kurtosis_excess", "absmax", "tvr_ratio", "skewness")},
    })  # fmt: skip
    frame.loc[5::1000, "std"] = np.nan
    return Report("analyze", {"model": "large"}, (), {"tensors": frame})


@pytest.fixture
def visit(browser: Browser, files: dict[str, Path]) -> Iterator[Open]:
    """Open a page; at the end nothing may have been logged, thrown, asked or fetched."""
    visits = []

    def open_page(name: str, *, scheme: str = "light", viewport: dict[str, int] = WIDE) -> Visit:
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        trouble: list[str] = []
        address = files[name].as_uri()
        page.on("console", lambda message: trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url in {address, "data:,"} or trouble.append(request.url))
        page.route("**/*", lambda route: route.continue_() if route.request.url == address else route.abort())
        page.goto(address)
        visits.append(Visit(page, trouble))
        return visits[-1]

    yield open_page
    for opened in visits:
        assert opened.trouble == []
        opened.page.close()


def numbers(texts: list[str]) -> list[float]:
    return [float(t.replace(",", "").replace("−", "-")) for t in texts if t != "–"]


@pytest.mark.parametrize("name", ["run", "hostile", "large", "story", "hostile story"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_page_opens_without_errors_requests_or_sideways_scroll(
    name: str, viewport: dict[str, int], visit: Open
) -> None:
    opened = visit(name, viewport=viewport)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    assert opened.page.locator("h1").count() == 1
    assert opened.page.locator("section").count() == opened.page.locator("section > h2").count()


def test_wide_tables_scroll_in_their_own_box(visit: Open) -> None:
    box = visit("run", viewport=PHONE).page.locator(".explorer .scroll")
    assert box.evaluate("e => e.scrollWidth > e.clientWidth && e.clientWidth <= 390")


def test_a_click_sorts_by_number_and_a_second_one_turns_it_round(visit: Open) -> None:
    opened = visit("run")
    frame = samples.run_report().tables["tensors"]
    opened.button("std").click()
    down = numbers(opened.column("std"))
    assert down == sorted(down, reverse=True)
    assert down[0] == pytest.approx(frame["std"].max(), rel=1e-3)
    assert opened.page.locator("[aria-sort]").get_attribute("aria-sort") == "descending"
    opened.button("std").click()
    up = numbers(opened.column("std"))
    assert up == sorted(up)
    assert up[0] == pytest.approx(frame["std"].min(), rel=1e-3)
    assert opened.page.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"


def test_sorting_is_stable_and_by_text_counts_numbers_as_numbers(visit: Open) -> None:
    opened = visit("run")
    names = samples.run_report().tables["tensors"]["tensor"].tolist()
    opened.button("kind").click()
    kinds = opened.column("kind")
    assert kinds == sorted(kinds)
    linear = [n for n in names if "proj" in n]
    assert opened.column("tensor")[1:] == linear[: len(kinds) - 1]
    opened.page.fill("input[type=search]", "q_proj")
    opened.button("tensor").click()
    assert opened.column("tensor") == [f"model.layers.{k}.self_attn.q_proj.weight" for k in range(30)]


def test_missing_numbers_stand_last_both_ways(visit: Open) -> None:
    opened = visit("large")
    opened.page.fill("input[type=search]", ".layers.3.")
    for _ in range(2):
        opened.button("std").click()
        opened.page.locator(".more button").click()
        column = opened.column("std")
        assert len(column) == 300
        assert column.index("–") == 299


def test_headers_sort_from_the_keyboard(visit: Open) -> None:
    opened = visit("run")
    opened.button("std").focus()
    opened.page.keyboard.press("Enter")
    assert opened.page.locator("[aria-sort]").inner_text().startswith("std")
    opened.page.keyboard.press("Space")
    assert opened.page.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"


def test_search_filters_by_name_role_and_kind_and_counts(visit: Open) -> None:
    opened = visit("run")
    assert opened.status == "Showing 100 of 272"
    search = opened.page.locator("input[type=search]")
    for query, count in (("DOWN_proj", 30), ("layers.29.", 9), ("embed", 1), ("norm", 61), ("no such thing", 0)):
        search.fill(query)
        assert opened.status == f"Showing {count} of {count} matching, 272 in all"
        assert opened.page.locator(".explorer tbody tr").count() == count
    search.fill("linear")
    assert opened.status == "Showing 100 of 210 matching, 272 in all"
    search.fill("")
    assert opened.status == "Showing 100 of 272"


def test_more_rows_and_all_columns_come_on_request(visit: Open) -> None:
    opened = visit("run")
    opened.page.locator(".more button").click()
    assert opened.page.locator(".explorer tbody tr").count() == 272
    assert not opened.page.locator(".more").is_visible()
    shown = opened.page.locator(".explorer thead th:visible").count()
    opened.page.check("input[type=checkbox]")
    assert opened.page.locator(".explorer thead th:visible").count() == len(samples.tensors().columns) > shown


def test_thirty_thousand_tensors_stay_quick(visit: Open) -> None:
    opened = visit("large")
    assert opened.status == "Showing 100 of 30,000"
    milliseconds = opened.page.evaluate(
        """() => {
          const buttons = [...document.querySelectorAll(".explorer thead button")];
          const search = document.querySelector("input[type=search]");
          const start = performance.now();
          buttons.forEach((button) => button.click());
          search.value = "experts.7";
          search.dispatchEvent(new Event("input"));
          return (performance.now() - start) / (buttons.length + 1);
        }"""
    )
    assert milliseconds < 1000
    assert opened.status == "Showing 100 of 1,100 matching, 30,000 in all"


def test_column_heads_tell_unit_and_meaning(visit: Open) -> None:
    opened = visit("run")
    head = opened.page.locator(".explorer thead th", has_text="excess kurtosis")
    assert "a normal distribution has 0" in head.get_attribute("title")
    opened.page.locator("#tensors summary").click()
    assert opened.page.locator("#tensors details td", has_text="a normal distribution has 0").is_visible()


def test_hostile_names_are_shown_as_they_are(visit: Open) -> None:
    page = visit("hostile").page
    assert page.locator("script").count() == 2
    assert page.locator("img, iframe, object").count() == 0
    assert "<script>alert(1)</script>" in page.locator("h1").inner_text()
    assert "<img src=x onerror=alert(2)>" in page.locator(".explorer tbody tr").nth(1).inner_text()
    assert page.title().startswith("<script>alert(1)</script>")
    page.fill("input[type=search]", "<IMG SRC=X")
    assert page.locator(".explorer tbody tr").count() > 0


def test_a_cell_of_the_map_tells_its_number(visit: Open) -> None:
    opened = visit("run")
    frame = samples.run_report().tables["tensors"]
    drawing = opened.page.locator("[data-map=kurtosis] svg")
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.985, box["y"] + box["height"] * 0.04)
    row = frame[(frame["layer"] == 29) & (frame["role"] == "self_attn.q_proj")].iloc[0]
    tip = opened.page.locator("#tip")
    assert tip.is_visible()
    assert tip.inner_text().startswith("Layer 29, self_attn.q_proj")
    assert numbers([tip.inner_text().rsplit(": ", 1)[1]])[0] == pytest.approx(row["kurtosis_excess"], rel=1e-3)
    opened.page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_the_story_of_a_rescale_is_drawn_folded_and_tells_its_numbers(visit: Open) -> None:
    opened = visit("story")
    page = opened.page
    first = page.locator(".verdict li").first.inner_text()
    assert "fell by 60.00 ± 0.57 % with int4-g64" in first
    drawing = page.locator("[data-map=exponents-0] svg")
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.985, box["y"] + box["height"] * 0.04)
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("Layer 29, k = +5\nshare of scales: ")
    assert (
        page.locator("#gains figure svg[role=img][aria-label]").count() == page.locator("#gains figure").count() == 20
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.locator("#limits .points li").count() == 5
    table = page.locator("#limits details table").first
    assert not table.is_visible()
    page.locator("#limits summary").first.click()
    assert table.is_visible()
    overlap = page.evaluate(
        """() => [...document.querySelectorAll("#gains .panels figure")].filter((e) =>
             e.getBoundingClientRect().right > document.documentElement.clientWidth).length"""
    )
    assert overlap == 0


def test_figures_follow_the_colour_scheme(visit: Open) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = visit("run", scheme=scheme).page
        seen[scheme] = page.evaluate(
            """() => [document.body, document.querySelector("#damage svg text"), document.querySelector("h1"),
                document.querySelector("#damage svg path[style*='--series-1']")]
              .map((e, k) => getComputedStyle(e)[["backgroundColor", "fill", "color", "fill"][k]])"""
        )
    light, dark = ([sum(map(int, c[4:-1].split(", "))) for c in seen[scheme]] for scheme in ("light", "dark"))
    assert light[0] > 650 > 100 > dark[0]
    assert light[1] < 400 < dark[1]
    assert light[2] < 150 < 600 < dark[2]
    assert light[3] != dark[3]


def test_print_shows_the_report_without_its_controls(visit: Open) -> None:
    page = visit("run", scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()
    assert not page.locator(".controls").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(19, 33, 30)"
    assert page.locator(".explorer tbody tr:visible").count() == 30


def test_everything_that_scrolls_can_be_reached_and_is_named(visit: Open) -> None:
    page = visit("story").page
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll(".scroll, table, svg:not(.ruler), nav, input")].filter((e) =>
             !(e.getAttribute("aria-label") || e.caption?.textContent || e.labels?.length)).length"""
    )
    assert unnamed == 0
    assert page.locator(".scroll:not([tabindex='0'])").count() == 0


def test_a_page_without_tensors_has_nothing_to_sort(browser: Browser, tmp_path: Path) -> None:
    report = samples.small_report()
    html.write(replace(report, tables={"proof": report.tables["proof"]}), tmp_path / "proof.html")
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "proof.html").as_uri())
    assert page.locator("section").count() == 3
    assert errors == []
    page.close()
