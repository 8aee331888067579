"""Where precision is needed: the sensitivity of every linear weight, and recipes that spend bytes where they count."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vrscope import stages
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.errors import PlanError
from vrscope.executors import default_executor
from vrscope.progress import Progress, silent
from vrscope.provenance import command_line, provenance
from vrscope.saving import load_report, require_free
from vrscope.tables import Report, write_text
from vrscope.verdict import verdict

if TYPE_CHECKING:
    import pandas as pd

    from vrscope.fragility.units import Unit
    from vrscope.quant.formats import Format
    from vrscope.quant.text import TextSample

SENSITIVITY_TOKENS = 512
_ENGINES = ("torch", "transformers", "bitsandbytes")


def sensitivity(
    model: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "nf4",
    by: Literal["tensor", "layer", "role"] = "tensor",
    text: str | Path | None = None,
    tokens: int = SENSITIVITY_TOKENS,
    device: str = "auto",
    dtype: str = "float32",
    statistics: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    revision: str | None = None,
    families: str | Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Quantize one linear weight (or layer, or role) at a time, measure what that alone costs, and rank.

    Parameters
    ----------
    model
        Folder, safetensors file, index.json or hub id.
    out
        Folder for the journal of finished units, from which interrupted work can go on; None keeps none.
    format
        Name of a format.
    by
        What is quantized together.
    text
        A UTF-8 text file; None takes the sample that ships with vrscope.
    tokens
        Tokens to measure on, in windows of 512.
    device, dtype
        As in `measure`.
    statistics
        Saved results whose tables "tensors", "weight_error" and "activations" are correlated with the damage as well.
    resume
        Go on with the journal in `out`.
    force
        Replace an earlier journal in `out`.
    revision, families
        As in `analyze`.
    progress
        Is told of the time foreseen and spent.

    Returns
    -------
    Report
        Tables "sensitivity", "linears", "additivity", and, by tensor, "correlation".

    Raises
    ------
    ModelError
        If the model has no linear weights, or cannot be run.
    OutputError
        If `out` holds a journal and neither `resume` nor `force` is set, or one of other work.
    """
    from vrscope.activations.capture import find_sites
    from vrscope.activations.profile import profile_activations
    from vrscope.activations.tables import input_table
    from vrscope.fragility import measure, units
    from vrscope.fragility.journal import JOURNAL_FILE, Journal, open_journal
    from vrscope.fragility.pooling import pooled
    from vrscope.quant.loading import load_model, resolve_device
    from vrscope.quant.memory import require_run_memory
    from vrscope.quant.spool import Spool

    started, cpu = time.monotonic(), time.process_time()
    if by not in units.GROUPINGS:
        message = f"by: expected {', '.join(units.GROUPINGS)}, found {by!r}. Choose one of them."
        raise PlanError(message)
    (entry,) = stages.read_formats([format])
    saved = {} if statistics is None else load_report(statistics).tables
    checkpoint = open_checkpoint(model, revision)
    roles, family = stages.read_roles(checkpoint, families)
    sample = stages.read_sample(checkpoint, text, tokens)
    where = resolve_device(device)
    subject = _subject(checkpoint, entry, sample, {"by": by, "device": where, "dtype": dtype})
    if out is not None:
        require_free(out, force or resume)
    with (
        Journal()
        if out is None
        else open_journal(Path(out) / JOURNAL_FILE, subject, resume=resume, force=force) as journal,
        Spool() as spool,
    ):
        earlier = len(journal.done)
        require_run_memory(checkpoint, where, dtype, max(map(len, sample.windows)), compared=True)
        loaded = load_model(checkpoint, where, dtype)
        sites = find_sites(loaded, checkpoint, roles)
        linears = units.find_linears(loaded, checkpoint, roles, entry, sites)
        chosen = units.group(linears, by)
        bench = measure.Bench.of(
            loaded, sample, spool, chosen, lambda: profile_activations(loaded, checkpoint, roles, sample, sites=sites)
        )
        foreseen = measure.measure_units(bench, chosen, entry, journal, progress)
    table = measure.sensitivity_table(chosen, journal, loaded.causal)
    tables: stages.Tables = {
        "sensitivity": table,
        "linears": units.linear_table(chosen),
        "additivity": measure.additivity_table(table, journal, loaded.causal),
    }
    columns: stages.Columns = {
        "sensitivity": measure.SENSITIVITY_COLUMNS,
        "linears": units.LINEAR_COLUMNS,
        "additivity": measure.ADDITIVITY_COLUMNS,
    }
    if by == "tensor":
        joined = {linear.tensor: linear.sources for linear in linears if linear.parts > 1}
        measured = _statistics(checkpoint, families, entry, progress)
        profile = profile_activations(loaded, checkpoint, roles, sample, progress, sites=sites, joined=joined)
        measured["activations"] = input_table(profile)
        _add_correlation(tables, columns, table, pooled(_joined(measured, saved), joined))
    arguments = {"out": out, "format": format, "by": by, "text": text, "tokens": tokens, "device": device}
    arguments |= {"dtype": dtype, "statistics": statistics, "revision": revision, "families": families}
    stored = sum(info.size_bytes for info in checkpoint.tensors.values())
    facts = provenance(
        time.monotonic() - started,
        model=str(model),
        family=family,
        settings={"format": entry.name, "by": by},
        command=command_line("sensitivity", [model], arguments),
        fingerprint=checkpoint.fingerprint(),
        model_type=str(checkpoint.config.get("model_type", "")),
        kept_modules=units.kept_modules(loaded.model, linears),
        other_bytes=stored - sum(linear.size_bytes for linear in linears),
        notes=_notes(loaded.model, entry, chosen, by, bench.replay.calls),
        cpu_seconds=round(time.process_time() - cpu, 1),
        foreseen_seconds=round(foreseen, 1),
        resumed_units=earlier,
        **stages.sample_facts(sample, where, dtype),
    )
    return Report("sensitivity", facts, verdict(tables, facts), tables, columns)


