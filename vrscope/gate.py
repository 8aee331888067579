"""Rules of `--fail-on`: a bound on one column of a result, so that a script or a CI job can stop on it.

Grammar: `TABLE.COLUMN OP NUMBER` or `TABLE[COLUMN=TEXT, ...].COLUMN OP NUMBER`, where OP is one of `> >= < <= == !=`.
A rule is broken when at least one row of the table satisfies it; missing values never do.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_OPERATORS: Mapping[str, Callable[[pd.Series, float], pd.Series]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_SHAPE = re.compile(r"\s*(\w+)\s*(?:\[(.*)\])?\s*\.\s*(\w+)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


class RuleError(ValueError):
    """A rule that cannot be read, or that names what the result does not have; a usage error on the command line."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of `--fail-on`.

    Attributes
    ----------
    text
        The rule as it was typed.
    table, column
        What it looks at.
    where
        Pairs of column and text: only rows that hold these texts count.
    comparison
        One of `> >= < <= == !=`.
    bound
        The number compared with, in the unit of the column.
    """

    text: str
    table: str
    column: str
    where: tuple[tuple[str, str], ...]
    comparison: str
    bound: float

    def broken_rows(self, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """Return the rows that satisfy the rule, none if it holds.

        Raises
        ------
        RuleError
            If the table or a column does not exist, or the column does not hold numbers.
        """
        import pandas as pd

        if self.table not in tables:
            message = f"{self.text!r}: there is no table {self.table!r} here. Tables: {', '.join(tables) or 'none'}."
            raise RuleError(message)
        frame = tables[self.table]
        for column in (self.column, *(name for name, _ in self.where)):
            if column not in frame.columns:
                message = f"{self.text!r}: table {self.table!r} has no column {column!r}. Columns: " + ", ".join(
                    map(str, frame.columns)
                )
                raise RuleError(message)
        for name, value in self.where:
            frame = frame[frame[name].astype(str) == value]
        try:
            values = pd.to_numeric(frame[self.column]).astype(float)
        except (ValueError, TypeError) as error:
            message = f"{self.text!r}: column {self.column!r} of table {self.table!r} does not hold numbers."
            raise RuleError(message) from error
        return frame[_OPERATORS[self.comparison](values, self.bound) & values.notna()]


def parse_rule(text: str) -> Rule:
    """Return the rule that `text` spells.

    Raises
    ------
    RuleError
        If it does not follow the grammar.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        message = f"{text!r} is not a rule. Write TABLE.COLUMN OP NUMBER, for example tensors.nan_count>0."
        raise RuleError(message)
    table, condition, column, comparison, number = match.groups()
    try:
        bound = float(number)
    except ValueError as error:
        message = f"{text!r}: {number!r} is not a number."
        raise RuleError(message) from error
    where = []
    for part in (condition or "").split(",") if condition is not None else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            message = f"{text!r}: {part.strip()!r} is not a condition. Write [COLUMN=TEXT], for example [format=nf4]."
            raise RuleError(message)
        where.append((name, value))
    return Rule(text, table, column, tuple(where), comparison, bound)
