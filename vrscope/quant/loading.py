"""Models and tokenizers of checkpoints, through transformers: no code from a checkpoint is ever run.

Models run in evaluation mode with "eager" attention and experts: plain products and softmax, the same operations in
the same order whatever the values, so that two checkpoints that differ by exact powers of two give equal bits. Only
calibration, which compares a model with itself, takes attention in one step: see `fuse_attention`.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.quant.memory import DTYPE_BYTES, require_memory

if TYPE_CHECKING:
    from torch import Tensor

UNUSED = ("pooler.",)  # parts of an encoder behind its last hidden state
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_SAME = 1e-4  # relative difference of outputs of one model, computed in two ways in float32


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes
    ----------
    name
        Of its checkpoint.
    model
        The transformers model, in evaluation mode, without gradients.
    causal
        Whether it predicts the next token; otherwise it is an encoder.
    device
        "cpu" or "cuda".
    """

    name: str
    model: Any
    causal: bool
    device: str

    def run(self, window: tuple[int, ...]) -> Tensor:
        """Return the model's output for one window: float32 logits `(tokens, vocabulary)` or states `(tokens, hidden)`.

        Raises
        ------
        ModelError
            If a token is not in the model's vocabulary, the model has too few positions, or memory runs out.
        """
        import torch

        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(window) >= rows:
            message = (
                f"{self.name}: expected tokens below {rows:,}, found {max(window):,}. "
                "The tokenizer belongs to another model; copy the right tokenizer into the folder."
            )
            raise ModelError(message)
        ids = torch.tensor([window], device=self.device)
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with limits_named(self.name, len(window)), torch.inference_mode():
            if self.causal:
                return self.model(**arguments, use_cache=False).logits[0].float()  # type: ignore[no-any-return]
            return self.model(**arguments).last_hidden_state[0].float()  # type: ignore[no-any-return]


