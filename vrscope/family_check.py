"""Does a declaration hold for a checkpoint? Bind it, scale every space at random, and run the model before and after.

A wrong declaration binds and rescales without complaint; only numbers show it. If the outputs differ in a bit, the
spaces are scaled again one kind at a time (a kind is the same space in every layer), and those that break are named.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vrscope import stages
from vrscope.arch.binding import Binding
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.errors import VerificationError
from vrscope.executors import default_executor
from vrscope.progress import Progress
from vrscope.quant.model import LogitComparison, compare_logits
from vrscope.quant.text import TextSample
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.plan import BIT_EQUAL
from vrscope.rescale.planning import make_plan

SEED = 0
TOKENS = 64


def random_tokens(vocabulary: int) -> TextSample:
    """Return one window of token ids drawn evenly; enough to run a model that has no tokenizer."""
    import numpy as np

    ids = np.random.default_rng(SEED).integers(0, vocabulary, TOKENS)
    return TextSample(f"random tokens, seed {SEED}", (tuple(int(number) for number in ids),), TOKENS, (0, 0))


def check_family(
    checkpoint: Checkpoint, binding: Binding, *, device: str, progress: Progress
) -> list[tuple[str, str, str]]:
    """Return rows `(check, result, detail)` of the table "proof".

    Raises
    ------
    VerificationError
        If powers of two change the outputs; the message names the kinds of spaces that do.
    ModelError
        If transformers cannot build or run the model.
    """
    plan, _ = make_plan(checkpoint, binding, "random", MethodOptions(seed=SEED), default_executor(), progress)
    sample = random_tokens(_vocabulary(checkpoint))
    kinds: dict[str, list[str]] = defaultdict(list)
    for space in binding.spaces:
        if space.name in plan.spaces:
            kinds[f"{space.rule} ({re.sub(r'[.][0-9]+(?=[.:])', '.*', space.name)})"].append(space.name)
    with tempfile.TemporaryDirectory(prefix="vrscope-") as folder:
        out = Path(folder) / "rescaled"

        def compared(names: list[str], dtype: str) -> LogitComparison:
            part = replace(plan, spaces={name: plan.spaces[name] for name in names})
            apply_plan(checkpoint, binding, part, out, force=True, progress=progress)
            return compare_logits(checkpoint, open_checkpoint(out), sample, device=device, dtype=dtype)

        rows = [
            ("binding", "fits", f"family {binding.family!r} claims all {len(checkpoint.tensors):,} tensors"),
            ("spaces", f"{len(binding.spaces)} free", _counted(kinds)),
        ]
        for dtype in ("float32", "bfloat16"):
            found = compared(list(plan.spaces), dtype)
            if not found.bit_equal:
                raise VerificationError(_broken(binding, kinds, lambda names: compared(names, "float32"), found))
            detail = f"{plan.changed:,} random powers of two on all spaces at once; {found.tokens} random tokens"
            rows.append((f"outputs, {dtype}", BIT_EQUAL, detail))
    rows.append(stages.weight_proof(checkpoint, plan))
    return rows


def _vocabulary(checkpoint: Checkpoint) -> int:
    size = checkpoint.config.get("vocab_size")
    return int(size) if isinstance(size, int) and size > 0 else 2


def _counted(kinds: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(names)} x {kind}" for kind, names in kinds.items()) or "none"


def _broken(
    binding: Binding,
    kinds: dict[str, list[str]],
    compared: Callable[[list[str]], LogitComparison],
    found: LogitComparison,
) -> str:
    """Return the message that names every kind of space whose scales alone change the outputs."""
    wrong = []
    for kind, names in kinds.items():
        alone = compared(names)
        if not alone.bit_equal:
            wrong.append(f"{kind}, by up to {alone.max_abs_difference:.3g}")
    culprits = "; ".join(wrong) or "none of them alone, so it is the way they act together"
    return (
        f"family {binding.family!r}: expected bit-equal outputs under powers of two, found a difference of "
        f"{found.max_abs_difference:.3g} in {found.dtype}. Spaces that change them: {culprits}. Compare the lines "
        "of the declaration that write and read these spaces with the model's source."
    )
