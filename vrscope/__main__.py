"""Runs the command line as a process: `python -m vrscope` and the `vrscope` program."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys

# Idle threads of torch sleep. By default they spin, and where other programs need the cores as well, every small
# operation then waits for the system to take the core from a spinning thread: runs take many times as long. Read when
# torch is imported, which the commands do themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# They look for work for some tenth of a millisecond before: in a pass through a model the next operation is that near,
# and waking them takes a tenth of its time.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# The same of the threads of numpy and scipy: 2^4 instead of 2^26 turns, before which some of them have no work at all.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


_MOST = 2047 << 20  # the limits are C integers
_TRIM, _MMAP = -1, -3  # what glibc's malloc.h calls M_TRIM_THRESHOLD and M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have blocks of memory reused when they are freed, rather than returned to the system and asked for again.

    Each return costs a page fault per 4 kB, thousands a second in the loops over blocks, and many in every pass
    through a model; in a virtual machine that gives free memory back to its host they cost several times as much. An
    eighth of the machine's memory stays, but no less than 128 MB and no more than 2 GB. Other C libraries have no such
    limits, and what the user chose by environment variables stays.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
        mallopt = ctypes.CDLL(None).mallopt
        kept = max(128 << 20, min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8, _MOST))
        if not mallopt(_MMAP, kept // 2):
            mallopt(_MMAP, 32 << 20)  # the most that older versions take
        mallopt(_TRIM, kept)


def main() -> int:
    """Run the command that the process was started with and return its exit status, to end the process with."""
    keep_freed_memory()
    gc.disable()  # until the work begins (`console.Starting`): all that start-up makes stays, and it makes very much
    try:
        from vrscope import cli  # here, so that an interrupt while this is imported is one line too

        return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("vrscope: interrupted\n")
        return 130
    finally:
        gc.freeze()  # else the interpreter takes a second at its end to look through what torch left
        exec("")  # CPython ends by the signal, not with 130, if the last code text it ran was interrupted


if __name__ == "__main__":
    sys.exit(main())
