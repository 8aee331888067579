"""Loops compiled by numba: how they are compiled, and telling of it where that takes seconds.

Compiled code is kept on disk per machine: beside the package, in the user's cache, or wherever `NUMBA_CACHE_DIR` says.
Where no folder can be written, every process compiles anew. Of the two ways to keep it, `compiled` is numba's own and
takes any function; `standalone` is for loops that short commands run, and does without numba from the second time on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, update_wrapper
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vrscope.object_code import Kinds, build, described, is_kept, is_unchanged, load, remember

if TYPE_CHECKING:
    from vrscope.progress import Progress

Function = TypeVar("Function", bound=Callable[..., object])
STAGE = "compiling loops, once per machine"
_FINDING = Lock()


def compiled(function: Function, **options: Any) -> Function:
    """Return `function` compiled for every type of argument at its first call; it releases the interpreter lock.

    Parameters
    ----------
    function
        Python that numba understands.
    options
        Of `numba.njit`, for example which rules of floating point may be bent.
    """
    return cast(Function, _by_numba(function, options, keep=True))


def _by_numba(function: Callable[..., object], options: dict[str, Any], keep: bool) -> Any:
    """Return what numba makes of a function; with `keep` on disk, if a folder of this machine can be written."""
    import numba

    options = {"nogil": True, "error_model": "numpy", **options}
    if keep:
        with suppress(RuntimeError):
            return numba.njit(cache=True, **options)(function)
    return numba.njit(**options)(function)


def standalone(function: Function, **options: Any) -> Function:
    """Return `function` compiled as by `compiled`, and run without numba where its object code is on disk.

    Parameters
    ----------
    function
        Python that numba understands. Such functions may call each other within one file, and are then compiled into
        one. What object code qualifies, `vrscope.object_code` says; other arguments are left to numba.
    options
        As of `compiled`.
    """
    return cast(Function, _Standalone(function, options))


class _Standalone:
    """A loop that is loaded as object code for each kind of arguments it is given."""

    def __init__(self, function: Callable[..., object], options: dict[str, Any]) -> None:
        update_wrapper(self, function)
        remember(function)
        self._function = function
        self._options = options
        self._known: dict[object, Callable[..., Any] | None] = {}  # None: numba's own is called

    def __call__(self, *arguments: Any) -> Any:
        kinds, words = described(arguments)
        native = self._known[kinds] if kinds in self._known else self._find(kinds)
        return self.numba(*arguments) if native is None else native(*words)

    @cached_property
    def numba(self) -> Any:
        """What numba makes of the function."""
        # numba takes the file as it is now for that of the function
        return _by_numba(self._function, self._options, keep=is_unchanged(self._function))

    @property
    def _numba_type_(self) -> Any:
        """What numba takes this for in a loop that calls it."""
        return self.numba._numba_type_

    def on_disk(self) -> bool:
        """Return whether object code of it is kept."""
        return is_kept(self._function)

    def _find(self, kinds: Kinds | None) -> Callable[..., Any] | None:
        """Return the object code for arguments of these kinds, made if need be."""
        with _FINDING:  # no piece may be loaded twice
            if kinds not in self._known:
                native = None if kinds is None else load(self._function, self._options, kinds)
                if native is None and kinds is not None and hasattr(self.numba, "overloads"):  # it compiles
                    native = build(self._function, self.numba, self._options, kinds)
                self._known[kinds] = native
            return self._known[kinds]


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
    if isinstance(function, _Standalone):
        return function.on_disk()
    folder = getattr(getattr(function, "stats", None), "cache_path", None)
    return folder is not None and any(Path(folder).glob(f"*.{function.__name__}-*.nbi"))
