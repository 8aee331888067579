"""NF4 and FP4 on the CPU: bitsandbytes against vrscope's loops on one matrix, in alternation; prints JSON.

    python benchmarks/blocks.py [MEGABYTES] [ROUNDS]

Bytes count as bfloat16, two per weight. bitsandbytes uses torch's threads, vrscope one thread per slab of rows. Both
make a new result for each slab and drop it before the next, so that both write to memory they had before: what the
system takes to hand out new memory is in neither rate. vrscope goes over the matrix several times, to run about as
long.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from vrscope.executors import default_executor
from vrscope.quant.formats import Format, get_format

PASSES = 8  # of vrscope a round


def main() -> None:
    """Measure both engines and check that they agree in every element."""
    megabytes, rounds = (int(text) for text in (*sys.argv[1:], "64", "3")[:2])
    weight = torch.randn(megabytes * 512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    slabs = list(weight.split(1024))
    rates: dict[str, list[float]] = {}
    for name in ("nf4", "fp4"):
        entry = get_format(name)
        if not all(torch.equal(entry.roundtrip(slab), entry.by_engine(slab)) for slab in slabs):  # compiles as well
            sys.exit(f"{name}: the two differ")
        engines = {"bitsandbytes": partial(_theirs, entry, slabs), "vrscope": partial(_ours, entry, slabs)}
        for number in range(rounds + 1):  # the first round warms up
            for engine, run in engines.items():
                rate = 2 * weight.numel() / _seconds(run)
                if number:
                    rates.setdefault(f"{engine} {name}", []).append(rate)
    print(json.dumps(rates))


def _theirs(entry: Format, slabs: list[torch.Tensor]) -> int:
    for slab in slabs:
        entry.by_engine(slab)
    return 1


def _ours(entry: Format, slabs: list[torch.Tensor]) -> int:
    def work(slab: torch.Tensor) -> None:
        entry.roundtrip(slab)

    for _ in default_executor().map(work, slabs * PASSES):
        pass
    return PASSES


def _seconds(run: Callable[[], int]) -> float:
    """Return the seconds of one pass; `run` returns how many it makes."""
    started = time.perf_counter()
    passes = run()
    return (time.perf_counter() - started) / passes


if __name__ == "__main__":
    main()
