"""Proofs that two checkpoints are one function: which plan joins them, what it promises, and both run on text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import VerificationError
from vrscope.progress import Progress
from vrscope.stages import Filled, bind_checkpoint, read_plan
from vrscope.tables import Column

if TYPE_CHECKING:
    from vrscope.quant.text import TextSample
    from vrscope.rescale.plan import RescalePlan

EPS_TOLERANCE = 1e-2  # of the largest output; a wrong declaration changes more, an eps that matters may as well
PROOF_COLUMNS = (
    Column("check", "", "What was compared."),
    Column("result", "", "bit-equal, equal up to rounding, equal up to eps, or not equivalent."),
    Column("detail", "", "Over how much, and the largest difference."),
)


def fill_proof(rows: Sequence[tuple[str, str, str]]) -> Filled:
    """Return the table "proof" of rows `(check, result, detail)`."""
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=[column.name for column in PROOF_COLUMNS])
    return {"proof": frame}, {"proof": PROOF_COLUMNS}


def weight_proof(checkpoint: Checkpoint, plan: RescalePlan) -> tuple[str, str, str]:
    """Return the row of the table "proof" for a copy whose weights were proved."""
    from vrscope.rescale.plan import NOT_EQUIVALENT, POW2, UP_TO_EPS

    count = sum(info.numel for info in checkpoint.tensors.values())
    how = "is the original times the recorded factors, rounded once"
    if plan.equivalent == NOT_EQUIVALENT:
        how = "follows the raw TVR formula, which is not function-preserving"
    elif plan.scales == POW2:
        how = "is the original times the recorded power of two and sign, exactly"
    if plan.equivalent == UP_TO_EPS:
        how += f"; {len(plan.approximate)} of {len(plan.spaces)} spaces feed norms that undo their scale up to eps"
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
        If the plan promises equal bits and the outputs differ in one, or promises them up to eps and in float32 they
        differ by more than `EPS_TOLERANCE` of the largest output.
    """
    from vrscope.quant.model import compare_logits
    from vrscope.rescale.plan import BIT_EQUAL, UP_TO_EPS

    device, dtype = where
    found = compare_logits(*pair, sample, device=device, dtype=dtype, progress=progress)
    if plan.equivalent == BIT_EQUAL and not found.bit_equal:
        message = (
            f"logits in {dtype}: expected bit-equal outputs for powers of two, found a difference of "
            f"{found.max_abs_difference:.3g} on {found.tokens} tokens. The declaration of family {plan.family!r} is "
            "wrong for this checkpoint; do not use the rescaled one, and please report it."
        )
        raise VerificationError(message)
    if plan.equivalent == UP_TO_EPS and dtype == "float32" and not found.relative <= EPS_TOLERANCE:
        message = (
            f"logits in {dtype}: expected outputs equal up to eps, found a difference of {found.relative:.3g} of the "
            f"largest output on {found.tokens} tokens. Eps matters to this model, or the declaration of family "
            f"{plan.family!r} is wrong for it; rescale without --approximate."
        )
        raise VerificationError(message)
    detail = f"outputs on {found.tokens:,} tokens in {dtype} " + (
        "agree in every bit"
        if found.bit_equal
        else f"differ by up to {found.max_abs_difference:.3g} ({found.relative:.2g} of the largest)"
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
