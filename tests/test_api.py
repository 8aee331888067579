"""The main job through the Python interface, on the demo model: files, tables, truth of what the page says."""

import json
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

import vrscope
from vrscope import api
from vrscope.demo import demo_model
from vrscope.errors import (
    CheckpointError,
    FamilyError,
    OutputError,
    PlanError,
    TextError,
    UnknownNameError,
    VerificationError,
)

FORMATS = ("int8-row", "nf4", "int4-g64")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run with tensor-wise scales that do move something."""
    out = tmp_path_factory.mktemp("run") / "out"
    report = vrscope.run(demo_model(), out, method="tvr", target_std=0.05, formats=FORMATS, tokens=256)
    return out, report


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("random") / "b"
    plan = vrscope.rescale(demo_model(), out, method="random", seed=3)
    return demo_model(), out, plan


def test_a_run_leaves_everything_the_page_shows(finished):
    out, report = finished
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "report.html",
        "results.json",
        "plan.json",
        "rescaled",
        "tensors.csv",
        "damage.csv",
        "weight_error.csv",
    }
    body = json.loads((out / "results.json").read_text())
    assert body["schema_version"] == 1 and body["kind"] == "run"
    assert {"checkpoint", "format", "tokens", "kl", "kl_sem", "top1", "perplexity"} <= set(body["damage"][0])
    assert {(row["checkpoint"], row["format"]) for row in body["damage"]} == {
        (checkpoint, name) for checkpoint in ("original", "rescaled") for name in ("none", *FORMATS)
    }
    assert all(row["tokens"] == 256 for row in body["damage"])
    for table in (
        "tensors",
        "depth_law",
        "histograms",
        "spaces",
        "matrices",
        "unreachable",
        "reach",
        "proof",
        "weight_error",
    ):
        assert body[table], table
        described = {column["name"] for column in body["columns"][table]}
        assert described == set(body[table][0]), table
    assert body["provenance"]["text"] and body["provenance"]["versions"]["bitsandbytes"]
    assert (out / "rescaled" / "vrscope_plan.json").is_file()
    assert len(pd.read_csv(out / "tensors.csv")) == len(report.tables["tensors"])


def test_no_number_of_the_results_is_infinite_or_nan(finished):
    def refuse(constant):
        pytest.fail(f"{constant} in the JSON")

    json.loads((finished[0] / "results.json").read_text(), parse_constant=refuse)


def test_the_page_says_what_tensor_wise_scales_cannot_change_and_the_numbers_agree(finished):
    _, report = finished
    damage = report.tables["damage"].set_index(["checkpoint", "format"])
    for name in FORMATS:
        assert damage.loc[("original", name), "kl"] > 0
        assert damage.loc[("original", name), "kl"] == damage.loc[("rescaled", name), "kl"]
    assert damage.loc[("rescaled", "none"), "kl"] == 0 and damage.loc[("rescaled", "none"), "top1"] == 1
    assert not report.tables["reach"]["can_change"].any()
    assert report.tables["spaces"]["changed"].sum() > 0
    said = " ".join(item["text"] for item in report.verdict)
    assert "cannot change int8-row, nf4, int4-g64 at all" in said and "bit for bit" in said
    page = (finished[0] / "report.html").read_text()
    assert "absorbs" in page


def test_results_can_be_loaded_redrawn_and_merged(finished, tmp_path):
    out, report = finished
    again = api.load_report(out)
    assert again.verdict == tuple(dict(item) for item in report.verdict)
    assert set(again.tables) == set(report.tables)
    pd.testing.assert_frame_equal(
        again.tables["damage"], report.tables["damage"], check_dtype=False, check_exact=True, check_frame_type=True
    )
    other = vrscope.measure(demo_model(), formats=["fp4"], tokens=64)
    merged = api.merge_reports([again, other])
    assert set(merged.tables["damage"]["format"]) == {"none", "fp4"} and "spaces" in merged.tables
    assert next(path.name for path in api.save(merged, tmp_path / "m")) == "results.json"
    with pytest.raises(CheckpointError, match="no readable results"):
        api.load_report(tmp_path / "absent")
    for text in ("{}", '{"schema_version": 1}', "[" * 5000, '{"schema_version": 1, "columns": []}', "3", "null"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a vrscope results file"):
            api.load_report(tmp_path / "bad.json")


def test_verify_proves_weights_and_outputs_both_ways(random_pair):
    a, b, plan = random_pair
    assert plan.equivalent == "bit-equal" and plan.changed > 1000
    proof = vrscope.verify(a, b, logits=True, tokens=64).tables["proof"]
    assert list(proof["check"]) == ["weights", "outputs, float32", "outputs, bfloat16"]
    assert set(proof["result"]) == {"bit-equal"}
    assert set(vrscope.verify(b, a).tables["proof"]["result"]) == {"bit-equal"}  # the recorded plan, inverted
    assert set(vrscope.verify(a, a).tables["proof"]["result"]) == {"bit-equal"}


def test_verify_refuses_a_changed_copy_and_an_unrelated_one(random_pair, tmp_path):
    a, _, _ = random_pair
    out = tmp_path / "b"
    vrscope.rescale(a, out, method="random")
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name].view(torch.int16)[7, 7] ^= 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="down_proj"):
        vrscope.verify(a, out)
    with pytest.raises(VerificationError, match="down_proj"):
        vrscope.verify(a, out, plan=out / "vrscope_plan.json")
    with pytest.raises(VerificationError, match=r"expected the vrscope_plan\.json"):
        vrscope.verify(a, save_tiny("llama", tmp_path / "other"))


def test_inverting_restores_every_byte(random_pair, tmp_path):
    a, b, _ = random_pair
    vrscope.rescale(b, tmp_path / "back", plan=b / "vrscope_plan.json", invert=True)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (a / "model.safetensors").read_bytes()
    with pytest.raises(PlanError, match="plan to undo"):
        vrscope.rescale(b, tmp_path / "never", invert=True)


def test_plans_are_files_that_rescale_takes(tmp_path):
    plan = vrscope.plan(demo_model(), method="wisca", granularity="channel", norm="l1")
    path = plan.save(tmp_path / "plan.json")
    done = vrscope.rescale(demo_model(), tmp_path / "out", plan=path)
    assert {name: values.tolist() for name, values in done.spaces.items()} == {
        name: values.tolist() for name, values in plan.spaces.items()
    }
    described = api.describe(demo_model(), plan)
    assert set(described.tables) == {"spaces", "matrices", "unreachable", "reach", "exponents"}
    assert described.tables["spaces"]["changed"].sum() == plan.changed


def test_raw_tvr_is_labelled_and_costs(tmp_path):
    report = vrscope.run(demo_model(), tmp_path / "out", method="tvr", raw=True, formats=["nf4"], tokens=128)
    damage = report.tables["damage"].set_index(["checkpoint", "format"])
    assert damage.loc[("rescaled", "none"), "kl"] > 0.01
    assert report.provenance["equivalent"] == "not equivalent"
    assert report.verdict[0]["level"] == "bad" and report.verdict[0]["text"].startswith("NOT EQUIVALENT")
    assert "NOT EQUIVALENT" in (tmp_path / "out" / "report.html").read_text().upper()
    with pytest.raises(VerificationError, match="not function-preserving"):
        vrscope.verify(demo_model(), tmp_path / "out" / "rescaled")


def test_raw_tvr_is_labelled_wherever_its_checkpoint_is_looked_at(tmp_path):
    plan = vrscope.rescale(demo_model(), tmp_path / "raw", method="tvr", raw=True)
    assert plan.changed == len(plan.affine) > 0
    for report in (
        vrscope.measure(demo_model(), tmp_path / "raw", formats=["nf4"], tokens=32),
        vrscope.analyze(tmp_path / "raw"),
    ):
        assert report.verdict[0]["text"].startswith("NOT EQUIVALENT")
        api.save(report, tmp_path / report.kind)
        assert "not equivalent" in (tmp_path / report.kind / "report.html").read_text().lower()


def test_free_scales_are_never_said_to_change_nothing(tmp_path):
    report = vrscope.run(
        demo_model(), tmp_path / "out", method="tvr", target_std=0.05, scales="free", formats=FORMATS, tokens=64
    )
    assert report.tables["reach"]["can_change"].all()
    assert not any("cannot change" in item["text"] for item in report.verdict)


def test_free_scales_say_what_they_cost(tmp_path):
    report = vrscope.run(
        demo_model(), tmp_path / "out", method="wisca", scales="free", formats=["int8-row"], tokens=128
    )
    assert report.provenance["equivalent"] == "equal up to rounding"
    kl = report.tables["damage"].set_index(["checkpoint", "format"]).loc[("rescaled", "none"), "kl"]
    assert 0 < kl < 0.01


def test_a_rescaled_checkpoint_loads_in_transformers_and_in_four_bits(random_pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    a, b, _ = random_pair
    tokens = AutoTokenizer.from_pretrained(b)("def open(file): return", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (a, b)]
    assert torch.equal(*logits)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(b, quantization_config=config, device_map="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits.float()).all()


def test_analyze_works_on_undeclared_and_on_quantized_checkpoints(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "nanochat"}))
    report = vrscope.analyze(folder, weights_only=True)
    assert report.provenance["family"] is None
    assert set(report.tables["tensors"]["role"]) >= {"self_attn.q_proj", "mlp.down_proj"}
    with pytest.raises(FamilyError, match="nanochat"):
        vrscope.plan(folder)
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert "quantization" in vrscope.analyze(folder, weights_only=True).provenance
    with pytest.raises(CheckpointError, match="already quantized"):
        vrscope.rescale(folder, tmp_path / "out")


def test_analyze_reports_nan_and_goes_on(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = vrscope.analyze(folder, per="head", weights_only=True)
    assert report.verdict[0]["level"] == "bad" and "3 NaN" in report.verdict[0]["text"]
    assert {"q", "k", "v"} <= set(report.tables["heads"]["part"])
    channels = vrscope.analyze(folder, per="channel", weights_only=True).tables["channels"]
    assert np.isfinite(channels.loc[channels["tensor"] == "model.norm.weight", "std"]).all()


def test_an_output_in_use_is_refused_before_any_work(finished, tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        vrscope.run(demo_model(), finished[0])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="found a file"):
        vrscope.run(demo_model(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_force_replaces_an_earlier_run(tmp_path):
    for seed in (0, 1):
        vrscope.run(
            demo_model(), tmp_path / "out", method="random", seed=seed, formats=["int8-row"], tokens=32, force=True
        )
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["settings"]["seed"] == 1
    assert plan["result"] == json.loads((tmp_path / "out" / "rescaled" / "vrscope_plan.json").read_text())["result"]


def test_results_are_not_written_over_others_nor_into_a_checkpoint(finished, tmp_path):
    report = finished[1]
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(OutputError, match=r"report\.html: exists already"):
        api.save(report, tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
    with pytest.raises(OutputError, match="is a checkpoint"):
        api.save(report, demo_model(), force=True)
    plan = vrscope.plan(demo_model())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="not a plan"):
        plan.save(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_text() == "{}"


def test_an_interrupted_run_leaves_no_mixture(tmp_path, monkeypatch):
    """With --force, results of the earlier run are gone before its checkpoint is replaced."""
    out = tmp_path / "out"
    vrscope.run(demo_model(), out, method="random", formats=["int8-row"], tokens=32)

    def stop(stage, done, total, unit):
        if stage.startswith("original"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vrscope.run(demo_model(), out, method="wisca", formats=["int8-row"], tokens=32, force=True, progress=stop)
    assert [path.name for path in out.iterdir()] == ["rescaled"]


def test_saving_leaves_all_results_or_none(tmp_path, monkeypatch):
    report, out = vrscope.analyze(demo_model(), weights_only=True), tmp_path / "out"

    def interrupted(where, effect):
        with monkeypatch.context() as patched:
            patched.setattr(where, mock.Mock(side_effect=effect))
            with pytest.raises(KeyboardInterrupt):
                api.save(report, out, force=True)

    interrupted("vrscope.report.html.render", KeyboardInterrupt)
    assert not out.exists()
    interrupted("pathlib.Path.chmod", [None, None, KeyboardInterrupt])  # in the third file
    assert list(out.iterdir()) == []
    before = api.save(report, out)
    interrupted("vrscope.report.html.render", KeyboardInterrupt)
    assert all(path.is_file() for path in before), "nothing is removed before all is rendered"


def test_a_forced_run_that_is_refused_keeps_the_earlier_results(tmp_path, monkeypatch):
    from vrscope.quant import model

    out = tmp_path / "out"
    vrscope.run(demo_model(), out, method="random", formats=["int8-row"], tokens=32)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UnknownNameError):
        vrscope.run(demo_model(), out, method="wiska", formats=["int8-row"], tokens=32, force=True)
    monkeypatch.setattr(model, "compare_logits", lambda *_, **__: model.LogitComparison(False, 0.5, 0.1, 32, "float32"))
    with pytest.raises(VerificationError):
        vrscope.run(demo_model(), out, method="wisca", formats=["int8-row"], tokens=32, force=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_copy_whose_outputs_differ_never_stands(tmp_path, monkeypatch):
    """If the models disagree although the weights were proved, the declaration is wrong: nothing is left."""
    from vrscope.quant import model

    def differ(*arguments, **settings):
        return model.LogitComparison(False, 0.5, 0.1, 32, "float32")

    monkeypatch.setattr(model, "compare_logits", differ)
    with pytest.raises(VerificationError, match="declaration of family 'llama'"):
        vrscope.run(demo_model(), tmp_path / "out", method="random", formats=["int8-row"], tokens=32)
    assert not (tmp_path / "out" / "rescaled").exists()


def test_what_can_be_refused_is_refused_first_and_leaves_nothing(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    out = tmp_path / "out"
    for error, arguments in [
        (TextError, {"text": tmp_path / "short.txt"}),
        (UnknownNameError, {"formats": ["nf5"]}),
        (UnknownNameError, {"method": "wiska"}),
        (UnknownNameError, {"granularity": "row"}),
        (UnknownNameError, {"granularty": "row"}),
    ]:
        with pytest.raises(error):
            vrscope.run(demo_model(), out, **arguments)
        assert not out.exists()


def test_measure_labels_and_weights_only(random_pair):
    a, b, _ = random_pair
    report = vrscope.measure(a, b, b, formats=["int4-g64"], weights_only=True)
    assert "damage" not in report.tables
    assert list(dict.fromkeys(report.tables["weight_error"]["checkpoint"])) == ["original", "rescaled", "rescaled-2"]


@pytest.mark.real
def test_smollm2_is_bit_equal_under_every_method(smollm2, tmp_path):
    for number, (method, options) in enumerate(
        [
            ("wisca", {"granularity": "tensor"}),
            ("wisca", {"granularity": "head"}),
            ("wisca", {"granularity": "channel"}),
            ("tvr", {}),
            ("random", {}),
        ]
    ):
        out = tmp_path / str(number)
        assert vrscope.rescale(smollm2, out, method=method, **options).changed > 0
        proof = vrscope.verify(smollm2, out, logits=True, tokens=32).tables["proof"]
        assert set(proof["result"]) == {"bit-equal"}, method


@pytest.mark.real
def test_minilm_is_bit_equal_under_random_scales(minilm, tmp_path):
    assert vrscope.rescale(minilm, tmp_path / "out", method="random").changed > 1000
    proof = vrscope.verify(minilm, tmp_path / "out", logits=True, tokens=64).tables["proof"]
    assert list(proof["result"]) == ["bit-equal"] * 3


def test_an_output_inside_the_model_is_refused_first(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    with pytest.raises(OutputError):
        vrscope.run(folder, folder / "out")
    assert not (folder / "out").exists()


def test_a_revision_is_of_the_first_model_in_every_command():
    for call in (lambda: vrscope.verify(demo_model(), demo_model(), revision="x"), lambda: measure_at("x")):
        with pytest.raises(CheckpointError, match="a revision"):
            call()


def measure_at(revision):
    return vrscope.measure(demo_model(), weights_only=True, formats=["int8-row"], revision=revision)