def recipe(
    *results: str | Path | Report,
    out: str | Path | None = None,
    budget_bits: float | None = None,
    budget_bytes: float | None = None,
    budget_gb: float | None = None,
    budget_kl: float | None = None,
    low: str | None = None,
    high: str = "bfloat16",
    targets: Sequence[str] = ("bitsandbytes", "llm-compressor", "torchao", "llama.cpp"),
    fuse: bool = False,
    check: bool = False,
    model: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int = stages.DEFAULT_TOKENS,
    device: str = "auto",
    dtype: str = "float32",
    force: bool = False,
    progress: Progress = silent,
) -> Report:
    """Choose which weights stay in higher precision within a budget, and write that down for other tools.

    Single damages are added up, which is an assumption: `check` measures the mixed model for real.

    Parameters
    ----------
    results
        What `sensitivity` returned or saved: for the lower format, and if there is one for the higher.
    out
        Folder for the files of the targets; None writes none.
    budget_bits, budget_bytes, budget_gb, budget_kl
        One of: mean bits per linear weight; bytes, or 10^9 bytes, of the whole model; nats.
    low
        The lower format; by default the smallest that was measured.
    high
        "bfloat16" (not quantized), "int8" or "int8-row".
    targets
        Tools to write for.
    fuse
        Keep q, k and v of a layer together, and gate and up, as engines that join them need it.
    check
        Measure the recipe beside the model with all weights in the lower format.
    model
        For `check`: the model, if it is not where it was.
    text, tokens, device, dtype
        For `check`: as in `measure`.
    force
        Replace earlier files in `out`.
    progress
        Is told of the models checked.

    Returns
    -------
    Report
        Tables "recipe" and "recipe_summary".

    Raises
    ------
    PlanError
        If the results do not fit, or the budget is impossible.
    UnknownNameError
        If there is no such target.
    """
    from vrscope.fragility import budget
    from vrscope.fragility import recipe as making
    from vrscope.fragility import targets as writing

    started = time.monotonic()
    wanted = making.Budget.of(budget_bits, budget_bytes, budget_gb, budget_kl)
    writers = [writing.get_target(name) for name in dict.fromkeys(targets)]
    writing.check_high(high)
    named = [(item, "results") if isinstance(item, Report) else (load_report(item), str(item)) for item in results]
    if not named:
        message = "results: expected those of `vrscope sensitivity`, found none. Give at least one."
        raise PlanError(message)
    lower, higher = making.pick([making.read_sensitivity(report, name) for report, name in named], low, high)
    items = making.items_of(lower, higher, high)
    items = budget.fuse(items) if fuse else items
    kept = making.choose(items, wanted, lower)
    table, summary = making.tables_of(items, kept, lower, high)
    choice = making.choice_of(table, lower, high)
    written = [(writer.file, *writer.write(choice)) for writer in writers]
    notes = [note for _, _, own in written for note in own]
    notes += (
        [] if higher is not None or high == writing.FULL else [f"The damage of {high} was not measured: taken as 0."]
    )
    if bool(lower.linears["stacked"].any()):
        notes.append("Stacked experts are no linear modules: bitsandbytes and torchao leave them unquantized.")
    sample_facts: Mapping[str, Any] = {}
    if check:
        source = model or str(lower.facts.get("model"))
        measured, sample_facts = _checked(source, lower.facts, choice, (text, tokens, device, dtype), progress)
        summary[list(measured.columns)] = measured
        if sample_facts["text"] == lower.facts.get("text"):
            notes.append("Checked on the text that the recipe was chosen on, which flatters it: give another --text.")
    facts = provenance(
        time.monotonic() - started,
        model=str(lower.facts.get("model")),
        family=lower.facts.get("family"),
        settings={"low": lower.scheme.name, "high": high, f"budget_{wanted.kind}": wanted.value, "fuse": fuse},
        files=[file for file, _, _ in written],
        notes=notes,
        fingerprint=lower.facts.get("fingerprint"),
        sensitivity={key: lower.facts.get(key) for key in ("text", "tokens", "command")},
        **sample_facts,
    )
    tables: stages.Tables = {"recipe": table, "recipe_summary": summary}
    columns: stages.Columns = {"recipe": making.RECIPE_COLUMNS, "recipe_summary": making.SUMMARY_COLUMNS}
    if out is not None:
        require_free(out, force)
        for file, content, _ in written:
            write_text(Path(out) / file, content)
    return Report("recipe", facts, verdict(tables, facts), tables, columns)


