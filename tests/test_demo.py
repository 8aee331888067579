from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from vrscope.demo import demo_model, sample_text
from vrscope.demo import train as demo_train
from vrscope.demo.text import gather_docstrings, gather_topics, split_documents

TINY = demo_train.Recipe(
    vocabulary=300, hidden=32, layers=2, heads=2, kv_groups=1, head_dim=16, intermediate=64, steps=4, batch=1, warmup=2
)
FEW_DOCUMENTS = {
    f"topic {number}": "\n\n".join(
        f"Rule {number}.{part}: a name is bound to {part * number} objects." for part in range(40)
    )
    for number in range(60)
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model(), local_files_only=True)


@pytest.fixture(scope="module")
def docstrings():
    return gather_docstrings()


def frequencies_perplexity(ids: torch.Tensor) -> float:
    """Perplexity of a stream under its own token frequencies: no unigram model can do better on it."""
    counts = torch.bincount(ids).double()
    shares = counts[counts > 0] / len(ids)
    return math.exp(-float((shares * shares.log()).sum()))


def test_the_folder_is_small_and_complete():
    names = {path.name for path in demo_model().iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "MODEL.md"} <= names
    assert 1e6 <= sum(path.stat().st_size for path in demo_model().iterdir()) <= 3e6


def test_every_weight_is_bf16_and_finite():
    with safe_open(demo_model() / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert torch.isfinite(tensor).all(), name
            assert tensor.float().std() > 0, name


def test_the_model_is_a_llama_with_grouped_queries_rotary_positions_and_gated_mlp(model):
    config = json.loads((demo_model() / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_parameters"]["rope_type"] == "default"
    names = dict(model.named_parameters())
    assert names["model.layers.0.mlp.gate_proj.weight"].shape == names["model.layers.0.mlp.up_proj.weight"].shape
    inputs = (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] * config["head_dim"])
    assert all(width % 128 == 0 for width in inputs)  # groups of 128 fit the rows


def test_no_file_names_a_machine():
    for path in demo_model().iterdir():
        if path.suffix in {".json", ".md"}:
            assert not re.search(r"/(home|root|work|tmp|usr)\b|_name_or_path", path.read_text(encoding="utf-8")), (
                path.name
            )


def test_model_and_tokenizer_load_offline_without_a_word():
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from vrscope.demo import demo_model\n"
        "import transformers; transformers.utils.logging.disable_progress_bar()\n"
        "tokenizer = AutoTokenizer.from_pretrained(demo_model())\n"
        "model = AutoModelForCausalLM.from_pretrained(demo_model())\n"
        "ids = tokenizer('A class definition', return_tensors='pt')\n"
        "out = model.generate(**ids, max_new_tokens=4, do_sample=False)\n"
        "print(model.dtype, out.shape[1] - ids['input_ids'].shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.bfloat16", "4"]
    assert done.stderr == ""


def test_the_tokenizer_gives_back_every_text(tokenizer):
    for text in (sample_text(), "naïve café, 25 °C, 日本語, 🙂\t\r\n  x"):
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(demo_model()).config.vocab_size


def test_the_model_predicts_documentation_it_has_not_seen(model, tokenizer, docstrings):
    parts = split_documents(gather_topics() | docstrings)
    train, heldout = (demo_train.encode(tokenizer, part) for part in parts)
    assert len(heldout) > 8192
    unigram = demo_train.unigram_perplexity(train, heldout, len(tokenizer))
    assert demo_train.model_perplexity(model, heldout[:8192]) < unigram / 5


def test_the_model_beats_the_sample_texts_own_token_frequencies(model, tokenizer):
    ids = torch.tensor(tokenizer(sample_text(), verbose=False)["input_ids"])
    assert demo_train.model_perplexity(model, ids) < frequencies_perplexity(ids) / 1.5


def test_shuffled_tokens_cost_the_model_far_more_than_text(model, tokenizer):
    ids = torch.tensor(tokenizer(sample_text(), verbose=False)["input_ids"][:2048])
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    assert demo_train.model_perplexity(model, shuffled) > 3 * demo_train.model_perplexity(model, ids)


def test_the_card_states_what_is_in_the_folder(model, tokenizer):
    import hashlib

    card = (demo_model() / "MODEL.md").read_text()
    assert hashlib.sha256((demo_model() / "model.safetensors").read_bytes()).hexdigest() in card
    assert f"{model.num_parameters():,} parameters" in card
    assert "Apache-2.0" in card


def test_two_training_runs_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_train, "gather_topics", lambda: FEW_DOCUMENTS)
    monkeypatch.setattr(demo_train, "gather_docstrings", dict)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcomes = [demo_train.train(tmp_path / name, TINY) for name in ("a", "b")]
        other = demo_train.train(tmp_path / "c", dataclasses.replace(TINY, seed=2))
    finally:
        torch.set_num_threads(threads)
    for path in (tmp_path / "a").iterdir():
        if path.name != "MODEL.md":  # holds the time it took
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert outcomes[0].loss_last == outcomes[1].loss_last != other.loss_last
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_training_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_train, "gather_topics", lambda: FEW_DOCUMENTS)
    monkeypatch.setattr(demo_train, "gather_docstrings", dict)
    outcome = demo_train.train(tmp_path, dataclasses.replace(TINY, steps=60))
    assert outcome.loss_first > outcome.loss_last
    assert outcome.perplexity < outcome.perplexity_unigram
    assert 0 < outcome.heldout_tokens < outcome.train_tokens


