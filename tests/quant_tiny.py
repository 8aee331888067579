"""Tiny checkpoints that can be measured: a model with a tokenizer of one token per character, and text for it."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import torch
from tiny_models import VOCABULARY, save_tiny

from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.quant.text import TextSample, make_sample

UNKNOWN, START, STOP = "<unk>", "<s>", "</s>"
CHARACTERS = string.printable[: VOCABULARY - 3]


def save_tokenizer(folder: Path, before: str = "", after: str = "") -> None:
    """Save a tokenizer of one token per character, which puts `before` and `after` around a text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([UNKNOWN, START, STOP, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if before or after:
        special = [(token, vocabulary[token]) for token in (before, after) if token]
        template = " ".join(part for part in (before, "$A", after) if part)
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=START, eos_token=STOP)
    wrapped.save_pretrained(folder)


def tiny_checkpoint(
    case: str, folder: Path, before: str = "", after: str = "", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Save a tiny model with its tokenizer and open it."""
    save_tiny(case, folder, dtype)
    save_tokenizer(folder, before, after)
    return open_checkpoint(folder)


def text(characters: int, seed: int = 5) -> str:
    """Return random text of that many tokens."""
    return "".join(np.random.default_rng(seed).choice(list(CHARACTERS), characters))


def tiny_sample(checkpoint: Checkpoint, tokens: int = 72, window: int = 32) -> TextSample:
    """Return random text in windows."""
    return make_sample(text(2 * tokens), checkpoint, tokens, window, "random")
