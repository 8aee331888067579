"""The stages of the main job, each returning the tables it fills with their column descriptions.

`api` strings them together; what one stage hands to the next is a checkpoint, a binding, a plan or a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import CheckpointError, FamilyError, OutputError, UnknownNameError
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
    from vrscope.rescale.survey import Surveys
    from vrscope.stats.measure import StatOptions

Tables = dict[str, "pd.DataFrame"]
Columns = dict[str, tuple[Column, ...]]
Filled = tuple[Tables, Columns]

DEFAULT_FORMATS = ("int8", "int8-row", "nf4", "fp4", "int4-g64")
DEFAULT_TOKENS = 2048
ORIGINAL, RESCALED = "original", "rescaled"
PROOF_TOKENS = 512  # how much text two models are run on, to show that their logits agree
WORST = 6  # tensors whose histograms are shown


def bind_checkpoint(checkpoint: Checkpoint, families: str | Path | None = None, approximate: object = None) -> Binding:
    """Return the binding of a checkpoint to its family.

    `families` is a TOML file of more declarations; anything true as `approximate` adds the spaces that norms undo only
    up to their eps.
    """
    from vrscope.arch.binding import bind
    from vrscope.arch.families import declared_families

    declared = None if families is None else declared_families(Path(families))
    return bind(checkpoint, declared, bool(approximate))


def read_roles(
    checkpoint: Checkpoint, families: str | Path | None = None
) -> tuple[Mapping[str, TensorRole], str | None]:
    """Return the roles of all tensors and the family's name; without a family, roles read off the names, and None."""
    from vrscope.arch.families import declared_families
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


def read_sample(
    checkpoint: Checkpoint,
    text: str | Path | None,
    tokens: int,
    skip: int = 0,
    flags: tuple[str, str] = ("--text", "--tokens"),
) -> TextSample:
    """Return windows of tokens of a text file, or of vrscope's sample, from token `skip` on; `flags` named both."""
    from vrscope.quant.text import load_text, make_sample

    path = None if text is None else Path(text)
    name = "sample text of vrscope" if path is None else path.name
    return make_sample(load_text(path, flags[0]), checkpoint, tokens, name=name, skip=skip, flags=flags)


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """What a method that calibrates runs the model on: `tokens` of a text from token `skip` on, and where."""

    text: str | Path | None = None
    tokens: int = DEFAULT_TOKENS
    skip: int = 0
    device: str = "auto"
    flags: tuple[str, str] = ("--text", "--tokens")  # what messages call text and tokens

    def sample(self, checkpoint: Checkpoint, method: str) -> TextSample | None:
        """Return the text in windows of tokens; None if the method does not calibrate."""
        from vrscope.rescale.methods import get_method

        if not get_method(method).calibrates:
            return None
        return read_sample(checkpoint, self.text, self.tokens, self.skip, self.flags)


def choose_plan(
    checkpoint: Checkpoint,
    binding: Binding,
    method: str,
    options: MethodOptions,
    on: CalibrationText,
    progress: Progress,
    described: bool = False,
) -> tuple[RescalePlan, Surveys]:
    """Return the plan a method makes and what the weights are like, as they are and, if `described`, with the plan.

    A method that calibrates is given what it needs.
    """
    from vrscope.rescale.methods import get_method
    from vrscope.rescale.planning import make_plan, require_approximate

    require_approximate(get_method(method), options)
    sample = on.sample(checkpoint, method)
    if sample is None:
        return make_plan(checkpoint, binding, method, options, default_executor(), progress, None, described)
    from vrscope.activations.importance import Calibration, calibrate_checkpoint
    from vrscope.quant.loading import release

    keep = get_method(method).tries and options.rounds > 0
    calibration: Calibration | None = None
    try:
        calibration = calibrate_checkpoint(checkpoint, binding.roles, sample, on.device, progress, keep)
        return make_plan(checkpoint, binding, method, options, default_executor(), progress, calibration, described)
    finally:
        calibration = None  # and with it the model
        release()


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


