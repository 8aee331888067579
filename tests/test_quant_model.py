"""Damage of whole models, against transformers' own loss and hand-quantized weights; what a rescale cannot change."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import write_safetensors
from quant_tiny import START, STOP, tiny_checkpoint, tiny_sample
from scipy import special

from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.errors import ModelError
from vrscope.quant.formats import FORMATS, get_format
from vrscope.quant.layers import quantized_weights
from vrscope.quant.loading import load_model
from vrscope.quant.metrics import DAMAGE_COLUMNS
from vrscope.quant.model import compare_logits, measure_model
from vrscope.quant.text import load_text, make_sample

EXACT = ["kl", "kl_max", "top1", "perplexity", "perplexity_ratio"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint("bert", tmp_path_factory.mktemp("bert"), START, STOP)


def changed(source: Checkpoint, folder: Path, factors: dict[str, float | torch.Tensor]) -> Checkpoint:
    """Copy a checkpoint with every tensor whose name ends in a key multiplied by its factor."""
    shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    weights = {name: source.read(name) for name in source.tensors}
    for name in weights:
        for ending, factor in factors.items():
            if name.endswith(ending):
                weights[name] = weights[name] * factor
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    return open_checkpoint(folder)


def rescaled(source: Checkpoint, folder: Path) -> Checkpoint:
    """Copy a llama with all of v doubled and o halved, up quartered and down times four: the same function."""
    factors = {"v_proj.weight": 2.0, "v_proj.bias": 2.0, "o_proj.weight": 0.5}
    return changed(source, folder, factors | {"up_proj.weight": 0.25, "up_proj.bias": 0.25, "down_proj.weight": 4.0})


def test_one_row_per_checkpoint_and_format_with_the_columns_described(llama: Checkpoint) -> None:
    frame = measure_model(
        {"first": llama, "second": llama}, [get_format("nf4"), get_format("int8")], tiny_sample(llama)
    )
    assert list(frame.columns) == [column.name for column in DAMAGE_COLUMNS]
    assert list(frame["checkpoint"]) == ["first"] * 3 + ["second"] * 3
    assert list(frame["format"]) == ["none", "nf4", "int8"] * 2
    assert set(frame["tokens"]) == {72} and set(frame["windows"]) == {3}
    assert frame.iloc[0][["kl", "kl_sem", "kl_max", "top1", "perplexity_ratio"]].tolist() == [0, 0, 0, 1, 1]
    assert (
        frame.iloc[:3]
        .drop(columns="checkpoint")
        .equals(frame.iloc[3:].reset_index(drop=True).drop(columns="checkpoint"))
    )
    assert frame[["relative_error", "cosine"]].isna().all(axis=None) and frame.attrs["notes"] == []


def test_perplexity_is_transformers_own_loss(llama: Checkpoint) -> None:
    sample = tiny_sample(llama)
    frame = measure_model({"original": llama}, [], sample)
    model = load_model(llama, "cpu", "float32").model
    losses = [(model(input_ids=(ids := torch.tensor([w])), labels=ids).loss.item(), len(w) - 1) for w in sample.windows]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert frame["perplexity"][0] == pytest.approx(math.exp(mean), rel=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int4-g32", "int8-row"])
def test_damage_is_that_of_the_hand_quantized_model(llama: Checkpoint, name: str) -> None:
    sample = tiny_sample(llama)
    row = measure_model({"original": llama}, [get_format(name)], sample).iloc[1]
    model = load_model(llama, "cpu", "float32").model

    def log_shares() -> np.ndarray:
        logits = [model(input_ids=torch.tensor([window])).logits[0].double().numpy() for window in sample.windows]
        return special.log_softmax(np.concatenate(logits), axis=1)

    with torch.no_grad():
        before = log_shares()
        for path, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                layer.weight.copy_(get_format(name).roundtrip(layer.weight))
        after = log_shares()
    kl = special.rel_entr(np.exp(before), np.exp(after)).sum(axis=1)
    assert row["kl"] == pytest.approx(kl.mean(), rel=1e-6) and row["kl_p90"] == pytest.approx(
        np.quantile(kl, 0.9), rel=1e-6
    )
    assert row["kl_sem"] == pytest.approx(kl.std(ddof=1) / math.sqrt(72), rel=1e-6)
    assert row["top1"] == (before.argmax(1) == after.argmax(1)).mean()
    labels = [
        (start + i, token)
        for start, w in zip((0, 32, 64), sample.windows, strict=True)
        for i, token in enumerate(w[1:])
    ]
    gain = np.mean([before[i, token] - after[i, token] for i, token in labels])
    assert row["perplexity_ratio"] == pytest.approx(math.exp(gain), rel=1e-6)


@pytest.mark.parametrize("case", ["gpt2", "mixtral", "opt", "gemma3"])
def test_every_format_runs_on_every_kind_of_layer(case: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(case, tmp_path)
    frame = measure_model({"original": checkpoint}, FORMATS, tiny_sample(checkpoint, 40)).set_index("format")
    assert (frame["kl"].drop("none") > 0).all() and frame["kl"]["none"] == 0
    assert frame["kl"]["int8-row"] < frame["kl"]["nf4"] and frame["kl"]["int8-row"] < frame["kl"]["int4-row"]
    assert bool(frame.attrs["notes"]) == (case == "mixtral")


def test_encoders_are_measured_by_their_last_hidden_state(bert: Checkpoint) -> None:
    sample = tiny_sample(bert)
    frame = measure_model({"original": bert}, [get_format("nf4"), get_format("int8-row")], sample).set_index("format")
    assert frame["relative_error"]["none"] == 0 and frame["cosine"]["none"] == pytest.approx(1, abs=1e-12)
    assert 0 < frame["relative_error"]["int8-row"] < frame["relative_error"]["nf4"] < 1
    assert frame["cosine"]["nf4"] < frame["cosine"]["int8-row"] < 1
    assert frame[["kl", "top1", "perplexity", "perplexity_ratio"]].isna().all(axis=None)
    assert set(frame["tokens"]) == {72}
    model = load_model(bert, "cpu", "float32").model
    with torch.no_grad():
        before = [model(input_ids=torch.tensor([window])).last_hidden_state[0].double() for window in sample.windows]
        for weight in quantized_weights(model):
            weight.parameter.copy_(get_format("nf4").roundtrip(weight.parameter))
        after = [model(input_ids=torch.tensor([window])).last_hidden_state[0].double() for window in sample.windows]
    error = torch.cat([(b - a).norm(dim=1) / a.norm(dim=1) for a, b in zip(before, after, strict=True)])
    assert frame["relative_error"]["nf4"] == pytest.approx(float(error.mean()), rel=1e-6)
    assert frame["relative_error_sem"]["nf4"] == pytest.approx(float(error.std()) / math.sqrt(72), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_powers_of_two_per_tensor_change_no_figure_of_a_format_without_threshold(
    llama: Checkpoint, tmp_path: Path, dtype: str
) -> None:
    other, sample = rescaled(llama, tmp_path), tiny_sample(llama)
    formats = [entry for entry in FORMATS if not entry.replaces_layers]
    frame = measure_model({"original": llama, "rescaled": other}, formats, sample, dtype=dtype)
    first, second = (frame[frame["checkpoint"] == name].set_index("format") for name in ("original", "rescaled"))
    assert second.loc["none", "kl_max"] == 0 and second.loc["none", "top1"] == 1
    assert first[EXACT].equals(second[EXACT])
    assert (first["kl"].drop("none") > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_of_an_exact_rescale_are_equal_bit_for_bit(llama: Checkpoint, tmp_path: Path, dtype: str) -> None:
    found = compare_logits(llama, rescaled(llama, tmp_path), tiny_sample(llama), dtype=dtype)
    assert found.bit_equal and found.max_abs_difference == 0 and found.mean_kl == 0
    assert (found.tokens, found.dtype) == (72, dtype)


@pytest.mark.parametrize(("factor", "low", "high"), [(3.0, 1e-8, 1e-3), (2.0, 0, 0)])
def test_a_factor_that_rounds_is_seen_and_small(
    llama: Checkpoint, tmp_path: Path, factor: float, low: float, high: float
) -> None:
    factors = {"v_proj.weight": factor, "v_proj.bias": factor, "o_proj.weight": 1 / factor}
    found = compare_logits(llama, changed(llama, tmp_path, factors), tiny_sample(llama))
    assert found.bit_equal == (high == 0) and low <= found.max_abs_difference <= high
    assert 0 <= found.mean_kl < 1e-6


def test_another_function_is_seen(llama: Checkpoint, bert: Checkpoint, tmp_path: Path) -> None:
    found = compare_logits(llama, changed(llama, tmp_path / "a", {"v_proj.weight": 2.0}), tiny_sample(llama))
    assert not found.bit_equal and found.max_abs_difference > 0.01 and found.mean_kl > 1e-4
    encoders = compare_logits(bert, changed(bert, tmp_path / "b", {"value.weight": 1.5}), tiny_sample(bert))
    assert not encoders.bit_equal and encoders.max_abs_difference > 0.01 and math.isnan(encoders.mean_kl)


def test_models_without_finite_outputs_are_not_bit_equal_by_chance_of_a_maximum(
    llama: Checkpoint, tmp_path: Path
) -> None:
    found = compare_logits(
        llama, changed(llama, tmp_path, {"layers.1.mlp.down_proj.weight": math.nan}), tiny_sample(llama)
    )
    assert not found.bit_equal and math.isnan(found.max_abs_difference) and math.isnan(found.mean_kl)


def test_checkpoints_of_different_kinds_are_refused(llama: Checkpoint, bert: Checkpoint) -> None:
    with pytest.raises(ModelError, match=r"expected outputs of shape \(32, 97\) like the original's, found \(32, 64\)"):
        measure_model({"original": llama, "other": bert}, [], tiny_sample(llama))
    with pytest.raises(ModelError, match="Compare checkpoints of the same model"):
        compare_logits(llama, bert, tiny_sample(llama))


def test_progress_tells_every_window_of_every_pass(llama: Checkpoint) -> None:
    calls: list[tuple[str, int, int, str]] = []
    note = lambda *call: calls.append(call)  # noqa: E731
    measure_model({"original": llama}, [get_format("nf4")], tiny_sample(llama), progress=note)
    stages = ["original, not quantized"] * 3 + ["original, nf4"] * 3
    assert calls == [(stage, done, 72, "tokens") for stage, done in zip(stages, (32, 64, 72) * 2, strict=True)]
    calls.clear()
    compare_logits(llama, llama, tiny_sample(llama), progress=note)
    assert [call[1] for call in calls] == [32, 64, 72] * 2


def test_measuring_prints_and_logs_nothing(
    llama: Checkpoint, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    measure_model({"original": llama}, FORMATS, tiny_sample(llama))
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(llama: Checkpoint) -> None:
    with pytest.raises(ModelError, match="expected auto, cpu or cuda"):
        measure_model({"original": llama}, [], tiny_sample(llama), device="tpu")


@pytest.mark.real
def test_smollm2_keeps_its_wits_on_the_shipped_text(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    sample = make_sample(load_text(None), checkpoint, 256, 128)
    frame = measure_model({"original": checkpoint}, [get_format("nf4"), get_format("int8-row")], sample).set_index(
        "format"
    )
    assert 2 < frame["perplexity"]["none"] < 60
    assert 0.0005 < frame["kl"]["int8-row"] < 0.02 < 0.1 < frame["kl"]["nf4"] < 1


@pytest.mark.real
def test_minilm_is_measured_as_an_encoder(minilm: Path) -> None:
    checkpoint = open_checkpoint(minilm)
    sample = make_sample(load_text(None), checkpoint, 256, 128)
    assert sample.special == (1, 1) and (sample.windows[0][0], sample.windows[0][-1]) == (101, 102)
    frame = measure_model({"original": checkpoint}, [get_format("nf4"), get_format("int8-row")], sample).set_index(
        "format"
    )
    assert 0.001 < frame["relative_error"]["int8-row"] < 0.05 < frame["relative_error"]["nf4"] < 0.5
    assert frame["cosine"]["int8-row"] > 0.999 > frame["cosine"]["nf4"] > 0.9
