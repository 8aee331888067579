"""Where numbers come from: versions, machine and date, so that a report can be repeated."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy", "scipy", "numba", "pandas")


def provenance(seconds: float, **facts: Any) -> dict[str, Any]:
    """Return `facts` with the versions of everything that computes, the machine, and the time it took."""
    from vrscope import __version__

    return {
        **facts,
        "vrscope": __version__,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def command_line(name: str, sources: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Return the command that does the same as a call: options that are None or False are left out."""
    words = ["vrscope", name, *(str(source) for source in sources)]
    for key, value in options.items():
        flag = "-o" if key == "out" else f"--{key.replace('_', '-')}"
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join(words)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the processor's name; Linux tells it only in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or "unknown processor"  # the second starts a program, so it is asked second
