"""Describing a checkpoint: its weights, and the activations of its model on a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrscope import proof, stages
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.errors import ModelError, TextError
from vrscope.executors import default_executor
from vrscope.progress import Progress, silent
from vrscope.provenance import command_line, provenance
from vrscope.stages import DEFAULT_TOKENS
from vrscope.tables import Report
from vrscope.verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vrscope.arch.roles import TensorRole
    from vrscope.quant.text import TextSample


def analyze(
    model: str | Path,
    *,
    weights_only: bool = False,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    dtype: str = "float32",
    per: Literal["channel", "head"] | None = None,
    spectral: bool = False,
    target_std: float = 0.01,
    formats: Sequence[str] = (),
    revision: str | None = None,
    families: str | Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Describe a checkpoint: variance, kurtosis and outliers of its weights, and of its activations on a text.

    Parameters
    ----------
    model
        Folder, safetensors file, index.json or hub id.
    weights_only
        Leave the activations out: no model is run and no tokenizer needed.
    text
        A UTF-8 text file; None takes the sample that ships with vrscope.
    tokens
        Tokens of it to run, in windows of 512.
    device, dtype
        "auto", "cpu" or "cuda"; "float32" or "bfloat16": where and in what the model is run. "cuda" also takes the
        statistics of weights (not those of `per`, `spectral` and `formats`) on the GPU; "auto" leaves them to the
        compiled loops on the CPU, as nobody has measured whether copying weights to a GPU pays.
    per
        Adds tables "channels" (every output and input channel) and "activation_channels", or "heads" (query heads and
        KV groups).
    spectral
        Adds the top singular value and the stable rank of every matrix; takes tens of passes.
    target_std
        What `tvr_ratio` compares with.
    formats
        Names of formats whose error on every linear weight to add, from the same pass.
    revision
        Branch, tag or commit of a hub id.
    families
        A TOML file of architectures to declare besides the shipped ones.
    progress
        Is told of tokens run and bytes read.

    Returns
    -------
    Report
        Tables "tensors", "depth_law", "histograms", and "channels" or "heads", and "weight_error" with `formats`;
        of activations "activations", "residual", and where there are any "outlier_dimensions", "experts" and
        "activation_channels".

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read.
    ModelError, TextError
        If the model or the text cannot be run, activations are not finite, or the device is missing or too small.
    """
    from vrscope.stats.measure import StatOptions

    started = time.monotonic()
    entries = stages.read_formats(formats)
    on_cpu = device in {"auto", "cpu"}  # then statistics do without torch
    if not on_cpu:
        from vrscope.quant.loading import resolve_device

        resolve_device(device)  # refuses what is not there before anything is read
    checkpoint = open_checkpoint(model, revision)
    roles, family = stages.read_roles(checkpoint, families)
    sample: TextSample | None = None
    tables: stages.Tables = {}
    columns: stages.Columns = {}
    if not weights_only:  # first, as it refuses what cannot be run
        where = device, dtype
        sample, (tables, columns) = _activations(checkpoint, roles, text, tokens, where, per == "channel", progress)
    options = StatOptions(target_std=target_std, spectrum=spectral, device="cpu" if on_cpu else device)
    more, described = stages.fill_statistics(checkpoint, roles, options, progress, entries)
    tables |= more
    columns |= described
    if per is not None:
        from vrscope.stats.parts import CHANNEL_COLUMNS, HEAD_COLUMNS, measure_parts

        name = "channels" if per == "channel" else "heads"
        tables[name] = measure_parts(checkpoint, roles, per, executor=default_executor(), progress=progress)
        columns[name] = CHANNEL_COLUMNS if per == "channel" else HEAD_COLUMNS
    settings: dict[str, object] = {
        "weights_only": weights_only,
        "per": per,
        "spectral": spectral,
        "target_std": target_std,
    }
    settings |= {"formats": list(formats) or None}
    on_gpu = {} if on_cpu else {"device": device}
    run = on_gpu if weights_only else {"text": text, "tokens": tokens, "device": device, "dtype": dtype}
    facts = provenance(
        time.monotonic() - started,
        model=str(model),
        family=family,
        settings=settings,
        notes=tables["activations"].attrs["notes"] if sample else [],
        command=command_line("analyze", [model], settings | run),
        **on_gpu,
        **stages.sample_facts(sample, device, dtype),
    )
    if checkpoint.quantization is not None:
        facts["quantization"] = checkpoint.quantization
    if proof.not_equivalent([checkpoint]):
        facts["equivalent"] = proof.not_equivalent([checkpoint])
    return Report("analyze", facts, verdict(tables, facts), tables, columns)


def _activations(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    text: str | Path | None,
    tokens: int,
    where: tuple[str, str],
    channels: bool,
    progress: Progress,
) -> tuple[TextSample, stages.Filled]:
    """Return the text run and the tables of activations; what cannot be run is refused with the way around it."""
    try:
        sample = stages.read_sample(checkpoint, text, tokens)
        return sample, stages.fill_activations(checkpoint, roles, sample, where, progress, channels)
    except (ModelError, TextError) as error:
        if "--weights-only" in str(error) or (isinstance(error, TextError) and text is not None):
            raise
        message = f"{error} Or use --weights-only, which runs no model."
        raise type(error)(message) from error
