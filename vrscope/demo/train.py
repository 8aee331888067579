"""Trains the demo model: a small Llama on the documentation that every Python carries.

The text is `pydoc_data.topics` and the docstrings of the standard library, read from the running interpreter; nothing
is downloaded. Out comes a model folder: tokenizer, configuration, weights in bfloat16 and a card with the figures.
Run it as `python -m vrscope.demo.train OUT`. One thread and one seed make two runs on one machine equal bit for bit;
another Python (other text), torch version or kind of processor gives a slightly different model.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope.demo.text import gather_docstrings, gather_topics, split_documents

if TYPE_CHECKING:
    import torch

END = "<|endoftext|>"  # the one special token, id 0: stands before every document and after the last
WINDOW = 512  # tokens per training window, and the longest position the model has seen


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number that decides what the trained model is.

    Attributes
    ----------
    vocabulary, hidden, layers, heads, kv_groups, head_dim, intermediate
        The shape of the model. Every input width is a multiple of 128, so that a group of 128 weights fits a row; four
        query heads share a KV group, as in many models of today.
    steps, batch
        Optimizer steps, and windows of 512 tokens per step.
    learning_rate, weight_decay, warmup
        AdamW's peak rate, its decay of the matrices, and the steps of linear warmup before the cosine to a tenth.
    seed
        Of the initial weights and of the order of the windows.
    """

    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 6
    heads: int = 8
    kv_groups: int = 2
    head_dim: int = 32
    intermediate: int = 256
    steps: int = 2000
    batch: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training run measured.

    Attributes
    ----------
    parameters
        Weights of the model, the tied embedding counted once.
    train_tokens, heldout_tokens
        Length of the two streams of text.
    loss_first, loss_last
        Mean training loss of the first and the last 20 steps, in nats per token.
    perplexity, perplexity_unigram
        Per token of held-out text: of the stored model, and of the token frequencies of the training text.
    seconds
        Processor time of the whole run; on one thread about its wall time.
    """

    parameters: int
    train_tokens: int
    heldout_tokens: int
    loss_first: float
    loss_last: float
    perplexity: float
    perplexity_unigram: float
    seconds: float


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer of `vocabulary` tokens as transformers uses it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, documents: Sequence[str]) -> torch.Tensor:
    """Return the documents as one stream of token ids, shape `(tokens,)`, each document after an end token."""
    import torch

    stream = [tokenizer.bos_token_id]
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(documents)):
        stream += encoding.ids
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream)


def build_model(recipe: Recipe) -> Any:
    """Return an untrained Llama of the recipe's shape, float32, input and output embedding tied."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_groups,
        head_dim=recipe.head_dim,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        initializer_range=recipe.hidden**-0.5 / 2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return model


def fit(model: Any, stream: torch.Tensor, recipe: Recipe, say: Callable[[str], None]) -> tuple[float, float]:
    """Train `model` in place on windows of `stream`; return the mean loss of the first and last 20 steps, in nats."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    order = torch.Generator().manual_seed(recipe.seed)
    losses = []
    model.train()
    for step in range(recipe.steps):
        starts = torch.randint(len(stream) - WINDOW + 1, (recipe.batch,), generator=order)
        windows = stream[starts[:, None] + torch.arange(WINDOW)]
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            say(f"step {step + 1} of {recipe.steps}: loss {sum(losses[-50:]) / 50:.3f}")
    model.eval()
    return sum(losses[:20]) / len(losses[:20]), sum(losses[-20:]) / len(losses[-20:])


def model_perplexity(model: Any, stream: torch.Tensor) -> float:
    """Return the model's perplexity per token over consecutive windows of 512; the first token of each is given."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for window in torch.split(stream, WINDOW):
            if len(window) > 1:
                loss = model(input_ids=window[None], labels=window[None]).loss
                total += float(loss) * (len(window) - 1)
                count += len(window) - 1
    return math.exp(total / count)


def unigram_perplexity(train: torch.Tensor, heldout: torch.Tensor, vocabulary: int) -> float:
    """Return the perplexity of `heldout` under the token frequencies of `train` (one added to each count)."""
    import torch

    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return math.exp(-float(torch.log(counts / counts.sum())[heldout].mean()))


