"""`vrscope sensitivity` and `vrscope recipe` as a whole: killed and resumed, saved, drawn, chosen, checked, refused."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from quant_tiny import START, STOP, text, tiny_checkpoint

from vrscope import api, cli
from vrscope.demo import demo_model
from vrscope.errors import CheckpointError, OutputError, PlanError, UnknownNameError
from vrscope.fragility import findings
from vrscope.fragility.recipe import Budget, bits_of, format_of
from vrscope.report import html
from vrscope.tables import Report, from_json, to_json

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENS = 96


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return api.sensitivity(demo_model(), tmp_path_factory.mktemp("nf4"), tokens=TOKENS)


@pytest.fixture(scope="module")
def int8(nf4: Report) -> Report:
    """The same units in a better format, without another run."""
    units = nf4.tables["sensitivity"].assign(kl=lambda frame: frame["kl"] / 100)
    settings = {**nf4.provenance["settings"], "format": "int8"}
    return dataclasses.replace(
        nf4, provenance={**nf4.provenance, "settings": settings}, tables={**nf4.tables, "sensitivity": units}
    )


def same(first: Report, second: Report) -> None:
    assert first.tables.keys() == second.tables.keys()
    for name, frame in first.tables.items():
        pd.testing.assert_frame_equal(frame, second.tables[name], check_exact=True)


# Sensitivity


def test_killed_work_goes_on_to_the_identical_table(nf4: Report, tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = out / "sensitivity.jsonl"
    command = [sys.executable, "-m", "vrscope", "sensitivity", str(demo_model()), "-o", str(out)]
    running = subprocess.Popen([*command, "--tokens", str(TOKENS), "-q"], cwd=REPOSITORY, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 6):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    found = journal.read_bytes()
    assert found.count(b"\n") < 44 and not (out / "results.json").exists()
    journal.write_bytes(found + b'{"unit": "model.lay')  # and the line that was being written
    with pytest.raises(OutputError, match="--resume"):
        api.sensitivity(demo_model(), out, tokens=TOKENS)
    with pytest.raises(OutputError, match="expected results for tokens 128, found them for tokens 96"):
        api.sensitivity(demo_model(), out, tokens=128, resume=True)
    resumed = api.sensitivity(demo_model(), out, tokens=TOKENS, resume=True)
    assert resumed.provenance["resumed_units"] == found.count(b"\n") - 1 >= 5
    same(resumed, nf4)
    once_more = api.sensitivity(demo_model(), out, tokens=TOKENS, resume=True)
    assert once_more.provenance["resumed_units"] == 43 and once_more.provenance["foreseen_seconds"] == 0
    same(once_more, nf4)


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, unit: str) -> None:
        if unit == "ms" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.sensitivity(demo_model(), tmp_path, tokens=32, by="layer", progress=stop)
    lines = (tmp_path / "sensitivity.jsonl").read_text().splitlines()
    assert 2 < len(lines) < 8 and all(json.loads(line) for line in lines)


def test_the_report_says_what_it_is_of(nf4: Report) -> None:
    facts = nf4.provenance
    assert facts["tokens"] == TOKENS and facts["kept_modules"] == ["lm_head"] and facts["model_type"] == "llama"
    stored = sum(info.size_bytes for info in api.open_checkpoint(demo_model()).tensors.values())
    assert facts["other_bytes"] + nf4.tables["linears"]["size_bytes"].sum() == stored
    assert set(nf4.tables) == {"sensitivity", "linears", "additivity", "correlation"}
    assert "kurtosis_excess" in set(nf4.tables["correlation"]["statistic"])
    assert any(name.startswith("sqnr_db[nf4]") for name in nf4.tables["correlation"]["statistic"])
    for name, frame in nf4.tables.items():
        assert list(frame.columns) == [column.name for column in nf4.columns[name]]
    said = " ".join(finding["text"] for finding in nf4.verdict)
    assert nf4.tables["sensitivity"]["unit"][0] in said and "add up to" in said


def test_saved_statistics_are_correlated_as_well(nf4: Report, tmp_path: Path) -> None:
    units = nf4.tables["sensitivity"]
    extra = pd.DataFrame({"tensor": units["unit"], "absmax": units["kl"] ** 2})
    spectral = pd.DataFrame({"tensor": units["unit"], "stable_rank": -units["kl"], "std": 1.0})
    report = Report("analyze", {"model": "m"}, (), {"activations": extra, "tensors": spectral}, {})
    api.save(report, tmp_path / "stats", html=False)
    found = api.sensitivity(demo_model(), tokens=TOKENS, statistics=tmp_path / "stats")
    rows = found.tables["correlation"].set_index("statistic")
    row = rows.loc["stable_rank"]
    assert row["rho"] == pytest.approx(-1) and row["same_ranking"] == "input absmax"
    std = nf4.tables["correlation"].set_index("statistic").loc["std"]
    assert rows.loc["std", "rho"] == std["rho"], "what is measured is not replaced"


@pytest.mark.parametrize("by", ["layer", "role"])
def test_groups_have_no_correlations_but_everything_else(by: str) -> None:
    report = api.sensitivity(demo_model(), tokens=32, by=by)
    assert "correlation" not in report.tables and "--by tensor" in report.provenance["notes"][0]
    assert report.tables["sensitivity"]["tensors"].sum() == 42
    made = api.recipe(report, budget_bits=6.0, targets=["bitsandbytes"])
    assert made.tables["recipe"].groupby("unit")["kept"].nunique().max() == 1


def test_formats_with_activations_are_measured(tmp_path: Path) -> None:
    report = api.sensitivity(demo_model(), tokens=32, by="role", format="int8")
    assert (report.tables["sensitivity"]["kl"] > 0).all()


def test_saved_and_read_back_it_is_the_same_and_the_page_shows_it(nf4: Report, tmp_path: Path) -> None:
    api.save(nf4, tmp_path)
    page = (tmp_path / "report.html").read_text()
    for section in ("sensitivity", "correlation"):
        assert f'<section id="{section}"' in page or f'id="{section}"' in page
    assert nf4.tables["sensitivity"]["unit"][0].split(".")[-2] in page
    back = api.load_report(tmp_path)
    assert html.render(back) == page
    assert api.merge_reports([back, back]).tables["sensitivity"].equals(back.tables["sensitivity"])
    assert api.recipe(back, budget_bits=5.0).tables["recipe"]["kept"].any()


def test_unknown_words_are_refused() -> None:
    with pytest.raises(PlanError, match="expected tensor, layer, role"):
        api.sensitivity(demo_model(), by="colour")
    with pytest.raises(UnknownNameError, match="Did you mean 'nf4'"):
        api.sensitivity(demo_model(), format="nf5")


# Recipes


def test_a_size_budget_is_kept_and_spent_on_damage_per_byte(nf4: Report, tmp_path: Path) -> None:
    report = api.recipe(nf4, out=tmp_path, budget_bits=6.0)
    low, mixed, high = (row for _, row in report.tables["recipe_summary"].iterrows())
    assert (low["bits_per_weight"], high["bits_per_weight"]) == (4.5, 16.0)
    assert 5.5 < mixed["bits_per_weight"] <= 6.0 and low["predicted"] > mixed["predicted"] > high["predicted"] == 0
    table = report.tables["recipe"]
    assert mixed["bits_per_weight"] == pytest.approx(
        np.average(np.where(table["kept"], 16.0, 4.5), weights=table["count"])
    )
    assert mixed["predicted"] == pytest.approx(table.loc[~table["kept"], "damage"].sum())
    assert low["model_bytes"] == pytest.approx(nf4.provenance["other_bytes"] + table["count"].sum() * 4.5 / 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(report.provenance["files"])
    skip = json.loads((tmp_path / "bitsandbytes.json").read_text())["llm_int8_skip_modules"]
    assert set(skip) == {"lm_head", *table.loc[table["kept"], "module"]}
    assert any("llm-compressor" in note and "nf4" in note for note in report.provenance["notes"])
    assert all(note in [finding["text"] for finding in report.verdict] for note in report.provenance["notes"])


def test_all_kinds_of_budget_mean_the_same_model(nf4: Report) -> None:
    bits = api.recipe(nf4, budget_bits=6.0, targets=["bitsandbytes"])
    size = float(bits.tables["recipe_summary"]["model_bytes"][1])
    for budget in ({"budget_bytes": size}, {"budget_gb": size / 1e9 * (1 + 1e-12)}):
        same_one = api.recipe(nf4, **budget, targets=["bitsandbytes"])
        assert same_one.tables["recipe"].equals(bits.tables["recipe"])
    predicted = float(bits.tables["recipe_summary"]["predicted"][1])
    damage = api.recipe(nf4, budget_kl=predicted, targets=["bitsandbytes"]).tables["recipe_summary"]
    assert damage["predicted"][1] <= predicted and damage["model_bytes"][1] <= size * 1.05


def test_impossible_budgets_say_what_is_possible(nf4: Report) -> None:
    with pytest.raises(PlanError, match=r"at least 4\.5 bits per linear weight"):
        api.recipe(nf4, budget_bits=4.4)
    with pytest.raises(PlanError, match=r"bytes for the whole model") as refused:
        api.recipe(nf4, budget_gb=1e-6)
    least = float(str(refused.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert api.recipe(nf4, budget_bytes=least + 1, targets=["bitsandbytes"]).tables["recipe_summary"]["kept"][1] == 0
    for given in ({}, {"budget_bits": 5.0, "budget_kl": 0.1}, {"budget_bits": -1.0}, {"budget_kl": float("nan")}):
        with pytest.raises(PlanError, match="budget: expected"):
            api.recipe(nf4, **given)


def test_a_higher_format_that_was_measured_counts_with_its_damage(nf4: Report, int8: Report) -> None:
    report = api.recipe(nf4, int8, budget_bits=6.0, high="int8", targets=["llm-compressor", "bitsandbytes"])
    summary = report.tables["recipe_summary"]
    assert summary["predicted"][2] == pytest.approx(summary["predicted"][0] / 100)
    assert not any("not measured" in note for note in report.provenance["notes"])
    assert any("one format per model" in note for note in report.provenance["notes"])
    alone = api.recipe(nf4, budget_bits=6.0, high="int8", targets=["llm-compressor"])
    assert any("not measured: taken as 0" in note for note in alone.provenance["notes"])
    with pytest.raises(PlanError, match=r"a damage of at least"):
        api.recipe(nf4, int8, budget_kl=float(summary["predicted"][2]) / 2, high="int8")


def test_results_that_do_not_fit_are_refused(nf4: Report, int8: Report) -> None:
    measured = dataclasses.replace(nf4, kind="measure")
    other = dataclasses.replace(int8, provenance={**int8.provenance, "fingerprint": "e" * 64})
    for results, options, words in (
        ((measured,), {}, "expected results of `vrscope sensitivity`, found those of `vrscope measure`"),
        ((), {}, "results: expected those of `vrscope sensitivity`, found none"),
        ((nf4, other), {}, "expected those of one model"),
        ((nf4,), {"low": "fp4"}, r"measured \(nf4\), found 'fp4'"),
        ((int8,), {"high": "int8-row"}, "expected a format of more than the 8 bits"),
        ((nf4,), {"high": "nf4"}, "expected bfloat16, int8, int8-row"),
    ):
        with pytest.raises(PlanError, match=words) as refused:
            api.recipe(*results, budget_bits=9.0, **options)
        assert "\n" not in str(refused.value)
    with pytest.raises(UnknownNameError, match="unknown target"):
        api.recipe(nf4, budget_bits=9.0, targets=["vllm"])
    with pytest.raises(CheckpointError):
        api.recipe("/nowhere", budget_bits=9.0)


def test_fused_layers_share_their_precision(nf4: Report) -> None:
    table = api.recipe(nf4, budget_bits=7.0, fuse=True, targets=["llm-compressor"]).tables["recipe"]
    for ending in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        own = table[table["role"].str.endswith(ending)]
        assert own.groupby("layer")["kept"].nunique().max() == 1
    assert 0 < table["kept"].sum() < len(table)


def test_a_check_measures_the_mixed_model_and_its_extremes(nf4: Report) -> None:
    report = api.recipe(nf4, budget_bits=7.0, check=True, tokens=TOKENS, targets=["bitsandbytes"])
    low, mixed, high = (row for _, row in report.tables["recipe_summary"].iterrows())
    assert low["measured"] == pytest.approx(nf4.tables["additivity"]["kl"][0], rel=1e-9), "nf4 everywhere, same tokens"
    assert low["measured"] > mixed["measured"] > high["measured"] >= 0
    assert mixed["change"] == pytest.approx(mixed["measured"] - low["measured"]) and mixed["change_sem"] > 0
    assert "flatters" in report.provenance["notes"][-1]
    assert report.provenance["tokens"] == TOKENS and any("Measured" in f["text"] for f in report.verdict)
    moved = dataclasses.replace(nf4, provenance={**nf4.provenance, "fingerprint": "e" * 64})
    with pytest.raises(PlanError, match="expected the checkpoint that the sensitivities were measured on"):
        api.recipe(moved, budget_bits=7.0, check=True, targets=["bitsandbytes"])


def test_encoders_have_recipes_by_size_only(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert", tmp_path / "model", START, STOP)
    (tmp_path / "text.txt").write_text(text(400))
    report = api.sensitivity(checkpoint.folder, tokens=64, text=tmp_path / "text.txt")
    made = api.recipe(report, budget_bits=8.0, check=True, tokens=64, text=tmp_path / "text.txt")
    low, mixed, _ = (row for _, row in made.tables["recipe_summary"].iterrows())
    (tmp_path / "other.txt").write_text(text(400, seed=6))
    other = api.recipe(report, budget_bits=8.0, check=True, tokens=64, text=tmp_path / "other.txt")
    assert not any("flatters" in note for note in other.provenance["notes"])
    assert 0 < mixed["measured"] < low["measured"] and "pooler.dense" in report.provenance["kept_modules"]
    with pytest.raises(PlanError, match="which has no KL"):
        api.recipe(report, budget_kl=0.1)


def test_the_page_of_a_recipe_and_hostile_names(nf4: Report, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    linears = nf4.tables["linears"].replace({"tensor": {nf4.tables["linears"]["tensor"][0]: hostile}})
    units = nf4.tables["sensitivity"].replace({"unit": {nf4.tables["sensitivity"]["unit"][0]: hostile}})
    linears["unit"] = linears["unit"].replace({nf4.tables["sensitivity"]["unit"][0]: hostile})
    bad = dataclasses.replace(nf4, tables={**nf4.tables, "sensitivity": units, "linears": linears})
    made = api.recipe(bad, budget_bits=7.0, targets=["bitsandbytes"])
    page = html.render(api.merge_reports([bad, made]))
    assert hostile not in page and "&lt;script&gt;" in page
    assert 'id="recipe"' in html.render(made) and 'id="sensitivity"' not in html.render(made)
    thin = {name: frame.head(1) for name, frame in nf4.tables.items()}
    assert 'id="sensitivity"' in html.render(dataclasses.replace(nf4, tables=thin))
    assert from_json(to_json(made)).tables["recipe"]["kept"].equals(made.tables["recipe"]["kept"])


def test_findings_name_what_predicts_and_what_points_the_wrong_way() -> None:
    def row(name: str, rho: float, outcome: str, p: float = 0.001, expected: str = "more") -> dict:
        ends = {"rho_low": rho - 0.1, "rho_high": rho + 0.1}
        return {
            "statistic": name,
            "rho": rho,
            **ends,
            "n": 50,
            "p_holm": p,
            "rho_within_role": float("nan"),
            "outcome": outcome,
            "expected": expected,
        }

    rows = [row("std", 0.8, "predicts"), row("absmax", -0.6, "wrong way"), row("kurtosis_excess", 0.05, "none", 1.0)]
    said = findings.findings({"correlation": pd.DataFrame(rows)}, {})
    assert [finding["level"] for finding in said] == ["good", "bad", "note"]
    assert "std +0.80 [+0.70, +0.90] over 50 tensors" in said[0]["text"]
    assert "absmax" in said[1]["text"] and "kurtosis_excess" in said[2]["text"]
    (nothing,) = findings.findings({"correlation": pd.DataFrame([row("mean", 0.2, "none", 1.0, "")])}, {})
    assert nothing["text"].startswith("No cheap number")


def test_bfloat16_is_a_format_of_sixteen_bits() -> None:
    import torch

    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert bits_of("bfloat16") == 16 and bits_of("nf4") == 4.5
    assert torch.equal(format_of("bfloat16").roundtrip(weight), weight.bfloat16().float())
    assert Budget.of(size_gb=2.0) == Budget("bytes", 2e9)


# The command line


def test_the_two_commands_work_together(nf4: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, made = tmp_path / "fragile", tmp_path / "recipe"
    words = ["sensitivity", str(demo_model()), "-o", str(out), "--tokens", "32", "--by", "layer"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "Damage of each unit quantized alone" in shown and "all units at once" in shown
    assert cli.main(words) == 1 and "--force" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "-q"]) == 0
    capsys.readouterr()
    words = ["recipe", str(out), "-o", str(made), "--budget-bits", "6", "--for", "bitsandbytes,llama.cpp"]
    assert cli.main([*words, "--fail-on", "recipe_summary[what=recipe].bits_per_weight>6"]) == 0
    shown = capsys.readouterr().out
    assert "weights kept" in shown and f"wrote {made / 'bitsandbytes.json'}" in shown
    assert {"bitsandbytes.json", "llama-cpp.sh", "results.json", "report.html"} <= {p.name for p in made.iterdir()}
    assert cli.main(words) == 1 and "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "recipe r -o o", "recipe r -o o --budget-bits 5 --budget-kl 1", "recipe r -o o --budget-bits 0",
        "recipe r -o o --budget-bits 5 --for vllm", "recipe r -o o --budget-bits 5 --high nf4",
        "recipe -o o --budget-bits 5", "sensitivity m", "sensitivity m -o o --format nf5",
        "sensitivity m -o o --format nf4,fp4", "sensitivity m -o o --by colour",
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert "Usage: vrscope" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.real
def test_a_real_model_is_ranked_and_a_recipe_beats_none(smollm2: Path, tmp_path: Path) -> None:
    report = api.sensitivity(smollm2, tmp_path, tokens=256, by="layer")
    made = api.recipe(report, budget_bits=6.0, check=True, tokens=512, targets=["bitsandbytes", "llama.cpp"])
    low, mixed, _ = (row for _, row in made.tables["recipe_summary"].iterrows())
    assert mixed["change"] < -2 * mixed["change_sem"] and mixed["measured"] < low["measured"]
