"""What commands that run a model say to bad text, overflowing models and too little memory: one line, and no trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vrscope import api, cli
from vrscope.demo import demo_model
from vrscope.fragility import replay
from vrscope.quant import memory

COMMANDS = {
    "analyze": "analyze {model} -o {out}",
    "plan": "plan {model} -o {out} --method awq",
    "sensitivity": "sensitivity {model} -o {out} --by layer",
    "run": "run {model} -o {out}",
    "recipe": "recipe {results} -o {out} --budget-bits 7 --check --model {model}",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    api.save(api.sensitivity(demo_model(), tokens=32, by="layer"), folder, html=False)
    return folder


@pytest.fixture
def refused(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; return its one line."""

    def run(command: str, *more: str, model: Path | None = None) -> str:
        out = tmp_path / "out"
        line = COMMANDS[command].format(model=model or demo_model(), out=out, results=results)
        assert cli.main([*line.split(), "-q", *more]) == 1
        shown = capsys.readouterr()
        assert not out.exists() and not shown.out
        assert shown.err.startswith("vrscope: ") and shown.err.count("\n") == 1, shown.err
        return shown.err

    return run


def changed(folder: Path, **factors: float) -> Path:
    """Return a copy of the demo model with weights of layer 2 multiplied."""
    shutil.copytree(demo_model(), folder)
    weights = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        weights[f"model.layers.2.mlp.{name}.weight"] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Hello there.", "expected text for 128 tokens, found 6. Give a longer text with --text, or ask for fewer"),
        (b"", "expected text, found an empty file"),
        (b" \n\t", "expected text, found an empty file"),
        (b"caf\xe9 " * 500, "expected UTF-8, found byte 0xe9 at 3"),
        (b"abc\0" * 500, "expected text, found a binary file (a zero byte at 3)"),
        (None, "expected a readable text file (No such file or directory). Check --text."),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_bad_text(command: str, content: bytes | None, words: str, refused: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    assert words in refused(command, "--text", str(text), "--tokens", "128")


def test_bad_text_for_calibration_names_its_own_options(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Hello there.")
    said = refused("run", "--calibration-text", str(tmp_path / "short.txt"))
    assert "with --calibration-text, or ask for fewer with --calibration-tokens." in said
    assert "Check --calibration-text." in refused("run", "--calibration-text", str(tmp_path / "none"))
    assert "with --text, or ask for fewer with --calibration-tokens." in refused(
        "run", "--calibration-tokens", "9999999"
    )


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "recipe"])
def test_a_model_without_tokenizer(command: str, refused: Callable[..., str], tmp_path: Path) -> None:
    model = changed(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "expected a tokenizer (tokenizer.json or the like)" in refused(command, model=model)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "recipe"])
@pytest.mark.parametrize(
    ("factors", "place"),
    [
        ({"down_proj": float("nan")}, "in the hidden state at layer 3 (window 1), after model.layers.2.mlp.down_proj"),
        (
            {"up_proj": 1e22, "gate_proj": 1e22},
            "in the inputs of model.layers.2.mlp.down_proj.weight (window 1), after model.layers.2.mlp.up_proj.weight",
        ),
    ],
)
def test_where_activations_stop_being_finite(
    command: str, factors: dict[str, float], place: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    model = changed(tmp_path / "model", **factors)
    said = refused(command, "--tokens", "64", model=model)
    assert f"expected finite activations, found NaN or infinity {place}" in said


def test_a_check_says_where_activations_stop_being_finite(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = changed(tmp_path / "model", down_proj=float("nan"))
    found = json.loads((results / "results.json").read_text())
    found["provenance"]["fingerprint"] = api.open_checkpoint(model).fingerprint()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(found))
    line = f"recipe {tmp_path / 'other'} -o {tmp_path / 'out'} --budget-bits 7 --check --model {model} -q --tokens 64"
    assert cli.main(line.split()) == 1
    assert "in the hidden state at layer 3 (window 1)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "free", "advice"),
    [
        ("analyze", 4 << 20, "Use --dtype bfloat16 if the command has it, fewer --tokens, or a larger machine."),
        ("sensitivity", 24 << 20, "Use --dtype bfloat16 if the command has it, fewer --tokens, or a larger machine."),
        ("recipe", 24 << 20, "Use --dtype bfloat16 if the command has it, fewer --tokens, or a larger machine."),
        ("plan", 12 << 20, "Use a larger machine, --rounds 0, or a method without calibration"),
    ],
)
def test_too_little_memory_is_said_before_it_runs_out(
    command: str, free: int, advice: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    said = refused(command)
    assert "GB of free memory to" in said and advice in said


def test_with_little_memory_less_is_kept_and_the_table_is_the_same(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "free_memory", lambda device: 0)
    slow = api.sensitivity(demo_model(), tokens=32, by="layer")
    kept = api.load_report(results).tables["sensitivity"]
    assert [*zip(*(slow.tables["sensitivity"][name] for name in ("unit", "kl", "kl_sem")), strict=True)] == [
        *zip(*(kept[name] for name in ("unit", "kl", "kl_sem")), strict=True)
    ]
    assert any("whole run" in note for note in slow.provenance["notes"])
