"""Text in windows: exact token counts, special tokens, and every way in which a text can be unusable."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_tiny import CHARACTERS, START, STOP, text, tiny_checkpoint

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError, TextError
from vrscope.quant.loading import load_model
from vrscope.quant.text import _encode_beginning, _window_sizes, load_text, make_sample


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("wrapped"), START, STOP)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint("bert", tmp_path_factory.mktemp("bert"), START, STOP)


def ids(characters: str) -> list[int]:
    return [CHARACTERS.index(character) + 3 for character in characters]


def test_the_shipped_sample_is_text_enough() -> None:
    assert len(load_text(None).split()) >= 3000


def test_a_file_is_read_whole_and_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffnaïve text\n".encode())
    assert load_text(path) == "naïve text\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected text, found an empty file"),
        (b" \n\t", "expected text, found an empty file"),
        (b"some\0thing", r"binary file \(a zero byte at 4\)"),
        (b"caf\xe9 au lait", "expected UTF-8, found byte 0xe9 at 3"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=words) as caught:
        load_text(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="expected a readable text file"):
        load_text(tmp_path / "absent.txt")
    with pytest.raises(TextError, match="found a folder"):
        load_text(tmp_path)


@pytest.mark.parametrize(("tokens", "sizes"), [(64, [32, 32]), (72, [32, 32, 8]), (5, [5]), (33, [32, 1])])
def test_a_causal_model_sees_consecutive_windows(llama: Checkpoint, tokens: int, sizes: list[int]) -> None:
    characters = text(200)
    sample = make_sample(characters, llama, tokens, 32, "random")
    assert [len(window) for window in sample.windows] == sizes and sample.tokens == tokens
    assert [token for window in sample.windows for token in window] == ids(characters[:tokens])
    assert (sample.name, sample.window, sample.special) == ("random", 32, (0, 0))


def test_a_start_token_opens_every_window_of_a_causal_model(wrapped: Checkpoint) -> None:
    characters = text(200)
    sample = make_sample(characters, wrapped, 72, 32)
    assert sample.special == (1, 0) and sample.tokens == 72
    assert all(window[0] == 1 and 2 not in window for window in sample.windows)
    assert [token for window in sample.windows for token in window[1:]] == ids(characters[:69])


def test_an_encoder_sees_its_special_tokens_around_every_window(bert: Checkpoint) -> None:
    characters = text(200)
    sample = make_sample(characters, bert, 72, 32)
    assert sample.special == (1, 1) and sample.tokens == 72
    assert all(window[0] == 1 and window[-1] == 2 for window in sample.windows)
    assert [token for window in sample.windows for token in window[1:-1]] == ids(characters[:66])


def test_windows_shrink_to_the_positions_of_the_model(llama: Checkpoint) -> None:
    sample = make_sample(text(200), llama, 130, 512)
    assert sample.window == 64 and [len(window) for window in sample.windows] == [64, 64, 2]


@pytest.mark.parametrize("case", ["roberta", "xlm-roberta", "camembert"])
def test_positions_that_begin_behind_the_padding_token_are_fewer(case: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(case, tmp_path, START, STOP)
    padding = checkpoint.config["pad_token_id"]
    sample = make_sample(text(200), checkpoint, 130, 512)
    assert sample.window == 64 - padding - 1
    loaded = load_model(checkpoint, "cpu", "float32")
    for window in sample.windows:
        loaded.run(window)
    with pytest.raises(ModelError, match=r"expected positions for 64 tokens, found fewer in the model .*--tokens"):
        loaded.run((5,) * 64)


def test_too_short_a_text_says_for_how_many_tokens_it_is_enough(llama: Checkpoint, wrapped: Checkpoint) -> None:
    with pytest.raises(TextError, match=r"short: expected text for 2,048 tokens, found 1,234\. Give a longer text"):
        make_sample(text(1234), llama, 2048, 64, "short")
    with pytest.raises(TextError, match="found 103"):  # 100 of text and 3 windows' start tokens
        make_sample(text(100), wrapped, 150, 64)
    assert make_sample(text(147), wrapped, 150, 64).tokens == 150


@pytest.mark.parametrize(("tokens", "window"), [(0, 32), (-5, 32), (10, 0), (10, -1)])
def test_no_tokens_are_refused(llama: Checkpoint, tokens: int, window: int) -> None:
    with pytest.raises(TextError, match="special tokens"):
        make_sample(text(100), llama, tokens, window)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 300), window=st.integers(1, 64), special=st.integers(0, 3))
def test_window_sizes_add_up_and_have_room(tokens: int, window: int, special: int) -> None:
    if window > 2 * special + 1 and tokens > special:
        sizes = _window_sizes(tokens, window, special)
        assert sum(sizes) == tokens and min(sizes) > special and max(sizes) <= window
    elif tokens <= special or window <= special:
        with pytest.raises(TextError, match="special tokens"):
            _window_sizes(tokens, window, special)


@pytest.mark.parametrize("length", [10, 3000, 100_000])
@pytest.mark.parametrize("needed", [1, 50, 700])
def test_only_the_beginning_of_a_long_text_is_tokenized(length: int, needed: int) -> None:
    seen: list[int] = []

    def encode(part: str) -> list[int]:
        seen.append(len(part))
        return [len(word) for word in part.split(" ")]

    words = ("four " * length)[: 5 * length].strip()
    assert _encode_beginning(words, encode, needed) == encode(words)[:needed]
    assert seen[-2] <= max(len(words) if length < 10_000 else 0, 16 * 4 * (needed + 64))
