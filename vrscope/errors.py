"""The errors a caller may want to catch; every message says where, what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VrscopeError(Exception):
    """Anything vrscope refuses to do; the command line prints its one line and exits 1."""


class CheckpointError(VrscopeError):
    """A checkpoint that cannot be found, read or trusted."""


class OutputError(VrscopeError):
    """A place that cannot be written, or must not be overwritten."""


class FamilyError(VrscopeError):
    """A declaration that is wrong, or a checkpoint that no declaration fits."""


class PlanError(VrscopeError):
    """A plan that does not belong to this checkpoint, or cannot be applied exactly."""


class VerificationError(VrscopeError):
    """Two checkpoints that should be the same function and are not."""


class TextError(VrscopeError):
    """Text that cannot be used for measuring: missing, empty, too short, not UTF-8."""


class ModelError(VrscopeError):
    """A model that cannot be built or run."""


class UnknownNameError(VrscopeError):
    """A name that is not in one of the tables."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Say which `kind` of name is unknown, the nearest known one, and all of them."""
        names = list(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return cls(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
