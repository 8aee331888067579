"""The tables of gains and exponents, and that rules and CSV files know them."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import save_tiny

from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.gate import RuleError, check_names, parse_rule
from vrscope.rescale.gains import EXPONENT_COLUMNS, GAIN_COLUMNS, LAYER_ERROR_COLUMNS, exponent_table, gain_table
from vrscope.rescale.plan import RescalePlan
from vrscope.saving import CSV_TABLES
from vrscope.shown import gains_by_rule


def test_removed_share_is_computed_and_missing_values_stay_missing() -> None:
    rows = [
        {"space": "l.0:v", "rule": "v.o", "layer": 0, "format": "nf4", "damage_before": 0.4, "damage_after": 0.1},
        {"space": "l.0:q", "rule": "q.k", "layer": None, "format": "nf4", "damage_before": 0.0, "damage_after": 0.0},
        {"space": "l.1:v", "rule": "v.o", "layer": 1, "format": "nf4", "damage_before": 0.1, "damage_after": 0.2},
    ]
    frame = gain_table(rows)
    assert list(frame.columns) == [column.name for column in GAIN_COLUMNS]
    assert frame["removed_share"].tolist()[::2] == pytest.approx([0.75, -1.0])
    assert np.isnan(frame["removed_share"][1]) and frame["layer"].isna().tolist() == [False, True, False]
    assert list(gain_table([]).columns) == list(frame.columns)


def test_by_rule_sums_damage_and_counts_methods() -> None:
    rows = [
        {"space": f"l.{k}:v", "rule": "v.o", "format": "nf4", "method": method, "damage_before": 1.0, "damage_after": a}
        for k, (method, a) in enumerate([("awq", 0.5), ("awq", 0.25), ("none", 1.0)])
    ]
    (row,) = gains_by_rule(gain_table(rows)).to_dict(orient="records")
    assert (row["space"], row["methods"]) == (3, "awq 2, none 1")
    assert row["removed_share"] == pytest.approx(1 - 1.75 / 3)


@pytest.fixture(scope="module")
def binding(tmp_path_factory):
    return bind(open_checkpoint(save_tiny("llama", tmp_path_factory.mktemp("gains") / "a")))


@pytest.mark.parametrize("scales", ["pow2", "free"])
def test_exponents_are_counted_per_space(binding, scales) -> None:
    rng = np.random.default_rng(0)
    chosen = {space.name: rng.integers(-3, 4, space.size) for space in binding.spaces[:-1]}
    given = chosen if scales == "pow2" else {name: 2.0 ** (k + 0.3) for name, k in chosen.items()}
    frame = exponent_table(binding, RescalePlan(binding.family, "test", {}, scales, given, ""))
    assert list(frame.columns) == [column.name for column in EXPONENT_COLUMNS]
    for space in binding.spaces:
        mine = frame[frame["space"] == space.name]
        values = np.repeat(mine["exponent"], mine["count"])
        assert values.tolist() == sorted(chosen.get(space.name, np.zeros(space.size)))
        assert set(mine["rule"]) == {space.rule}


def test_a_space_that_rounds_with_powers_of_two_is_left_out(tmp_path) -> None:
    binding = bind(open_checkpoint(save_tiny("gemma", tmp_path / "a")))
    frame = exponent_table(binding, RescalePlan(binding.family, "test", {}, "pow2", {}, ""))
    assert set(frame["space"]) == {space.name for space in binding.spaces if space.exact}
    assert len(set(frame["space"])) < len(binding.spaces)


def test_rules_and_files_know_the_tables() -> None:
    for table, columns in (
        ("gains", GAIN_COLUMNS),
        ("exponents", EXPONENT_COLUMNS),
        ("layer_error", LAYER_ERROR_COLUMNS),
    ):
        assert table in CSV_TABLES
        check_names(parse_rule(f"{table}.{columns[-1].name}>0"), [table])
        with pytest.raises(RuleError, match="no column"):
            check_names(parse_rule(f"{table}.nonsense>0"), [table])
