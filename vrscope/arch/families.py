"""The declared families: those that ship with vrscope, and a user's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vrscope.arch.flow import Family, read_families

FAMILIES_FILE = Path(__file__).with_name("families.toml")


@cache
def families() -> tuple[Family, ...]:
    """Return the families that ship with vrscope."""
    return read_families(FAMILIES_FILE)


@cache
def families_for(model_type: str) -> tuple[Family, ...]:
    """Return the families that ship with vrscope for one kind of model, which are few."""
    return read_families(FAMILIES_FILE, model_type=model_type)


def declared_families(file: Path) -> tuple[Family, ...]:
    """Return the families of a user's own TOML file, and the shipped ones after them.

    Raises
    ------
    FamilyError
        If the file does not hold declarations.
    """
    return read_families(file, FAMILIES_FILE)
