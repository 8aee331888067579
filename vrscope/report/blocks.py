"""What a page is made of: sections of tables, figures, paragraphs, lists, and the table of all tensors.

These are plain values without HTML. The section modules fill them from result tables, and the templates draw them; each
block names its own kind, and the template has one branch per kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a column: its label, unit and one-sentence meaning; `name` is the column's name in the results."""

    label: str
    unit: str = ""
    meaning: str = ""
    numeric: bool = False
    name: str = ""
    essential: bool = True

    @property
    def tooltip(self) -> str:
        """Return unit and meaning as one line."""
        unit = f"Unit: {self.unit}. " if self.unit else ""
        return f"{unit}{self.meaning}".strip()


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: text, look ("", "num", "name", "words", "good", "bad", "muted"), rows spanned, series mark, note."""

    text: str
    look: str = ""
    span: int = 1
    swatch: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption, seen if `titled`, else only heard; folded away behind `fold` if that is given."""

    kind: ClassVar[str] = "table"
    caption: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    fold: str = ""
    titled: bool = True


@dataclass(frozen=True, slots=True)
class Swatch:
    """One entry of a legend: a CSS colour variable, its look ("box", "line", "dash", "dot") and what it stands for."""

    colour: str
    look: str
    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One drawing: SVG markup that is safe to embed, a title, and what a reader who cannot see it should know."""

    svg: str
    title: str
    label: str
    detail: str = ""
    hover: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Drawings that belong together under one title and legend; `small` ones stand beside each other."""

    kind: ClassVar[str] = "figures"
    items: tuple[Figure, ...]
    legend: tuple[Swatch, ...] = ()
    small: bool = False
    note: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Points:
    """A short list: each point with the words it starts with, set in bold, and the rest of its sentence."""

    kind: ClassVar[str] = "points"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Explorer:
    """The sortable, searchable table; its rows travel as data under `key` in the page's payload.

    `name_length` is the length of its longest name, in characters.
    """

    kind: ClassVar[str] = "explorer"
    key: str
    caption: str
    heads: tuple[Head, ...]
    count: int
    name_length: int


Block = Table | Figures | Text | Points | Explorer


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page, with the one or two sentences that say what is seen, and the data its script needs."""

    id: str
    title: str
    lead: str
    blocks: tuple[Block, ...]
    payload: Mapping[str, Any] = field(default_factory=dict)
