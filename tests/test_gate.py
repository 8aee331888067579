"""Rules of `--fail-on`: what they match, what they refuse."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from vrscope.gate import RuleError, parse_rule

TABLES = {
    "damage": pd.DataFrame(
        {
            "checkpoint": ["original", "original", "rescaled", "rescaled"],
            "format": ["int8", "nf4", "int8", "nf4"],
            "kl": [0.01, 0.30, 0.02, math.nan],
        }
    ),
    "tensors": pd.DataFrame({"tensor": ["a", "b"], "nan_count": pd.array([0, None], dtype="Int64")}),
}


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("damage.kl>0.02", 1),
        ("damage.kl>=0.02", 2),
        ("damage.kl<0.02", 1),
        ("damage.kl <= 2e-2", 2),
        ("damage.kl==0.3", 1),
        ("damage.kl != 0.3", 2),
        ("damage[format=nf4].kl>0", 1),
        ("damage[checkpoint=rescaled].kl>-inf", 1),
        ("tensors.nan_count>=0", 1),
    ],
)
def test_rows_that_satisfy_the_rule_are_returned_and_missing_values_never_do(rule: str, rows: int) -> None:
    assert len(parse_rule(rule).broken_rows(TABLES)) == rows


@pytest.mark.parametrize(
    "rule",
    ["damage[format=nf44].kl>0", "damage[format=nf4, checkpoint=rescaled].kl>0", "tensors[tensor=b].nan_count>0"],
)
def test_a_rule_that_checks_nothing_is_no_pass(rule: str) -> None:
    with pytest.raises(RuleError, match="checks nothing"):
        parse_rule(rule).broken_rows(TABLES)


@pytest.mark.parametrize(
    "text",
    [
        "damage.kl>nan",
        "",
        "kl>1",
        "damage.kl",
        "damage.kl=>1",
        "damage.kl>one",
        "damage.kl>1 or 2",
        "damage[nf4].kl>1",
        "damage[].kl>1",
    ],
)
def test_what_is_not_a_rule_is_refused(text: str) -> None:
    with pytest.raises(RuleError):
        parse_rule(text)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("harm.kl>1", ["harm", "damage", "tensors"]),
        ("damage.kll>1", ["kll", "checkpoint, format, kl"]),
        ("damage[colour=red].kl>1", ["colour", "checkpoint, format, kl"]),
        ("damage.format>1", ["format", "numbers"]),
    ],
)
def test_a_name_that_the_result_does_not_have_is_an_error_that_lists_what_it_has(rule: str, words: list[str]) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rule(rule).broken_rows(TABLES)
    assert all(word in str(caught.value) for word in words)
