"""Does a declaration hold for a checkpoint? Bind it, scale every space at random, and run the model before and after.

A wrong declaration binds and rescales without complaint; only numbers show it. If the outputs differ in a bit, the
spaces are scaled again one kind at a time (a kind is the same space in every layer), and those that break are named.
Approximate spaces are tried on a model whose norms add no eps: what they undo up to eps, they then undo to the bit.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from vrscope import proof
from vrscope.arch.binding import Binding
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.errors import VerificationError
from vrscope.executors import default_executor
from vrscope.progress import Progress
from vrscope.quant.model import LogitComparison, compare_logits
from vrscope.quant.text import TextSample
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.plan import BIT_EQUAL, UP_TO_EPS, RescalePlan
from vrscope.rescale.planning import make_plan

SEED = 0
TOKENS = 64


def random_tokens(vocabulary: int) -> TextSample:
    """Return one window of token ids drawn evenly; enough to run a model that has no tokenizer."""
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
    options = MethodOptions(seed=SEED, approximate=any(space.limit for space in binding.spaces))
    plan, _ = make_plan(checkpoint, binding, "random", options, default_executor(), progress)
    sample = random_tokens(_vocabulary(checkpoint))
    exact, limited = (_kinds(binding, plan, limited=which) for which in (False, True))
    with tempfile.TemporaryDirectory(prefix="vrscope-") as folder:
        out = Path(folder) / "rescaled"

        def compared(names: Iterable[str], dtype: str, *, eps: bool = True) -> LogitComparison:
            apply_plan(checkpoint, binding, plan.only(names), out, force=True, progress=progress)
            return compare_logits(checkpoint, open_checkpoint(out), sample, device=device, dtype=dtype, eps=eps)

        spaces = sum(space.limit is None for space in binding.spaces)
        rows = [
            ("binding", "fits", f"family {binding.family!r} claims all {len(checkpoint.tensors):,} tensors"),
            ("spaces", f"{spaces} free", _counted(exact)),
        ]
        for dtype in ("float32", "bfloat16"):
            found = compared(_names(exact), dtype)
            if not found.bit_equal:
                raise VerificationError(_broken(binding, exact, lambda names: compared(names, "float32"), found))
            changed = plan.only(_names(exact)).changed
            detail = f"{changed:,} random powers of two and signs on all spaces at once; {found.tokens} random tokens"
            rows.append((f"outputs, {dtype}", BIT_EQUAL, detail))
        if limited:
            rows += _check_limited(binding, limited, compared)
    rows.append(proof.weight_proof(checkpoint, plan))
    return rows


def _kinds(binding: Binding, plan: RescalePlan, *, limited: bool) -> dict[str, list[str]]:
    """Return the exact or the approximate spaces of a plan by kind: rule, and name without layer numbers."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for space in binding.spaces:
        if space.name in plan.spaces and (space.limit is not None) == limited:
            kinds[f"{space.rule} ({re.sub(r'[.][0-9]+(?=[.:])', '.*', space.name)})"].append(space.name)
    return kinds


def _names(kinds: Mapping[str, list[str]]) -> list[str]:
    return [name for names in kinds.values() for name in names]


def _check_limited(
    binding: Binding, kinds: dict[str, list[str]], compared: Callable[..., LogitComparison]
) -> list[tuple[str, str, str]]:
    """Return the rows for approximate spaces: without eps to the bit, with eps the difference that it makes."""
    found = compared(_names(kinds), "float32", eps=False)
    if not found.bit_equal:
        raise VerificationError(_broken(binding, kinds, lambda names: compared(names, "float32", eps=False), found))
    shipped = compared(_names(kinds), "float32")
    difference = f"differ by up to {shipped.max_abs_difference:.3g} ({shipped.relative:.2g} of the largest)"
    return [
        ("approximate spaces", f"{len(_names(kinds))} free", _counted(kinds)),
        ("outputs, float32, eps = 0", BIT_EQUAL, f"all of them grown at random; {found.tokens} random tokens"),
        ("outputs, float32, eps as it is", UP_TO_EPS, f"outputs {difference}"),
    ]


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
