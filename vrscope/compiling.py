"""Loops compiled by numba: how they are compiled, and telling of it where that takes seconds.

Compiled code is kept on disk per machine: beside the package, in the user's cache, or wherever `NUMBA_CACHE_DIR` says.
Where no folder can be written, every process compiles anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from vrscope.progress import Progress

Function = TypeVar("Function", bound=Callable[..., object])
STAGE = "compiling loops, once per machine"


def compiled(function: Function, **options: Any) -> Function:
    """Return `function` compiled for every type of argument at its first call; it releases the interpreter lock.

    Parameters
    ----------
    function
        Python that numba understands.
    options
        Of `numba.njit`, for example which rules of floating point may be bent.
    """
    import numba

    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder of this machine can be written
        return cast(Function, numba.njit(**options)(function))


def rehearse(probe: Any, steps: Sequence[Callable[[], object]], progress: Progress) -> None:
    """Compile what `steps` call, telling `progress`; if this machine has compiled `probe` before, load it in silence.

    Threads that start after it find every loop ready, and do not wait for each other to load it.

    Parameters
    ----------
    probe
        A compiled function; the others are taken to be compiled if it is.
    steps
        Each calls some compiled functions with small arguments.
    progress
        Told of the steps.
    """
    if _on_disk(probe):
        for step in steps:
            step()
        return
    for number, step in enumerate(steps):
        progress(STAGE, number, len(steps), "steps")
        step()
    progress(STAGE, len(steps), len(steps), "steps")


def _on_disk(function: Any) -> bool:
    """Return whether compiled code of a function is kept; false where numba does not tell."""
    folder = getattr(getattr(function, "stats", None), "cache_path", None)
    return folder is not None and any(Path(folder).glob(f"*.{function.__name__}-*.nbi"))
