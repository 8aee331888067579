"""The Python interface: the same names, arguments and defaults as the commands.

Each function opens what it is given, calls the stages below it in their one order (source, statistics, plan, rescaled
checkpoint, measurement, tables), and returns a `Report` or a `RescalePlan`. Nothing here computes a number of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope import proof, stages
from vrscope.analysis import analyze
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import PlanError, VerificationError
from vrscope.executors import default_executor
from vrscope.job import demo, measure, run
from vrscope.precision import recipe, sensitivity
from vrscope.progress import Progress, silent
from vrscope.provenance import provenance
from vrscope.saving import load_report, merge_reports, require_free, save
from vrscope.stages import DEFAULT_FORMATS, DEFAULT_TOKENS, PROOF_TOKENS
from vrscope.tables import Report
from vrscope.verdict import verdict

if TYPE_CHECKING:
    from vrscope.arch.binding import Binding
    from vrscope.checkpoint.source import Checkpoint
    from vrscope.quant.formats import Format
    from vrscope.rescale.methods import MethodOptions
    from vrscope.rescale.plan import RescalePlan
    from vrscope.rescale.survey import Surveys

__all__ = [
    "DEFAULT_FORMATS",
    "DEFAULT_TOKENS",
    "analyze",
    "check_family",
    "demo",
    "describe",
    "load_report",
    "measure",
    "merge_reports",
    "plan",
    "plan_and_describe",
    "recipe",
    "require_free",
    "rescale",
    "run",
    "save",
    "sensitivity",
    "verify",
]

Source = str | Path


def plan(
    model: Source,
    *,
    method: str = "wisca",
    options: MethodOptions | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    text: Source | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    revision: str | None = None,
    families: Source | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> RescalePlan:
    """Choose the scales of every space of a checkpoint; nothing is written.

    Parameters
    ----------
    model
        Folder, safetensors file, index.json or hub id.
    method
        Name of a method, see `vrscope list methods`.
    options
        Options of the method; `overrides` set single ones, for example `granularity="tensor"`, `scales="free"`, or
        `approximate=True`: also scale what norms undo up to their eps.
    formats
        Accepted so that the call reads like the command; choosing does not depend on them, `describe` does.
    text, tokens, device
        What methods that calibrate (auto, awq, smoothquant) run the model on, and where: a UTF-8 text file or, with
        None, the sample that ships with vrscope, and how many tokens of it, in windows of 512.
    revision, families, progress
        As in `analyze`.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, is quantized, or holds NaN or infinite weights.
    FamilyError
        If its architecture is not declared, or the file does not fit the declaration.
    UnknownNameError
        If there is no such method, format or option value.
    ModelError, TextError
        If a method that calibrates cannot run the model on the text.
    """
    stages.read_formats(formats)
    on = stages.CalibrationText(text, tokens, device=device)
    return _choose(model, method, options, on, revision, families, progress, overrides)[2]


def plan_and_describe(
    model: Source,
    *,
    method: str = "wisca",
    options: MethodOptions | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    text: Source | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    revision: str | None = None,
    families: Source | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> tuple[RescalePlan, Report]:
    """Return what `plan` and then `describe` would, but read the weights only once if they allow it.

    Parameters and errors are those of the two.
    """
    started, entries = time.monotonic(), stages.read_formats(formats)
    on = stages.CalibrationText(text, tokens, device=device)
    checkpoint, binding, chosen, surveys = _choose(
        model, method, options, on, revision, families, progress, overrides, described=True
    )
    return chosen, _describe(started, (checkpoint, binding), chosen, surveys, entries)


def _choose(
    model: Source,
    method: str,
    options: MethodOptions | None,
    on: stages.CalibrationText,
    revision: str | None,
    families: Source | None,
    progress: Progress,
    overrides: Mapping[str, Any],
    *,
    described: bool = False,
) -> tuple[Checkpoint, Binding, RescalePlan, Surveys]:
    checkpoint = open_checkpoint(model, revision)
    chosen = stages.read_options(overrides, options)
    binding = stages.bind_checkpoint(checkpoint, families, chosen.approximate)
    return checkpoint, binding, *stages.choose_plan(checkpoint, binding, method, chosen, on, progress, described)


def describe(
    model: Source,
    plan: RescalePlan,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    revision: str | None = None,
    families: Source | None = None,
    progress: Progress = silent,
) -> Report:
    """Say what a plan does to a checkpoint without writing it: spaces, matrices, limits, and which formats can feel it.

    Returns
    -------
    Report
        Tables "spaces", "matrices", "unreachable" and "reach"; "approximate" if the plan is equal up to eps only.

    Raises
    ------
    PlanError
        If the plan is not for this checkpoint.
    """
    from vrscope.rescale.fitting import check_plan
    from vrscope.rescale.survey import survey_plan

    started = time.monotonic()
    checkpoint = open_checkpoint(model, revision)
    binding = stages.bind_checkpoint(checkpoint, families, plan.approximate)
    check_plan(plan, binding, checkpoint.fingerprint(), checkpoint.name)
    surveys = survey_plan(checkpoint, binding, plan, default_executor(), progress)
    return _describe(started, (checkpoint, binding), plan, surveys, stages.read_formats(formats))


def _describe(
    started: float,
    bound: tuple[Checkpoint, Binding],
    plan: RescalePlan,
    surveys: Surveys,
    formats: Sequence[Format],
) -> Report:
    checkpoint, binding = bound
    tables, columns = stages.fill_plan(checkpoint, binding, plan, surveys, formats)
    facts = provenance(
        time.monotonic() - started,
        model=checkpoint.name,
        family=binding.family,
        settings={"method": plan.method, **plan.settings, "scales": plan.scales},
        equivalent=plan.equivalent,
    )
    return Report("plan", facts, verdict(tables, facts), tables, columns)


def rescale(
    model: Source,
    out: Source,
    *,
    plan: RescalePlan | Source | None = None,
    method: str = "wisca",
    invert: bool = False,
    text: Source | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    force: bool = False,
    revision: str | None = None,
    families: Source | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> RescalePlan:
    """Write a rescaled copy of a checkpoint: streamed, proved, and put in place whole or not at all.

    Parameters
    ----------
    model
        Folder, safetensors file, index.json or hub id.
    out
        Folder to write; it also gets the plan, as `vrscope_plan.json`.
    plan
        A plan or its file; None makes one with `method` and `overrides`.
    invert
        Undo the plan: on the checkpoint it made, this restores the tensors of the original byte for byte.
    text, tokens, device
        As in `plan`.
    force
        Replace an existing checkpoint at `out`.
    revision, families, progress
        As in `analyze`.

    Returns
    -------
    RescalePlan
        The plan that was applied, with the fingerprints of both checkpoints.

    Raises
    ------
    OutputError
        If `out` exists and `force` is not set, or cannot be written.
    PlanError
        If the plan is not for this checkpoint or cannot be applied exactly.
    VerificationError
        If the proof of the copy fails; then nothing is left behind.
    """
    from vrscope.checkpoint.writer import check_target
    from vrscope.rescale.apply import apply_plan

    checkpoint = open_checkpoint(model, revision)
    if plan is None:
        if invert:
            message = "invert: expected the plan to undo, found none. Give --plan OUT/vrscope_plan.json."
            raise PlanError(message)
        options = stages.read_options(overrides)
        binding = stages.bind_checkpoint(checkpoint, families, options.approximate)
        check_target(checkpoint, Path(out), force=force)  # before the long work
        on = stages.CalibrationText(text, tokens, device=device)
        chosen = stages.choose_plan(checkpoint, binding, method, options, on, progress)[0]
    else:
        chosen = stages.read_plan(plan)
        binding = stages.bind_checkpoint(checkpoint, families, chosen.approximate)
    if invert:
        chosen = chosen.inverse()
    return apply_plan(checkpoint, binding, chosen, Path(out), force=force, progress=progress)


def verify(
    a: Source,
    b: Source,
    *,
    plan: RescalePlan | Source | None = None,
    logits: bool = False,
    text: Source | None = None,
    tokens: int = PROOF_TOKENS,
    device: str = "auto",
    revision: str | None = None,
    families: Source | None = None,
    progress: Progress = silent,
) -> Report:
    """Prove that checkpoint `b` computes the same function as `a`, from the weights alone.

    Every tensor of `b` must be that of `a` times the recorded scales, and these must belong to the spaces that `a`'s
    architecture leaves free.

    Parameters
    ----------
    a, b
        The checkpoints; `b` carries its plan, unless `plan` is given.
    logits
        Also run both models in float32 and in bfloat16, and compare their logits bit for bit.
    text, tokens, device
        What they are run on, and where.
    revision
        Branch, tag or commit of `a`, if it is a hub id.
    families, progress
        As in `analyze`.

    Returns
    -------
    Report
        Table "proof": check, result, detail.

    Raises
    ------
    VerificationError
        If they are not the same function, or no plan says how they should differ.
    """
    from vrscope.rescale.fitting import check_plan
    from vrscope.rescale.plan import NOT_EQUIVALENT
    from vrscope.rescale.verify import prove

    started = time.monotonic()
    first, second = open_checkpoint(a, revision), open_checkpoint(b)
    recorded = proof.recorded_plan(first, second, plan, families)
    binding = stages.bind_checkpoint(first, families, recorded.approximate)
    check_plan(recorded, binding, first.fingerprint(), first.name)
    prove(first, second, binding, recorded, progress)
    if recorded.equivalent == NOT_EQUIVALENT:
        message = f"{second.name}: follows its plan, but the plan is raw TVR, which is not function-preserving."
        raise VerificationError(message)
    rows = [proof.weight_proof(first, recorded)]
    if logits:
        sample = stages.read_sample(first, text, tokens)
        for dtype in ("float32", "bfloat16"):
            rows.append(proof.compare_outputs((first, second), recorded, sample, (device, dtype), progress))
    tables, columns = proof.fill_proof(rows)
    facts = provenance(
        time.monotonic() - started,
        model=str(a),
        other=str(b),
        settings={"method": recorded.method, **recorded.settings},
        equivalent=recorded.equivalent,
    )
    return Report("verify", facts, verdict(tables, facts), tables, columns)


def check_family(
    model: Source,
    *,
    families: Source | None = None,
    approximate: bool = False,
    device: str = "auto",
    revision: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Test a declared architecture on a checkpoint: random powers of two on every space must leave all outputs equal.

    Parameters
    ----------
    model
        A checkpoint of that architecture; a tiny random one serves as well as a real one.
    families
        The TOML file with the declaration, if it is not a shipped one.
    approximate
        Also grow what norms undo up to their eps: equal bits once the norms' eps is set to zero.
    device, revision, progress
        As in `verify` and `analyze`.

    Returns
    -------
    Report
        Table "proof": check, result, detail.

    Raises
    ------
    FamilyError
        If no declaration fits the checkpoint.
    VerificationError
        If the outputs differ; the message names the spaces whose scales change them.
    """
    from vrscope import family_check

    started = time.monotonic()
    checkpoint = open_checkpoint(model, revision)
    binding = stages.bind_checkpoint(checkpoint, families, approximate)
    rows = family_check.check_family(checkpoint, binding, device=device, progress=progress)
    tables, columns = proof.fill_proof(rows)
    facts = provenance(time.monotonic() - started, model=str(model), family=binding.family, settings={})
    return Report("check-family", facts, (), tables, columns)
