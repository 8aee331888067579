"""Rules of `--fail-on`: a bound on one column of a result, so that a script or a CI job can stop on it.

Grammar: `TABLE.COLUMN OP NUMBER` or `TABLE[COLUMN=TEXT, ...].COLUMN OP NUMBER`, where OP is one of `> >= < <= == !=`.
A rule is broken when at least one row of the table satisfies it; missing values never do.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the rule names."""
        return (self.column, *(name for name, _ in self.where))

    def _require(self, name: str, kind: str, known: Iterable[str]) -> None:
        names = list(known)
        if name not in names:
            message = f"{self.text!r}: no {kind} {name!r} here. Known: {', '.join(names) or 'none'}."
            raise RuleError(message)

    def broken_rows(self, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """Return the rows that satisfy the rule, none if it holds.

        Raises
        ------
        RuleError
            If the table or a column does not exist, or the column does not hold numbers.
        """
        import pandas as pd

        self._require(self.table, "table", tables)
        frame = tables[self.table]
        for column in self.columns:
            self._require(column, "column", frame.columns)
        for name, value in self.where:
            frame = frame[frame[name].astype(str) == value]
        try:
            values = pd.to_numeric(frame[self.column]).astype(float)
        except (ValueError, TypeError) as error:
            message = f"{self.text!r}: column {self.column!r} of table {self.table!r} does not hold numbers."
            raise RuleError(message) from error
        if len(frame) == 0 or values.isna().all():
            message = (
                f"{self.text!r}: no row of table {self.table!r} has a value to compare, so the rule checks nothing."
            )
            raise RuleError(message)
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
    if math.isnan(bound):
        message = f"{text!r}: nothing is larger or smaller than NaN. Write a number."
        raise RuleError(message)
    where = []
    for part in (condition or "").split(",") if condition is not None else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            message = f"{text!r}: {part.strip()!r} is not a condition. Write [COLUMN=TEXT], for example [format=nf4]."
            raise RuleError(message)
        where.append((name, value))
    return Rule(text, table, column, tuple(where), comparison, bound)


def check_names(rule: Rule, tables: Sequence[str]) -> None:
    """Refuse a rule before any work, if it names a table that is not filled or a column that no table has.

    Raises
    ------
    RuleError
        With the names there are.
    """
    rule._require(rule.table, "table", tables)
    for column in rule.columns:
        rule._require(column, "column", _columns(rule.table))


def _columns(table: str) -> list[str]:
    from vrscope.activations.tables import ACTIVATION_COLUMNS, EXPERT_COLUMNS, OUTLIER_COLUMNS, RESIDUAL_COLUMNS
    from vrscope.fragility.correlation import CORRELATION_COLUMNS
    from vrscope.fragility.measure import SENSITIVITY_COLUMNS
    from vrscope.fragility.recipe import SUMMARY_COLUMNS
    from vrscope.quant.metrics import DAMAGE_COLUMNS
    from vrscope.quant.weights import WEIGHT_ERROR_COLUMNS
    from vrscope.rescale.bounds import BOUND_COLUMNS
    from vrscope.rescale.describe import MATRIX_COLUMNS, SPACE_COLUMNS
    from vrscope.rescale.gains import EXPONENT_COLUMNS, GAIN_COLUMNS, LAYER_ERROR_COLUMNS
    from vrscope.rescale.reach import REACH_COLUMNS
    from vrscope.stats.depth_law import DEPTH_LAW_COLUMNS
    from vrscope.stats.measure import SPECTRAL_COLUMNS, TENSOR_COLUMNS
    from vrscope.stats.parts import CHANNEL_COLUMNS, HEAD_COLUMNS

    known = {
        "approximate": BOUND_COLUMNS,
        "activations": ACTIVATION_COLUMNS,
        "channels": CHANNEL_COLUMNS,
        "correlation": CORRELATION_COLUMNS,
        "damage": DAMAGE_COLUMNS,
        "depth_law": DEPTH_LAW_COLUMNS,
        "experts": EXPERT_COLUMNS,
        "exponents": EXPONENT_COLUMNS,
        "gains": GAIN_COLUMNS,
        "heads": HEAD_COLUMNS,
        "layer_error": LAYER_ERROR_COLUMNS,
        "matrices": MATRIX_COLUMNS,
        "outlier_dimensions": OUTLIER_COLUMNS,
        "reach": REACH_COLUMNS,
        "residual": RESIDUAL_COLUMNS,
        "recipe_summary": SUMMARY_COLUMNS,
        "sensitivity": SENSITIVITY_COLUMNS,
        "spaces": SPACE_COLUMNS,
        "tensors": (*TENSOR_COLUMNS, *SPECTRAL_COLUMNS),
        "weight_error": WEIGHT_ERROR_COLUMNS,
    }
    extra = ["checkpoint"] if table == "weight_error" else []
    return extra + [column.name for column in known[table]]