def test_the_command_trains_on_this_pythons_own_text(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_train, "gather_docstrings", dict)  # parsing the whole library takes seconds
    monkeypatch.setattr(demo_train, "Recipe", lambda steps=0: dataclasses.replace(TINY, steps=steps))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        demo_train.main([str(tmp_path / "out"), "--steps", "2"])
    assert "perplexity_unigram" in said.getvalue()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)


def test_unigram_perplexity_of_equal_frequencies_is_the_vocabulary():
    even = torch.arange(50).repeat(10)
    assert demo_train.unigram_perplexity(even, even, 50) == pytest.approx(50, rel=1e-12)


def test_docstrings_are_those_of_the_standard_library(docstrings):
    assert json.__doc__.strip().splitlines()[0] in docstrings["json/__init__.py"]
    assert not any("site-packages" in name or "test" in name.split("/") for name in docstrings)
    assert "turtle.py" in docstrings and "turtle" not in sys.modules  # parsed, not imported


def test_no_paragraph_stands_on_both_sides_of_the_split():
    parts = split_documents(gather_topics())
    train, heldout = ({" ".join(p.split()) for text in part for p in text.split("\n\n")} for part in parts)
    assert train and heldout and not train & heldout


def test_a_new_document_leaves_the_split_of_the_others_alone():
    _, before = split_documents(FEW_DOCUMENTS)
    _, after = split_documents(FEW_DOCUMENTS | {"topic new": "Something else.\n"})
    assert before and set(before) <= set(after)


def test_the_sample_text_is_long_clean_and_readable():
    text = sample_text()
    assert len(text.split()) >= 3000
    assert text.endswith("\n") and "\r" not in text and "\t" not in text and "\ufffd" not in text
    assert all(line == line.rstrip() and len(line) <= 120 for line in text.splitlines())
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "def " in text and '"' in text and "{" in text  # code, dialogue, data


def test_the_sample_texts_python_runs():
    text = sample_text()
    blocks = [block for block in re.split(r"\n(?=\S)", text) if "    def " in block or "    import " in block]
    code = "\n".join(
        line[4:]
        for block in blocks
        for line in block.split("\n")
        if line.startswith("    ") and not line.startswith("    >>>")
    )
    code = code.split("Traceback (most recent call last)")[0]
    namespace: dict[str, object] = {}
    exec(compile(code, "sample.txt", "exec"), namespace)
    namespace["test_words"]()
    with pytest.raises(namespace["SettingsError"], match=r"sensors\[4\].name: .* found 'snow'"):
        namespace["read_sensor"]({"name": "snow"}, 4)


@pytest.mark.real
def test_the_sample_text_fills_4096_tokens_of_real_tokenizers(smollm2, minilm):
    for folder in (smollm2, minilm):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert len(tokenizer(sample_text(), verbose=False)["input_ids"]) >= 4096
