"""Runs the command line as a process: `python -m vrscope` and the `vrscope` program."""

from __future__ import annotations

import gc
import os
import sys

# Idle threads of torch sleep. By default they spin, and where other programs need the cores as well, every small
# operation then waits for the system to take the core from a spinning thread: runs take many times as long. Read when
# torch is imported, which the commands do themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> int:
    """Run the command that the process was started with and return its exit status, to end the process with."""
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
