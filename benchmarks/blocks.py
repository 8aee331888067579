"""NF4 and FP4 on the CPU: bitsandbytes against vrscope's loops on one matrix, in alternation; prints JSON.

    python benchmarks/blocks.py [MEGABYTES] [ROUNDS]

Bytes count as bfloat16, two per weight. bitsandbytes uses torch's threads, vrscope one thread per slab of rows.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from vrscope.executors import default_executor
from vrscope.quant.formats import get_format


def main() -> None:
    """Measure both engines and check that they agree in every element."""
    megabytes, rounds = (int(text) for text in (*sys.argv[1:], "64", "3")[:2])
    weight = torch.randn(megabytes * 512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    rates: dict[str, list[float]] = {}
    for name in ("nf4", "fp4"):
        entry = get_format(name)
        slabs = list(weight.split(1024))
        for number in range(rounds + 1):  # the first round warms up: it compiles, and is given its memory by the system
            started = time.perf_counter()
            theirs = [entry.by_engine(slab) for slab in slabs]
            middle = time.perf_counter()
            ours = list(default_executor().map(entry.roundtrip, slabs))
            ended = time.perf_counter()
            if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
                sys.exit(f"{name}: the two differ")
            if number == 0:
                continue
            size = 2 * weight.numel()
            rates.setdefault(f"bitsandbytes {name}", []).append(size / (middle - started))
            rates.setdefault(f"vrscope {name}", []).append(size / (ended - middle))
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
