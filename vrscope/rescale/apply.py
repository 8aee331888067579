"""Write the rescaled checkpoint: streamed, proved against its source, and only then put in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vrscope.arch.binding import Binding
from vrscope.checkpoint.room import Room
from vrscope.checkpoint.source import Checkpoint, StoredBlock, TensorInfo
from vrscope.checkpoint.writer import rewrite
from vrscope.compiling import rehearse
from vrscope.progress import Progress
from vrscope.rescale.fitting import check_plan
from vrscope.rescale.plan import PLAN_FILE, POW2, RescalePlan
from vrscope.rescale.scaling import require_finite, scaled_bits, tensor_scales
from vrscope.rescale.verify import BlockProof, rehearsal, require_same_shape
from vrscope.tables import write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def apply_plan(
    checkpoint: Checkpoint,
    binding: Binding,
    plan: RescalePlan,
    out: Path,
    *,
    force: bool,
    progress: Progress,
    accept: Callable[[Checkpoint], None] | None = None,
) -> RescalePlan:
    """Write `checkpoint` rescaled by `plan` to the folder `out`, and return the plan with the result's fingerprint.

    The copy is proved tensor by tensor before it takes its place; `accept` may look at it then and raise to reject it.
    If anything fails, nothing is left behind.

    Raises
    ------
    PlanError
        If the plan is for another checkpoint, or would leave the range of a stored type.
    CheckpointError
        If a weight is NaN or infinite.
    VerificationError
        If the written copy is not the source times the recorded scales.
    OutputError
        If `out` cannot be written, or must not be.
    """
    fingerprint = checkpoint.fingerprint()
    check_plan(plan, binding, fingerprint, checkpoint.name)
    scales = tensor_scales(binding, plan)
    done = replace(plan, source=fingerprint)
    if plan.scales == POW2:
        from vrscope.rescale.kernels import largest_pattern

        dtypes = {info.dtype for info in checkpoint.tensors.values() if info.is_float}
        rehearse(largest_pattern, [partial(rehearsal, dtype) for dtype in sorted(dtypes)], progress)
    rooms = Room(), Room()  # each thread writes a block or proves one, so both are done in the same memory

    def transform(info: TensorInfo, block: StoredBlock) -> NDArray[np.unsignedinteger]:
        scale = scales.get(info.name)
        if scale is None:
            require_finite(info, block)
            return block.bits
        return scaled_bits(info, block, scale, rooms[1])

    def proof(copy: Checkpoint) -> None:
        nonlocal done
        require_same_shape(checkpoint, copy)
        done = replace(done, result=copy.fingerprint())
        write_text(copy.folder / PLAN_FILE, done.to_json())
        if accept is not None:
            accept(copy)

    rewrite(
        checkpoint,
        out,
        transform,
        extra={PLAN_FILE: done.to_json()},
        force=force,
        prove=proof,
        progress=progress,
        prove_block=BlockProof(checkpoint, tensor_scales(binding, done), rooms),  # derived anew, not those applied
        room=rooms[0],
    )
    return done
