"""`analyze` with activations: which tables there are, and one clear line where a model or a text cannot be run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from quant_tiny import save_tokenizer, text, tiny_checkpoint
from tiny_models import save_tiny

import vrscope
from vrscope import stages
from vrscope.cli import main
from vrscope.errors import ModelError, TextError
from vrscope.stats import measure
from vrscope.stats.device import summarize_block_on
from vrscope.tables import Report, from_json, to_json


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    tiny_checkpoint("mixtral", folder)
    return folder


@pytest.fixture(scope="module")
def report(moe: Path) -> Report:
    return vrscope.analyze(moe, tokens=96, per="channel")


def test_the_tables_of_weights_and_activations_are_there_and_described(report: Report) -> None:
    names = {"activations", "residual", "outlier_dimensions", "experts", "activation_channels"}
    assert names | {"tensors", "depth_law", "histograms", "channels"} == set(report.tables)
    for name, frame in report.tables.items():
        assert list(frame.columns) == [column.name for column in report.columns[name]]
        assert all(column.meaning.endswith(".") for column in report.columns[name])
    assert report.provenance["tokens"] == 96 and report.provenance["dtype"] == "float32"
    again = from_json(to_json(report))
    assert set(again.tables) == set(report.tables)


def test_weights_only_runs_no_model_and_needs_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(stages, "fill_activations", fail)
    found = vrscope.analyze(save_tiny("llama", tmp_path), weights_only=True)
    assert set(found.tables) == {"tensors", "depth_law", "histograms"} and "tokens" not in found.provenance


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--weights-only"]):
        assert main(["analyze", str(tmp_path / "absent"), "--device", "cuda", *arguments]) == 1
        shown = capsys.readouterr().err
        assert shown == "vrscope: device 'cuda': expected a GPU, found none that torch can use. Use --device cpu.\n"
    with pytest.raises(ModelError, match="expected auto, cpu or cuda"):
        vrscope.analyze(tmp_path / "absent", weights_only=True, device="tpu")


def test_statistics_of_weights_go_to_the_gpu_only_if_asked(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []

    def by_torch(device: str, *rest: Any) -> Any:
        where.append(device)
        return summarize_block_on("cpu", *rest)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "summarize_block_on", by_torch)
    plain = {device: vrscope.analyze(moe, weights_only=True, device=device) for device in ("auto", "cpu")}
    assert where == []
    found = vrscope.analyze(moe, weights_only=True, device="cuda")
    assert set(where) == {"cuda"} and len(where) >= len(found.tables["tensors"])
    pd.testing.assert_frame_equal(found.tables["tensors"], plain["cpu"].tables["tensors"], check_exact=False, rtol=1e-9)
    assert found.provenance["device"] == "cuda" and found.provenance["command"].endswith("--device cuda")
    assert "device" not in plain["auto"].provenance and "--device" not in plain["auto"].provenance["command"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected text, found an empty file"),
        (b" \n\t ", "expected text, found an empty file"),
        (b"\xff\xfe\xfa", "expected UTF-8, found byte 0xff at 0"),
        (b"ab\0cd", "found a binary file"),
        (text(50).encode(), "expected text for 2,048 tokens, found 50"),
    ],
)
def test_text_that_cannot_be_run_is_one_line(moe: Path, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(TextError, match=words) as caught:
        vrscope.analyze(moe, text=file)
    assert "\n" not in str(caught.value)


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_tokenizer, "expected a tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "expected a config.json"),
        (config(model_type="strange"), "this transformers does not know"),
        (config(is_encoder_decoder=True), "found an encoder-decoder"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized already"),
        (config(vocab_size=50), "cannot build the model"),
    ],
)
def test_a_model_that_cannot_be_run_is_one_line_with_the_way_around(
    tmp_path: Path, change: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", tmp_path)
    save_tokenizer(tmp_path)
    change(tmp_path)
    (tmp_path / "t.txt").write_text(text(200))
    with pytest.raises(ModelError, match=words) as caught:
        vrscope.analyze(tmp_path, text=tmp_path / "t.txt", tokens=64)
    assert "--weights-only" in str(caught.value)
    capsys.readouterr()
    assert main(["analyze", str(tmp_path), "--tokens", "64", "-q"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["analyze", str(tmp_path), "--weights-only", "-q"]) == 0


def test_windows_are_never_longer_than_the_models_positions(moe: Path) -> None:
    found = vrscope.analyze(moe, tokens=200)
    assert found.provenance["window"] == 64 and found.tables["residual"]["tokens"].eq(200).all()


def test_the_command_shows_activations(moe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["analyze", str(moe), "--tokens", "96", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    for words in ("Hidden state at the entry", "Inputs of linear layers", "Tokens of the experts"):
        assert words in shown
    assert {"activations.csv", "residual.csv", "experts.csv"} <= {path.name for path in out.iterdir()}
    page = (out / "report.html").read_text()
    assert 'id="activations"' in page and "Magnitudes of the hidden state" in page
    assert main(["analyze", str(moe), "--tokens", "96", "--fail-on", "residual.top1>0", "-q"]) == 3


def test_the_list_of_statistics_has_those_of_activations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "statistics", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {entry["of"] for entry in entries} == {"weights", "activations"}
    assert {"channel_spread", "mean_abs"} <= {entry["statistic"] for entry in entries if entry["of"] == "activations"}
