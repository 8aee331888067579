"""Measuring damage, and the main job: analyze, plan, rescale, prove, measure before and after, in one folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vrscope import proof, stages
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.executors import default_executor
from vrscope.progress import Progress, silent
from vrscope.provenance import command_line, provenance
from vrscope.saving import PLAN_COPY, remove_earlier, save
from vrscope.stages import DEFAULT_FORMATS, DEFAULT_TOKENS, ORIGINAL, PROOF_TOKENS, RESCALED
from vrscope.tables import Report
from vrscope.verdict import verdict

RESCALED_FOLDER = "rescaled"


def measure(
    model: str | Path,
    *others: str | Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    dtype: str = "float32",
    weights_only: bool = False,
    revision: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Measure what quantization costs, for one or several checkpoints on the same tokens.

    Parameters
    ----------
    model
        The reference: every row is compared with this checkpoint, unquantized.
    others
        More checkpoints of the same architecture, such as a rescaled one.
    formats
        Names of formats.
    text
        A UTF-8 text file; None takes the sample that ships with vrscope.
    tokens
        Tokens to measure on, in windows of 512.
    device, dtype
        "auto", "cpu" or "cuda"; "float32" or "bfloat16".
    weights_only
        Measure only the error of the weights; no model is run and no tokenizer needed.
    revision
        Branch, tag or commit of `model`, if it is a hub id.

    Returns
    -------
    Report
        Tables "damage" (unless `weights_only`) and "weight_error".
    """
    started = time.monotonic()
    entries = stages.read_formats(formats)
    opened = [open_checkpoint(model, revision), *(open_checkpoint(source) for source in others)]
    checkpoints = dict(zip(stages.label_checkpoints(opened), opened, strict=True))
    sample = None if weights_only else stages.read_sample(opened[0], text, tokens)
    tables, columns = stages.fill_damage(checkpoints, entries, sample, (device, dtype), progress)
    _, family = stages.read_roles(opened[0])
    arguments = {"formats": formats, "text": text, "tokens": tokens, "device": device, "dtype": dtype}
    arguments |= {"weights_only": weights_only, "revision": revision}
    facts = provenance(
        time.monotonic() - started,
        model=str(model),
        family=family,
        checkpoints={label: checkpoint.name for label, checkpoint in checkpoints.items()},
        settings={"formats": list(formats), "weights_only": weights_only},
        notes=tables["damage"].attrs.get("notes", []) if "damage" in tables else [],
        command=command_line("measure", [model, *others], arguments),
        equivalent=proof.not_equivalent(opened),
        **stages.sample_facts(sample, device, dtype),
    )
    return Report("measure", facts, verdict(tables, facts), tables, columns)


def run(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "auto",
    formats: Sequence[str] = DEFAULT_FORMATS,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    calibration_text: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    force: bool = False,
    revision: str | None = None,
    families: str | Path | None = None,
    name: str | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> Report:
    """Do the whole job: analyze, plan, rescale, prove, and measure the damage before and after.

    Parameters
    ----------
    model
        Folder, safetensors file, index.json or hub id.
    out
        Folder for `report.html`, `results.json`, CSV tables, `plan.json`, and the rescaled checkpoint in `rescaled/`.
    method, overrides
        As in `plan`.
    formats, text, tokens, device
        As in `measure`.
    calibration_text, calibration_tokens
        What a method that calibrates runs the model on. None: the text measured on, from behind the tokens measured,
        so that no figure is from text that the scales were chosen on.
    force
        Replace what an earlier run left in `out`.
    revision, families, progress
        As in `analyze`.
    name
        Name of the command that chose the model for the user; the report then names it instead of a path.

    Returns
    -------
    Report
        Everything that the page shows.
    """
    from vrscope.checkpoint.writer import check_target
    from vrscope.rescale.apply import apply_plan
    from vrscope.rescale.methods import get_method
    from vrscope.rescale.planning import require_approximate
    from vrscope.rescale.survey import Surveys, survey_weights
    from vrscope.stats.measure import StatOptions

    started = time.monotonic()
    entries, options, folder = stages.read_formats(formats), stages.read_options(overrides), Path(out)
    checkpoint = open_checkpoint(model, revision)
    stages.require_new(folder, force)
    require_approximate(get_method(method), options)
    binding = stages.bind_checkpoint(checkpoint, families, options.approximate)
    # Everything that can be refused is refused before the long work.
    check_target(checkpoint, folder / RESCALED_FOLDER, force=force)
    sample = stages.read_sample(checkpoint, text, tokens)
    own = calibration_text is not None
    flags = ("--calibration-text" if own else "--text", "--calibration-tokens")
    on = stages.CalibrationText(
        calibration_text if own else text, calibration_tokens, 0 if own else tokens, device, flags
    )
    on.sample(checkpoint, method)

    tables, columns = stages.fill_activations(checkpoint, binding.roles, sample, (device, "float32"), progress)
    more, described = stages.fill_statistics(
        checkpoint, binding.roles, StatOptions(target_std=options.target_std), progress
    )
    tables |= more
    columns |= described
    chosen, surveys = stages.choose_plan(checkpoint, binding, method, options, on, progress)
    rows = [proof.weight_proof(checkpoint, chosen)]

    def accept(copy: Checkpoint) -> None:
        short = stages.read_sample(checkpoint, text, min(tokens, PROOF_TOKENS))
        rows.append(proof.compare_outputs((checkpoint, copy), chosen, short, (device, "float32"), progress))
        remove_earlier(folder)  # only now, when nothing can refuse the checkpoint that replaces theirs

    target = folder / RESCALED_FOLDER
    done = apply_plan(checkpoint, binding, chosen, target, force=force, progress=progress, accept=accept)
    rescaled = open_checkpoint(target)
    after = survey_weights(rescaled, binding, default_executor(), progress)
    both = {ORIGINAL: checkpoint, RESCALED: rescaled}
    for more, described in (
        stages.fill_plan(checkpoint, binding, done, Surveys(surveys.before, after), entries),
        proof.fill_proof(rows),
        stages.fill_layer_error(both, binding.roles, entries, sample, device, progress),
        stages.fill_damage(both, entries, sample, (device, "float32"), progress),
    ):
        tables |= more
        columns |= described
    arguments = {"out": out, "method": method, "formats": formats, "text": text, "tokens": tokens, "device": device}
    arguments |= {"calibration_text": calibration_text, "calibration_tokens": calibration_tokens}
    arguments |= {"revision": revision, "families": families, **overrides}
    facts = provenance(
        time.monotonic() - started,
        model=str(model) if name is None else f"vrscope {name}",
        family=binding.family,
        equivalent=done.equivalent,
        settings={"method": method, **done.settings, "scales": done.scales, "formats": list(formats)},
        notes=tables["activations"].attrs["notes"] + tables["damage"].attrs.get("notes", []),
        command=command_line("run", [model], arguments) if name is None else f"vrscope {name}",
        **stages.sample_facts(sample, device, "float32"),
    )
    done.save(folder / PLAN_COPY)
    report = Report("run", facts, verdict(tables, facts), tables, columns)
    save(report, folder, force=True)
    return report


def demo(out: str | Path = "vrscope-demo", *, force: bool = False, progress: Progress = silent) -> Report:
    """Do the whole job on the small trained model that ships with vrscope."""
    from vrscope.demo import demo_model

    return run(demo_model(), out, force=force, progress=progress, name="demo")
