"""The stages of the main job, each returning the tables it fills with their column descriptions.

`api` strings them together; what one stage hands to the next is a checkpoint, a binding, a plan or a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import CheckpointError, FamilyError, OutputError, UnknownNameError, VerificationError
from vrscope.executors import default_executor
from vrscope.progress import Progress
from vrscope.saving import require_free
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

    from vrscope.arch.binding import Binding
    from vrscope.arch.roles import TensorRole
    from vrscope.quant.formats import Format
    from vrscope.quant.text import TextSample
    from vrscope.rescale.methods import MethodOptions
    from vrscope.rescale.plan import RescalePlan
    from vrscope.rescale.profile import Profile
    from vrscope.stats.measure import StatOptions

Tables = dict[str, "pd.DataFrame"]
Columns = dict[str, tuple[Column, ...]]
Filled = tuple[Tables, Columns]

DEFAULT_FORMATS = ("int8", "int8-row", "nf4", "fp4", "int4-g64")
DEFAULT_TOKENS = 2048
ORIGINAL, RESCALED = "original", "rescaled"
PROOF_TOKENS = 512  # how much text two models are run on, to show that their logits agree
WORST = 6  # tensors whose histograms are shown
PROOF_COLUMNS = (
    Column("check", "", "What was compared."),
    Column("result", "", "bit-equal, equal up to rounding, or not equivalent."),
    Column("detail", "", "Over how much, and the largest difference."),
)


def bind_checkpoint(checkpoint: Checkpoint, families: str | Path | None = None) -> Binding:
    """Return the binding of a checkpoint to its family; `families` is a TOML file of more declarations."""
    from vrscope.arch.binding import bind, declared_families

    return bind(checkpoint, declared_families(None if families is None else Path(families)))


def read_roles(
    checkpoint: Checkpoint, families: str | Path | None = None
) -> tuple[Mapping[str, TensorRole], str | None]:
    """Return the roles of all tensors and the family's name; without a family, roles read off the names, and None."""
    from vrscope.arch.binding import declared_families
    from vrscope.arch.roles import roles_from_names

    if families is not None:
        declared_families(Path(families))  # a broken file is an error; a checkpoint no family fits is not
    try:
        binding = bind_checkpoint(checkpoint, families)
    except (FamilyError, CheckpointError):  # statistics need no family, and also describe what is quantized
        return roles_from_names(checkpoint.tensors), None
    return binding.roles, binding.family


def read_formats(names: Sequence[str]) -> list[Format]:
    """Return the formats of these names, each once."""
    from vrscope.quant.formats import get_format

    return [get_format(name) for name in dict.fromkeys(names)]


def read_options(overrides: Mapping[str, Any], options: MethodOptions | None = None) -> MethodOptions:
    """Return method options with single ones replaced.

    Raises
    ------
    UnknownNameError
        If an option does not exist or has no such value.
    """
    from vrscope.rescale.methods import MethodOptions

    known = [field.name for field in fields(MethodOptions)]
    for name in overrides:
        if name not in known:
            raise UnknownNameError.of("option", name, known)  # noqa: EM101
    return replace(options or MethodOptions(), **overrides)


def read_plan(plan: RescalePlan | str | Path) -> RescalePlan:
    """Return a plan, read from its file unless it is one."""
    from vrscope.rescale.plan import RescalePlan

    return plan if isinstance(plan, RescalePlan) else RescalePlan.load(plan)


def read_sample(checkpoint: Checkpoint, text: str | Path | None, tokens: int) -> TextSample:
    """Return windows of tokens of a text file, or of the sample that ships with vrscope."""
    from vrscope.quant.text import load_text, make_sample

    path = None if text is None else Path(text)
    name = "sample text of vrscope" if path is None else path.name
    return make_sample(load_text(path), checkpoint, tokens, name=name)


