"""Loading models and tokenizers: what is causal, what is refused and in which words, and that nothing is printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_safetensors
from quant_tiny import save_tokenizer, text, tiny_checkpoint
from tiny_models import MODELS, save_tiny

from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.errors import ModelError
from vrscope.quant import memory
from vrscope.quant.loading import (
    fuse_attention,
    is_causal,
    load_model,
    load_tokenizer,
    quiet_transformers,
    resolve_device,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def with_config(source: Checkpoint, folder: Path, **changes: Any) -> Checkpoint:
    """Copy a checkpoint with some of its config changed; None removes an entry."""
    shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    config = {key: value for key, value in {**source.config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def refused(checkpoint: Checkpoint, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(checkpoint, "cpu", "float32")
    assert "\n" not in str(caught.value) and checkpoint.name in str(caught.value)


ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
NOT_TEXT_TO_TEXT = {"vit": "reads pixel_values", "deit": "reads pixel_values", "t5": "encoder-decoder"}
NOT_TEXT_TO_TEXT |= dict.fromkeys(("mt5", "umt5", "whisper"), "encoder-decoder")


NOT_FUSED = ("gemma2", "vaultgemma", "gpt_oss", "granite_swa", "mamba2")  # soft caps, sinks, or no attention


@pytest.mark.parametrize("case", [case for case in MODELS if not case.startswith(tuple(NOT_TEXT_TO_TEXT))])
def test_attention_in_one_step_says_the_same_or_is_left_out(case: str, tmp_path: Path) -> None:
    loaded = load_model(open_checkpoint(save_tiny(case, tmp_path)), "cpu", "float32")
    window = tuple((7 * i) % 90 + 3 for i in range(40))
    before = loaded.run(window)
    assert fuse_attention(loaded, window[:24]) == (case not in NOT_FUSED)
    after = loaded.run(window)
    if case in NOT_FUSED:
        assert torch.equal(before, after)
    assert (before - after).norm() < 1e-5 * before.norm()


def test_attention_in_one_step_that_says_something_else_is_not_used(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    fused = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(module: Any, query: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        return fused(module, 1.01 * query, *arguments, **named)

    loaded, window = load_model(llama, "cpu", "float32"), tuple(range(3, 43))
    before = loaded.run(window)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", other)
    assert not fuse_attention(loaded, window) and torch.equal(loaded.run(window), before)
    monkeypatch.undo()
    assert fuse_attention(loaded, window) and not torch.equal(loaded.run(window), before)


@pytest.mark.parametrize("case", MODELS)
def test_every_family_loads_and_runs_as_what_it_is(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny(case, tmp_path))
    words = next((words for start, words in NOT_TEXT_TO_TEXT.items() if case.startswith(start)), None)
    if words is not None:
        refused(checkpoint, words)
        return
    loaded = load_model(checkpoint, "cpu", "float32")
    assert loaded.causal == (not case.startswith(ENCODERS))
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "eager"
    found = loaded.run((3, 4, 5))
    assert found.shape == (3, 97 if loaded.causal else 64) and found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "bert"}, False),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, False),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, True),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, True),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, True),
        ({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}, False),
    ],
)
def test_the_config_says_whether_a_model_is_causal(
    llama: Checkpoint, tmp_path: Path, config: dict[str, Any], causal: bool
) -> None:
    assert is_causal(with_config(llama, tmp_path, **{"architectures": None, **config})) == causal


def test_configs_that_cannot_be_run_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    refused(with_config(llama, tmp_path / "a", model_type="strange"), "model_type 'strange', which this transformers")
    refused(with_config(llama, tmp_path / "b", model_type=None), "model_type None")
    refused(with_config(llama, tmp_path / "c", model_type="t5", is_encoder_decoder=True), "found an encoder-decoder")
    refused(with_config(llama, tmp_path / "d", hidden_size=60), "cannot build the model")
    refused(with_config(llama, tmp_path / "e", num_attention_heads="many"), "cannot build the model")
    (llama_copy := with_config(llama, tmp_path / "f")).folder.joinpath("config.json").unlink()
    refused(open_checkpoint(llama_copy.folder), "expected a config.json")


def test_code_in_a_checkpoint_is_not_run(llama: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    changed = with_config(llama, tmp_path, model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    refused(changed, "Code from a checkpoint is never run")
    load_model(with_config(llama, tmp_path, auto_map={"AutoModelForCausalLM": "evil.Evil"}), "cpu", "float32")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_refused_and_buffers_are_not(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.folder, tmp_path, dirs_exist_ok=True)
    weights = {name: llama.read(name) for name in llama.tensors if "q_proj.weight" not in name}
    write_safetensors(tmp_path / "model.safetensors", weights, {"format": "pt"})
    refused(open_checkpoint(tmp_path), r"expected weight 'model\.layers\.0\.self_attn\.q_proj\.weight' and 1 more")


def test_a_masked_language_model_without_a_pooler_is_an_encoder(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("bert-mlm", tmp_path))
    assert not any("pooler" in name for name in checkpoint.tensors)
    assert load_model(checkpoint, "cpu", "float32").run((3, 4)).shape == (2, 64)


def test_quantized_checkpoints_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    changed = with_config(llama, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(changed, "found it quantized already")


def test_a_file_of_any_name_is_loaded(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    found = load_model(open_checkpoint(tmp_path / "other.safetensors"), "cpu", "float32").run((3, 4, 5))
    assert torch.equal(found, load_model(llama, "cpu", "float32").run((3, 4, 5)))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_shards_are_loaded(llama: Checkpoint, tmp_path: Path, index: str) -> None:
    save_tiny("llama", tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / index)
    checkpoint = open_checkpoint(tmp_path / index)
    assert len(checkpoint.shards) > 1 and checkpoint.index == index
    found = load_model(checkpoint, "cpu", "float32").run((3, 4, 5))
    assert torch.equal(found, load_model(llama, "cpu", "float32").run((3, 4, 5)))


def test_dtypes(llama: Checkpoint) -> None:
    loaded = load_model(llama, "cpu", "bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    exact = load_model(llama, "cpu", "float32").run((3, 4, 5))
    assert 0 < (loaded.run((3, 4, 5)) - exact).abs().max() < 0.2 * exact.abs().max()
    with pytest.raises(ModelError, match="expected float32 or bfloat16"):
        load_model(llama, "cpu", "float16")


def test_tokens_of_another_vocabulary_are_refused(llama: Checkpoint) -> None:
    with pytest.raises(ModelError, match="expected tokens below 97, found 97"):
        load_model(llama, "cpu", "float32").run((3, 97))


def test_too_little_memory_is_said_before_loading(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    count = sum(info.numel for info in llama.tensors.values())
    monkeypatch.setattr(memory, "free_memory", lambda device: 8 * count - 1)
    refused(llama, r"expected 0\.0 GB of free memory to run it in float32")
    load_model(llama, "cpu", "bfloat16")
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    load_model(llama, "cpu", "float32")


def test_free_memory_is_known_here_and_sensible() -> None:
    free = memory.free_memory("cpu")
    assert free is not None and 10**8 < free < 10**14


def test_more_tokens_than_positions_are_one_line(tmp_path: Path) -> None:
    loaded = load_model(tiny_checkpoint("gpt2", tmp_path), "cpu", "float32")
    with pytest.raises(ModelError, match=r"expected positions for 65 tokens, found fewer") as refused:
        loaded.run((5,) * 65)
    assert "\n" not in str(refused.value)


def test_memory_that_runs_out_while_running_is_one_line(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(llama, "cpu", "float32")

    def fail(*args: object, **kwargs: object) -> None:
        message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        raise RuntimeError(message)

    monkeypatch.setattr(type(loaded.model), "forward", fail)
    with pytest.raises(ModelError, match="not enough memory to run 2 tokens"):
        loaded.run((3, 4))


def test_tokenizers_that_are_missing_or_broken_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ModelError, match=r"expected a tokenizer \(tokenizer.json"):
        load_tokenizer(open_checkpoint(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ this is not JSON\nat all")
    with pytest.raises(ModelError, match="the tokenizer cannot be read") as caught:
        load_tokenizer(open_checkpoint(tmp_path))
    assert "\n" not in str(caught.value)
    save_tokenizer(tmp_path)
    assert len(load_tokenizer(open_checkpoint(tmp_path))(text(7))["input_ids"]) == 7


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="expected auto, cpu or cuda"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(ModelError, match="expected a GPU, found none"):
        resolve_device("cuda")


def test_loading_prints_nothing_and_restores_transformers_own_settings(
    llama: Checkpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    load_model(llama, "cpu", "float32")
    load_tokenizer(llama)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(KeyError), quiet_transformers():
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
