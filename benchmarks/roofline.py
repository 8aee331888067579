"""What reading a checkpoint from memory costs at least on this machine; prints seconds, start-up left out.

    python benchmarks/roofline.py sum FOLDER     # adds up every 8 bytes of the files where they lie, on all cores
    python benchmarks/roofline.py copy FOLDER    # copies the files into one 4 MiB buffer per core, and looks at nothing

`sum` is the pure-read pass that others are compared with: the files are mapped, so each byte comes from memory once and
is used. `copy` writes into buffers that stay in the cores' caches; its rate says what reading files costs, not memory.
Each runs twice, and the second pass counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

from vrscope.executors import default_executor

PART, BUFFER = 64 << 20, 4 << 20


@numba.njit(nogil=True)
def _add(words: np.ndarray) -> np.uint64:
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total


def summing(paths: list[Path]) -> Callable[[], int]:
    """Return a pass that adds up all words of the files, in one page-cache mapping."""
    maps = [np.memmap(path, np.uint8, "r") for path in paths]
    words = [data[: data.size // 8 * 8].view(np.uint64) for data in maps]
    step = PART // 8
    parts = [data[first : first + step] for data in words for first in range(0, data.size, step)]
    _add(np.zeros(8, np.uint64))
    return lambda: sum(map(int, default_executor().map(_add, parts)))


def copying(paths: list[Path]) -> Callable[[], int]:
    """Return a pass that reads the files into small buffers."""
    parts = [(path, first) for path in paths for first in range(0, path.stat().st_size, PART)]

    def read(part: tuple[Path, int]) -> int:
        path, first = part
        buffer, done = bytearray(BUFFER), 0
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            while done < PART and (count := file.readinto(buffer)):
                done += count
        return done

    return lambda: sum(default_executor().map(read, parts))


def main() -> None:
    """Run one kind of pass twice and print how long the second took."""
    kind, folder = sys.argv[1:]
    once = {"sum": summing, "copy": copying}[kind](sorted(Path(folder).glob("*.safetensors")))
    first = once()
    started = time.perf_counter()
    second = once()
    seconds = time.perf_counter() - started
    if first != second:
        sys.exit("the files were changed while they were read")
    print(seconds)


if __name__ == "__main__":
    main()