@contextmanager
def limits_named(name: str, tokens: int) -> Iterator[None]:
    """Turn what a run of so many tokens raises for want of memory or of positions into an error that says so.

    Raises
    ------
    ModelError
        Then; other errors pass.
    """
    try:
        yield
    except (MemoryError, IndexError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            message = (
                f"{name}: not enough memory to run {tokens:,} tokens. Free some, ask for fewer --tokens, or use "
                "--dtype bfloat16 if the command has it."
            )
        elif "out of range" in str(error) or "out of bounds" in str(error):
            message = (
                f"{name}: expected positions for {tokens:,} tokens, found fewer in the model ({_one_line(error)}). "
                "Ask for fewer with --tokens, or state their number in config.json (max_position_embeddings)."
            )
        else:
            raise
        raise ModelError(message) from error


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda"; "auto" takes a GPU if there is one.

    Raises
    ------
    ModelError
        If there is no GPU, or no such device.
    """
    import torch

    if device not in {"auto", "cpu", "cuda"}:
        message = f"device {device!r}: expected auto, cpu or cuda. Choose one of them with --device."
        raise ModelError(message)
    if device == "cuda" and not torch.cuda.is_available():
        message = "device 'cuda': expected a GPU, found none that torch can use. Use --device cpu."
        raise ModelError(message)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def is_causal(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint is a causal language model; otherwise it is taken for an encoder.

    Its architecture decides, as its config names it; without one, its model type: causal if transformers has a causal
    and no masked language model of that type.

    Raises
    ------
    ModelError
        If there is no config, an unknown model type, or an encoder-decoder.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = checkpoint.config
    kind = config.get("model_type")
    if not config:
        message = (
            f"{checkpoint.name}: expected a config.json in {checkpoint.folder}, found none. Put the model's there."
        )
        raise ModelError(message)
    if kind not in CONFIG_MAPPING_NAMES:
        message = (
            f"{checkpoint.name}: config.json has model_type {kind!r}, which this transformers does not know. "
            "Code from a checkpoint is never run; use a newer transformers, or `vrscope analyze --weights-only`."
        )
        raise ModelError(message)
    if config.get("is_encoder_decoder"):
        message = (
            f"{checkpoint.name}: expected a causal model or an encoder, found an encoder-decoder ({kind}). "
            "Use `vrscope analyze --weights-only`, which runs no model."
        )
        raise ModelError(message)
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    causal = {name for mapping in mappings for names in mapping.values() for name in _each(names)}
    if config.get("architectures"):
        return any(name in causal for name in config["architectures"])
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer in the checkpoint's folder.

    Raises
    ------
    ModelError
        If there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if not any((checkpoint.folder / name).is_file() for name in TOKENIZER_FILES):
        message = (
            f"{checkpoint.name}: expected a tokenizer ({TOKENIZER_FILES[0]} or the like) in {checkpoint.folder}, "
            "found none. Copy the model's tokenizer files there."
        )
        raise ModelError(message)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the many ways in which a tokenizer file can be wrong are not ours to list
        message = f"{checkpoint.name}: the tokenizer cannot be read ({_one_line(error)}). Check its files."
        raise ModelError(message) from error


def load_model(checkpoint: Checkpoint, device: str, dtype: str, *, copies: int = 2, eps: bool = True) -> LoadedModel:
    """Return the checkpoint's model in float32 or bfloat16.

    Parameters
    ----------
    device
        As `resolve_device` returns it.
    dtype
        "float32" or "bfloat16": what weights are converted to and computed in.
    eps
        Whether its norms add their eps.
    copies
        How many times the weights have to fit into memory; twice if they are to be quantized.

    Raises
    ------
    ModelError
        If the model cannot be built, weights are missing or of another shape, or memory would not suffice.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = is_causal(checkpoint)
    if checkpoint.quantization:
        message = (
            f"{checkpoint.name}: expected float weights, found it quantized already ({checkpoint.quantization}). "
            "Measure the model it was made from."
        )
        raise ModelError(message)
    if dtype not in DTYPE_BYTES:
        message = f"dtype {dtype!r}: expected {' or '.join(DTYPE_BYTES)}. Choose one of them with --dtype."
        raise ModelError(message)
    require_memory(checkpoint, device, dtype, copies)
    builder = AutoModelForCausalLM if causal else AutoModel
    if causal and checkpoint.config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        builder = AutoModelForImageTextToText  # run on text alone
    try:
        with quiet_transformers(), _standard_folder(checkpoint) as folder:
            model, info = builder.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",
                experts_implementation="eager",
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises whatever the model's own code happens to raise
        message = (
            f"{checkpoint.name}: transformers cannot build the model ({_one_line(error)}). "
            "Check that config.json belongs to the weights."
        )
        raise ModelError(message) from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(UNUSED))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        message = (
            f"{checkpoint.name}: expected weight {missing[0]!r}{more}, found none in the checkpoint. "
            "Download it again, or check that config.json belongs to it."
        )
        raise ModelError(message)
    if model.main_input_name != "input_ids":
        message = (
            f"{checkpoint.name}: expected a model that reads text, found one that reads {model.main_input_name}. "
            "Use `vrscope analyze --weights-only`, which runs no model."
        )
        raise ModelError(message)
    model.requires_grad_(requires_grad=False)
    if not eps:
        remove_eps(model)
    return LoadedModel(checkpoint.name, model.eval().to(device), causal, device)


def fuse_attention(loaded: LoadedModel, window: tuple[int, ...]) -> bool:
    """Have a float32 model on the CPU compute attention in one step, and return whether it does.

    That is faster and keeps no matrix of tokens by tokens, which a backward pass would need of every layer. It is for
    what only has to be right to rounding: the order of the sums is another. Where the model cannot, or does not say the
    same of `window` that way, such as where its scores pass through a function that the fused step does not know, it
    stays as it was.

    Raises
    ------
    ModelError
        As `LoadedModel.run`.
    """
    model = loaded.model
    before = model.config._attn_implementation
    if loaded.device != "cpu":
        return False
    expected = loaded.run(window)
    with quiet_transformers():
        try:
            model.set_attn_implementation("sdpa")
            same = float((loaded.run(window) - expected).norm() / expected.norm()) < _SAME
        except ValueError:  # it says that it cannot
            same = False
        if not same:
            model.set_attn_implementation(before)
    return same


def remove_eps(model: Any) -> None:
    """Set the eps of every norm of a model to zero."""
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def release() -> None:
    """Give back the memory of models that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' messages below "error" and its progress bars while inside."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _standard_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield a folder whose file names are those transformers looks for: the checkpoint's, or one of links to it."""
    weights = checkpoint.index or checkpoint.shards[0]
    standard = "model.safetensors.index.json" if checkpoint.index else "model.safetensors"
    if weights == standard:
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory(prefix="vrscope-") as name:
        links = {"config.json": "config.json", standard: weights}
        if checkpoint.index:
            links |= {shard: shard for shard in checkpoint.shards}
        for link, target in links.items():
            (Path(name) / link).symlink_to((checkpoint.folder / target).absolute())
        yield Path(name)


def _each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _one_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