def fill_statistics(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    options: StatOptions,
    progress: Progress,
    formats: Sequence[Format] = (),
) -> Filled:
    """Return the tables "tensors", "depth_law" and "histograms" (of the linear weights with the heaviest tails).

    With `formats` also "weight_error", from the same visit to every weight.
    """
    from vrscope.stats.depth_law import DEPTH_LAW_COLUMNS, fit_depth_law
    from vrscope.stats.measure import HISTOGRAM_COLUMNS, histograms, measure_tensors, tensor_columns

    executor = default_executor()
    more: Tables = {}
    if formats:
        from vrscope.quant.weights import WeightErrors, one_thread_each

        errors = WeightErrors(checkpoint, roles, formats)
        errors.rehearse(progress)
        with one_thread_each(formats):
            tensors = measure_tensors(
                checkpoint, roles, options=options, executor=executor, progress=progress, beside=errors
            )
        more["weight_error"] = _labelled(errors.table(), ORIGINAL)
    else:
        tensors = measure_tensors(checkpoint, roles, options=options, executor=executor, progress=progress)
    shown = tensors[(tensors["kind"] == "linear") & tensors["kurtosis_excess"].notna()]
    worst = list(shown.nlargest(WORST, "kurtosis_excess")["tensor"])
    tables = {
        "tensors": tensors,
        "depth_law": fit_depth_law(tensors),
        "histograms": histograms(checkpoint, worst, executor=executor, progress=progress),
        **more,
    }
    columns = {
        "tensors": tensor_columns(options),
        "depth_law": DEPTH_LAW_COLUMNS,
        "histograms": HISTOGRAM_COLUMNS,
    }
    if formats:
        columns["weight_error"] = _weight_error_columns()
    return tables, columns


def _labelled(frame: pd.DataFrame, label: str) -> pd.DataFrame:
    """Return weight errors with the label of their checkpoint in front."""
    frame.insert(0, "checkpoint", label)
    return frame


def _weight_error_columns() -> tuple[Column, ...]:
    from vrscope.quant.weights import WEIGHT_ERROR_COLUMNS

    return (Column("checkpoint", "", "Which checkpoint."), *WEIGHT_ERROR_COLUMNS)


def fill_plan(
    checkpoint: Checkpoint,
    binding: Binding,
    plan: RescalePlan,
    profiles: tuple[Profile, Profile],
    formats: Sequence[Format],
) -> Filled:
    """Return the tables "spaces", "matrices", "unreachable" and "reach" of a plan."""
    from vrscope.rescale import describe
    from vrscope.rescale.reach import REACH_COLUMNS, reach

    tables = {
        "spaces": describe.describe_spaces(checkpoint, binding, plan, profiles, formats),
        "matrices": describe.describe_matrices(binding, plan, profiles),
        "unreachable": describe.describe_unreachable(binding, plan.scales),
        "reach": reach(checkpoint, binding, plan, formats),
    }
    columns = {
        "spaces": describe.SPACE_COLUMNS,
        "matrices": describe.MATRIX_COLUMNS,
        "unreachable": describe.UNREACHABLE_COLUMNS,
        "reach": REACH_COLUMNS,
    }
    return tables, columns


def fill_damage(
    checkpoints: Mapping[str, Checkpoint],
    formats: Sequence[Format],
    sample: TextSample | None,
    where: tuple[str, str],
    progress: Progress,
) -> Filled:
    """Return the tables "damage" (without a sample: none) and "weight_error"; `where` is device and dtype."""
    import pandas as pd

    from vrscope.quant.metrics import DAMAGE_COLUMNS
    from vrscope.quant.model import measure_model
    from vrscope.quant.weights import weight_error

    tables: Tables = {}
    columns: Columns = {}
    if sample is not None:
        device, dtype = where
        tables["damage"] = measure_model(checkpoints, formats, sample, device=device, dtype=dtype, progress=progress)
        columns["damage"] = DAMAGE_COLUMNS
    frames = []
    for label, checkpoint in checkpoints.items():
        roles, _ = read_roles(checkpoint)
        frame = weight_error(checkpoint, roles, formats, executor=default_executor(), progress=progress)
        frames.append(_labelled(frame, label))
    tables["weight_error"] = pd.concat(frames, ignore_index=True)
    columns["weight_error"] = _weight_error_columns()
    return tables, columns


def fill_proof(rows: Sequence[tuple[str, str, str]]) -> Filled:
    """Return the table "proof" of rows `(check, result, detail)`."""
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=[column.name for column in PROOF_COLUMNS])
    return {"proof": frame}, {"proof": PROOF_COLUMNS}


def weight_proof(checkpoint: Checkpoint, plan: RescalePlan) -> tuple[str, str, str]:
    """Return the row of the table "proof" for a copy whose weights were proved."""
    from vrscope.rescale.plan import BIT_EQUAL, ROUNDED

    count = sum(info.numel for info in checkpoint.tensors.values())
    how = {
        BIT_EQUAL: "is the original times the recorded power of two, exactly",
        ROUNDED: "is the original times the recorded factors, rounded once",
    }.get(plan.equivalent, "follows the raw TVR formula, which is not function-preserving")
    return "weights", plan.equivalent, f"each of {count:,} elements in {len(checkpoint.tensors):,} tensors {how}"


