"""Text to measure on: read it, and cut it into windows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrscope.checkpoint.source import Checkpoint
from vrscope.demo import sample_text
from vrscope.errors import TextError
from vrscope.quant.loading import is_causal, load_tokenizer, quiet_transformers

TOKENS, WINDOW = 2048, 512
MARGIN = 64  # tokens at the end of a cut text that the cut may have changed
# Model types that number positions from the one behind the padding token's id on.
BEHIND_PADDING = frozenset(
    {
        "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
        "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip
MANY = 1_000_000  # tokenizers say "no limit" with a number larger than any context


@dataclass(frozen=True, slots=True)
class TextSample:
    """Text as token windows, each run through a model by itself.

    Attributes
    ----------
    name
        Where the text is from.
    windows
        Token ids; all windows together hold exactly the tokens asked for, special tokens included.
    window
        The longest a window may be: what was asked for, or the model's maximum if that is less.
    special
        How many special tokens stand before and after the text in each window.
    """

    name: str
    windows: tuple[tuple[int, ...], ...]
    window: int
    special: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return sum(len(window) for window in self.windows)


def load_text(path: Path | None, flag: str = "--text") -> str:
    """Return the text of a UTF-8 file, or of the sample that is shipped with vrscope if `path` is None.

    Parameters
    ----------
    path
        The file.
    flag
        Option that named it, for messages.

    Raises
    ------
    TextError
        If it is missing, not a file, empty, binary or not UTF-8.
    """
    if path is None:
        return sample_text()
    if path.is_dir():
        message = f"{path}: expected a text file, found a folder. Name a file in it with {flag}."
        raise TextError(message)
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"{path}: expected a readable text file ({error.strerror or error}). Check {flag}."
        raise TextError(message) from error
    if b"\0" in data:
        message = (
            f"{path}: expected text, found a binary file (a zero byte at {data.index(0):,}). Give plain UTF-8 text."
        )
        raise TextError(message)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = (
            f"{path}: expected UTF-8, found byte 0x{data[error.start]:02x} at {error.start:,} that is not. "
            "Convert the file, for instance with `iconv -t UTF-8`."
        )
        raise TextError(message) from error
    if not text.strip():
        message = f"{path}: expected text, found an empty file. Give a file with text in it."
        raise TextError(message)
    return text


def make_sample(
    text: str,
    checkpoint: Checkpoint,
    tokens: int = TOKENS,
    window: int = WINDOW,
    name: str = "text",
    skip: int = 0,
    flags: tuple[str, str] = ("--text", "--tokens"),
) -> TextSample:
    """Cut the beginning of a text into windows of tokens for a checkpoint's model.

    The text is tokenized as a whole and cut afterwards. Every window is wrapped in the special tokens that the
    tokenizer puts around a text: for a causal model only those in front (nothing for most, a start token for some),
    for an encoder all of them, such as [CLS] and [SEP]. The last window may be shorter, down to one text token.

    Parameters
    ----------
    tokens
        Number of tokens in all windows, special tokens included.
    window
        Tokens per window; made smaller if the model has fewer positions.
    name
        Where the text is from.
    skip
        Tokens of the text to leave out before the first.
    flags
        Options that named the text and the number of tokens, for messages.

    Raises
    ------
    TextError
        If the text has too few tokens; the message says for how many it is enough.
    ModelError
        If the checkpoint has no usable config or tokenizer.
    """
    causal = is_causal(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    window = min(window, _positions(checkpoint, tokenizer))

    def encode(part: str, special: bool = False) -> list[int]:
        with quiet_transformers():
            return list(tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"])

    before, after = _special_tokens(encode)
    after = [] if causal else after
    sizes = _window_sizes(tokens, window, len(before) + len(after))
    needed = tokens - len(sizes) * (len(before) + len(after))
    ids = _encode_beginning(text, encode, needed + skip)[skip:]
    if len(ids) < needed:
        behind = f" behind the first {skip:,}" if skip else ""
        message = (
            f"{name}: expected text for {tokens:,} tokens{behind}, found {len(ids) + tokens - needed:,}. "
            f"Give a longer text with {flags[0]}, or ask for fewer with {flags[1]}."
        )
        raise TextError(message)
    windows = []
    first = 0
    for size in sizes:
        last = first + size - len(before) - len(after)
        windows.append((*before, *ids[first:last], *after))
        first = last
    return TextSample(name, tuple(windows), window, (len(before), len(after)))


def _special_tokens(encode: Callable[..., list[int]]) -> tuple[list[int], list[int]]:
    """Return the tokens a tokenizer puts before and after a text."""
    plain, full = encode("a"), encode("a", special=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _encode_beginning(text: str, encode: Callable[[str], list[int]], needed: int) -> list[int]:
    """Return the first `needed` tokens of a text, or all if there are fewer, without tokenizing much more."""
    length = 16 * (needed + MARGIN)
    while length < len(text):
        ids = encode(text[:length])
        if len(ids) >= needed + MARGIN:
            return ids[:needed]
        length *= 4
    return encode(text)[:needed]


def _window_sizes(tokens: int, window: int, special: int) -> list[int]:
    """Return window lengths that add up to `tokens`, each with room for at least one token of text."""
    sizes = [window] * (tokens // window) if window > 0 else []
    rest = tokens % window if window > 0 else 0
    if rest and tokens > 0:
        missing = max(0, special + 1 - rest)
        if sizes:
            sizes[-1] -= missing
            rest += missing
        sizes.append(rest)
    if not sizes or min(sizes) <= special:
        message = (
            f"expected tokens of text besides the {special} special tokens of each window, found room for {tokens:,} "
            f"tokens in windows of {window:,}. Ask for more with --tokens."
        )
        raise TextError(message)
    return sizes


def _positions(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """Return how many positions the model has, as far as config and tokenizer say."""
    config = checkpoint.config.get("text_config", checkpoint.config)
    if config.get("model_type") in BEHIND_PADDING and isinstance(rows := config.get("max_position_embeddings"), int):
        config = {**config, "max_position_embeddings": rows - int(config.get("pad_token_id") or 0) - 1}
    limits = [config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min([int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < MANY], default=MANY)
