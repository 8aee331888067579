"""Runs the command line: `python -m vrscope` and the `vrscope` program."""

from __future__ import annotations

import sys

from vrscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