def compare_outputs(
    pair: tuple[Checkpoint, Checkpoint],
    plan: RescalePlan,
    sample: TextSample,
    where: tuple[str, str],
    progress: Progress,
) -> tuple[str, str, str]:
    """Run both checkpoints on the same text and return the row of the table "proof".

    Raises
    ------
    VerificationError
        If the plan promises equal bits and the outputs differ in one.
    """
    from vrscope.quant.model import compare_logits
    from vrscope.rescale.plan import BIT_EQUAL

    device, dtype = where
    found = compare_logits(*pair, sample, device=device, dtype=dtype, progress=progress)
    if plan.equivalent == BIT_EQUAL and not found.bit_equal:
        message = (
            f"logits in {dtype}: expected bit-equal outputs for powers of two, found a difference of "
            f"{found.max_abs_difference:.3g} on {found.tokens} tokens. The declaration of family {plan.family!r} is "
            "wrong for this checkpoint; do not use the rescaled one, and please report it."
        )
        raise VerificationError(message)
    detail = f"outputs on {found.tokens:,} tokens in {dtype} " + (
        "agree in every bit"
        if found.bit_equal
        else f"differ by up to {found.max_abs_difference:.3g}"
        + (f", mean KL {found.mean_kl:.3g} nats" if found.mean_kl == found.mean_kl else "")
    )
    return f"outputs, {dtype}", BIT_EQUAL if found.bit_equal else plan.equivalent, detail


def recorded_plan(
    first: Checkpoint,
    second: Checkpoint,
    plan: RescalePlan | str | Path | None,
    families: str | Path | None = None,
) -> RescalePlan:
    """Return the plan that says how `second` should differ from `first`: the one given, or the one they carry.

    Raises
    ------
    VerificationError
        If no plan is found and the two are not simply the same bytes.
    """
    from vrscope.rescale.plan import PLAN_FILE, POW2, RescalePlan

    if plan is not None:
        return read_plan(plan)
    source, result = first.fingerprint(), second.fingerprint()
    for checkpoint in (second, first):
        found = carried_plan(checkpoint)
        if found is None:
            continue
        # One end is enough: if the other was changed since, the proof finds the tensor and says so.
        if found.source == source and checkpoint is second:
            return found
        if found.source == result and checkpoint is first:
            return found.inverse()
    if source == result:
        return RescalePlan(bind_checkpoint(first, families).family, "none", {}, POW2, {}, source, result)
    message = (
        f"{second.name}: expected the {PLAN_FILE} of a rescale of {first.name}, found none that joins the two. "
        "Give the plan with --plan, or compare a checkpoint with what `vrscope rescale` made of it."
    )
    raise VerificationError(message)


def carried_plan(checkpoint: Checkpoint) -> RescalePlan | None:
    """Return the plan that a rescaled checkpoint carries, None for any other."""
    from vrscope.rescale.plan import PLAN_FILE, RescalePlan

    file = checkpoint.folder / PLAN_FILE
    return RescalePlan.load(file) if file.is_file() else None


def not_equivalent(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Return "not equivalent" if one of the checkpoints was made by raw TVR, else None: nothing was proved here."""
    from vrscope.rescale.plan import NOT_EQUIVALENT

    plans = [carried_plan(checkpoint) for checkpoint in checkpoints]
    return NOT_EQUIVALENT if any(plan and plan.equivalent == NOT_EQUIVALENT for plan in plans) else None


def sample_facts(sample: TextSample | None, device: str, dtype: str) -> dict[str, Any]:
    """Return what provenance says of the text and of how the models were run."""
    if sample is None:
        return {}
    from vrscope.quant.loading import resolve_device

    where = {"device": resolve_device(device), "dtype": dtype}
    return {"text": sample.name, "tokens": sample.tokens, "window": sample.window, **where}


def label_checkpoints(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return a short name for each: "original" for the first, "rescaled" for one with a plan, else its folder."""
    from vrscope.rescale.plan import PLAN_FILE

    labels = [ORIGINAL]
    for checkpoint in checkpoints[1:]:
        base = RESCALED if (checkpoint.folder / PLAN_FILE).is_file() else checkpoint.folder.name
        taken = sum(label == base or label.startswith(f"{base}-") for label in labels)
        labels.append(base if not taken else f"{base}-{taken + 1}")
    return labels


def require_new(folder: Path, force: bool) -> None:
    """Refuse a folder for a whole run that is in use.

    Raises
    ------
    OutputError
        If it holds something and `force` is not set, or is a file or a checkpoint.
    """
    require_free(folder, force)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        message = f"{folder}: already holds files. Give another folder with -o, or --force to replace earlier results."
        raise OutputError(message)