def fill_activations(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    sample: TextSample,
    where: tuple[str, str],
    progress: Progress,
    channels: bool = False,
) -> Filled:
    """Return the tables "activations", "residual", "outlier_dimensions", "experts" of a mixture, and of channels.

    `where` is device and dtype.
    """
    from vrscope.activations import tables as made
    from vrscope.activations.profile import profile_checkpoint

    profile = profile_checkpoint(checkpoint, roles, sample, where, progress)
    tables = {
        "activations": made.input_table(profile),
        "residual": made.residual_table(profile),
        "outlier_dimensions": made.outlier_table(profile),
    }
    columns: Columns = {
        "activations": made.ACTIVATION_COLUMNS,
        "residual": made.RESIDUAL_COLUMNS,
        "outlier_dimensions": made.OUTLIER_COLUMNS,
    }
    if profile.experts:
        tables["experts"], columns["experts"] = made.expert_table(profile), made.EXPERT_COLUMNS
    if channels:
        tables["activation_channels"] = made.channel_table(profile)
        columns["activation_channels"] = made.CHANNEL_ACTIVATION_COLUMNS
    tables["activations"].attrs["notes"] = made.notes(profile)
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
    surveys: Surveys,
    formats: Sequence[Format],
) -> Filled:
    """Return the tables "spaces", "matrices", "unreachable", "reach" and "exponents" of a plan.

    Besides "approximate" if it needs it, and "gains" if its method predicted any.
    """
    from vrscope.rescale import describe, gains
    from vrscope.rescale.bounds import BOUND_COLUMNS, describe_bounds
    from vrscope.rescale.reach import REACH_COLUMNS, reach

    tables = {
        "spaces": describe.describe_spaces(checkpoint, binding, plan, surveys, formats),
        "matrices": describe.describe_matrices(binding, plan, surveys),
        "unreachable": describe.describe_unreachable(binding, plan.scales),
        "reach": reach(checkpoint, binding, plan, formats),
        "exponents": gains.exponent_table(binding, plan),
    }
    columns: Columns = {
        "spaces": describe.SPACE_COLUMNS,
        "matrices": describe.MATRIX_COLUMNS,
        "unreachable": describe.UNREACHABLE_COLUMNS,
        "reach": REACH_COLUMNS,
        "exponents": gains.EXPONENT_COLUMNS,
    }
    if plan.gains:
        tables["gains"], columns["gains"] = gains.gain_table(plan.gains), gains.GAIN_COLUMNS
    if plan.approximate:
        tables["approximate"] = describe_bounds(binding, plan, surveys.before.mean_squares)
        columns["approximate"] = BOUND_COLUMNS
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


def fill_layer_error(
    checkpoints: Mapping[str, Checkpoint],
    roles: Mapping[str, TensorRole],
    formats: Sequence[Format],
    sample: TextSample,
    device: str,
    progress: Progress,
) -> Filled:
    """Return the table "layer_error": how far every layer's output is off in the formats that keep inputs as they are.

    Measured on the first window of the sample.
    """
    import pandas as pd

    from vrscope.activations.output_error import output_errors
    from vrscope.quant.loading import load_model, release, resolve_device
    from vrscope.rescale.gains import LAYER_ERROR_COLUMNS

    entries = [entry for entry in formats if not entry.activations]
    first = replace(sample, windows=sample.windows[:1])
    rows = []
    for label, checkpoint in checkpoints.items():
        loaded = load_model(checkpoint, resolve_device(device), "float32", copies=1)
        found = output_errors(loaded, checkpoint, roles, entries, first, progress)
        del loaded
        release()
        rows += [(name, roles[name].role, roles[name].layer, f, label, error) for (name, f), error in found.items()]
    frame = pd.DataFrame(rows, columns=[column.name for column in LAYER_ERROR_COLUMNS]).astype({"layer": "Int64"})
    return {"layer_error": frame}, {"layer_error": LAYER_ERROR_COLUMNS}


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