def _subject(checkpoint: Checkpoint, entry: Format, sample: TextSample, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a journal is of: anything that would change a figure in it."""
    from importlib.metadata import version

    windows = hashlib.sha256(json.dumps(sample.windows).encode()).hexdigest()
    return {
        "model": checkpoint.fingerprint(),
        "format": entry.name,
        "tokens": sample.tokens,
        "text": windows,
        **how,
        **{name: version(name) for name in _ENGINES},
    }


def _statistics(
    checkpoint: Checkpoint, families: str | Path | None, entry: Format, progress: Progress
) -> dict[str, pd.DataFrame]:
    """Return the tables of cheap statistics: those of the weights, and their errors in every default format."""
    from vrscope.quant.weights import weight_error
    from vrscope.stats.measure import measure_tensors

    roles, _ = stages.read_roles(checkpoint, families)
    formats = stages.read_formats([entry.name, *stages.DEFAULT_FORMATS])
    executor = default_executor()
    return {
        "tensors": measure_tensors(checkpoint, roles, executor=executor, progress=progress),
        "weight_error": weight_error(checkpoint, roles, formats, executor=executor, progress=progress),
    }


def _joined(measured: dict[str, pd.DataFrame], saved: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return measured statistics with what saved results add: activations, and more columns of tensors."""
    tables = dict(measured)
    if "activations" in saved:
        tables["activations"] = saved["activations"]
    if "tensors" in saved:
        more = saved["tensors"].drop_duplicates("tensor").set_index("tensor")
        more = more[[name for name in more.columns if name not in tables["tensors"].columns]]
        tables["tensors"] = tables["tensors"].join(more, on="tensor")
    return tables


def _add_correlation(
    tables: stages.Tables, columns: stages.Columns, table: pd.DataFrame, statistics: Mapping[str, pd.DataFrame]
) -> None:
    from vrscope.fragility.correlation import CORRELATION_COLUMNS, correlate

    damage = table.rename(columns={"unit": "tensor"})
    damage["damage"] = damage["kl"].fillna(damage["relative_error"])
    tables["correlation"] = correlate(damage, statistics)
    columns["correlation"] = CORRELATION_COLUMNS


def _notes(model: Any, entry: Format, chosen: Sequence[Unit], by: str, calls: int) -> list[str]:
    from vrscope.quant.layers import kept_note

    notes = [kept_note(model, entry) or ""]
    if by != "tensor":
        notes.append("Correlations with statistics need --by tensor.")
    elif any(not linear.sources for unit in chosen for linear in unit.linears):
        notes.append("Weights that were not recognised in the checkpoint have no statistics to correlate.")
    elif any(linear.parts > 1 for unit in chosen for linear in unit.linears):
        notes.append(
            "Weights that the model joins from several tensors have those statistics alone that follow from their "
            "parts: no quantiles, shares of outliers, spreads or ranks."
        )
    if not calls:
        notes.append("Every unit took a whole run: what layers return could not be replayed exactly.")
    return [note for note in notes if note]


def _checked(
    source: str | Path,
    facts: Mapping[str, Any],
    choice: Any,
    how: tuple[str | Path | None, int, str, str],
    progress: Progress,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure a choice on the model that it is for."""
    from vrscope.activations.profile import profile_activations
    from vrscope.fragility.check import check_recipe
    from vrscope.fragility.recipe import format_of
    from vrscope.quant.loading import load_model, resolve_device
    from vrscope.quant.memory import require_run_memory

    text, tokens, device, dtype = how
    checkpoint = open_checkpoint(source)
    if checkpoint.fingerprint() != facts.get("fingerprint"):
        message = (
            f"{checkpoint.name}: expected the checkpoint that the sensitivities were measured on, found another one. "
            "Name the right one with --model, or measure again."
        )
        raise PlanError(message)
    sample = stages.read_sample(checkpoint, text, tokens)
    where = resolve_device(device)
    require_run_memory(checkpoint, where, dtype, max(map(len, sample.windows)), compared=True)
    loaded = load_model(checkpoint, where, dtype)
    kept = {module: which == "high" for module, which in choice.formats.items()}
    formats = format_of(choice.low), format_of(choice.high)
    roles, _ = stages.read_roles(checkpoint)
    measured = check_recipe(
        loaded, sample, kept, formats, progress, lambda: profile_activations(loaded, checkpoint, roles, sample)
    )
    return measured, stages.sample_facts(sample, where, dtype)
