"""Runs the command line: `python -m vrscope` and the `vrscope` program."""

from __future__ import annotations

import os
import sys

from vrscope.cli import main

# Idle threads of torch sleep. By default they spin, and where other programs need the cores as well, every small
# operation then waits for the system to take the core from a spinning thread: runs take many times as long. Read when
# torch is imported, which the commands do themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if __name__ == "__main__":
    sys.exit(main())