def train(out: Path, recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Train the demo model and write its folder to `out`.

    Parameters
    ----------
    out
        Folder to write; made if missing, its files replaced.
    recipe
        What to train. `Recipe()` is the model that ships.
    say
        Called with one line of progress now and then.

    Returns
    -------
    Outcome
        Measured on the weights as stored, in bfloat16; held-out perplexity with float32 arithmetic.
    """
    import torch

    began = time.process_time()
    train_part, heldout_part = split_documents(gather_topics() | gather_docstrings())
    tokenizer = train_tokenizer(train_part, recipe.vocabulary)
    stream, heldout = encode(tokenizer, train_part), encode(tokenizer, heldout_part)
    say(f"{len(stream):,} tokens to train on, {len(heldout):,} held out")
    torch.manual_seed(recipe.seed)
    model = build_model(recipe)
    first, last = fit(model, stream, recipe, say)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    outcome = Outcome(
        parameters=model.num_parameters(),
        train_tokens=len(stream),
        heldout_tokens=len(heldout),
        loss_first=first,
        loss_last=last,
        perplexity=model_perplexity(model.float(), heldout),
        perplexity_unigram=unigram_perplexity(stream, heldout, recipe.vocabulary),
        seconds=time.process_time() - began,
    )
    (out / "MODEL.md").write_text(card(out, recipe, outcome), encoding="utf-8")
    return outcome


def card(folder: Path, recipe: Recipe, outcome: Outcome) -> str:
    """Return the model card, in Markdown, of the model in `folder`."""
    import torch

    weights = (folder / "model.safetensors").read_bytes()
    return f"""# The demo model of vrscope

A small language model of the Llama type, for trying vrscope without a download. It has learnt the style of Python's
documentation and nothing else; it is there to be measured, not to be asked.

- Size: {outcome.parameters:,} parameters, {len(weights) / 1e6:.2f} MB in bfloat16.
- Shape: {recipe.layers} layers, hidden size {recipe.hidden}, {recipe.heads} query heads of size {recipe.head_dim} in
  {recipe.kv_groups} KV groups, rotary positions, gated MLP of width {recipe.intermediate}, RMS norms, tied embedding,
  {WINDOW} positions.
- Tokenizer: byte-level BPE with {recipe.vocabulary:,} tokens, learnt from the training text.
- Text: `pydoc_data.topics` and the docstrings of the standard library of CPython {platform.python_version()};
  {outcome.train_tokens:,} tokens to train on, {outcome.heldout_tokens:,} held out, and no paragraph in both. None of
  the text is stored here.
- Training: `python -m vrscope.demo.train OUT` with torch {torch.__version__} on one thread. {recipe.steps:,} steps of
  {recipe.batch} x {WINDOW} tokens, AdamW (peak rate {recipe.learning_rate:g}, {recipe.warmup} steps of warmup,
  cosine to a tenth, weight decay {recipe.weight_decay:g}, seed {recipe.seed}), float32, rounded to bfloat16 at the end.
- Time: {outcome.seconds / 60:.0f} minutes of one core. The same Python, torch and kind of processor give the same bits.
- Training loss: {outcome.loss_first:.2f} nats per token in the first 20 steps, {outcome.loss_last:.2f} in the last 20.
- Perplexity per held-out token, weights as stored: **{outcome.perplexity:.1f}**. Token frequencies alone reach
  {outcome.perplexity_unigram:.1f}.
- SHA-256 of `model.safetensors`: `{hashlib.sha256(weights).hexdigest()}`
- Licence of the weights, the tokenizer and this card: Apache-2.0.
"""


def _rate(step: int, recipe: Recipe) -> float:
    """Return the factor on the learning rate: linear warmup, then a cosine down to a tenth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line, on one thread, and print what was measured."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser(prog="python -m vrscope.demo.train", description="Train the demo model.")
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="optimizer steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    disable_progress_bar()
    outcome = train(options.out, Recipe(steps=options.steps), lambda line: print(line, flush=True))
    print("\n".join(f"{name}: {value}" for name, value in asdict(outcome).items()))


if __name__ == "__main__":
    main(sys.argv[1:])
