"""The search against round trips of the formats themselves: damage, single steps, descent, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from vrscope.quant.formats import FORMATS, get_format
from vrscope.rescale.readers import Reader
from vrscope.rescale.search import Found, Scales, _nothing, _Work, search

SEARCHED = [
    entry.name for entry in FORMATS if entry.levels is not None and not entry.scope.nested and entry.name != "int8"
]
ROWS, COLUMNS = 48, 192


def reader(seed: int = 0, ids: np.ndarray | None = None, power: int = -1, columns: int = COLUMNS) -> Reader:
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal((ROWS, columns)) * 0.05).astype(np.float32)
    spread = np.exp(2 * generator.standard_normal(columns))
    importance = (spread * generator.exponential(size=(ROWS, columns))).astype(np.float32)
    held_out = (spread * generator.exponential(size=(ROWS, columns))).astype(np.float32)
    return Reader(np.arange(columns) if ids is None else ids, power, weight, importance, held_out)


def scales_of(exponents: np.ndarray, negative: np.ndarray | None = None) -> Scales:
    return Scales(exponents, np.zeros(exponents.shape, bool) if negative is None else negative)


def true_damage(own: Reader, name: str, scales: Scales | Found, held_out: bool = False) -> float:
    """Return the damage through the format's own round trip, in float64."""
    signs = np.where(np.append(scales.negative, False), -1.0, 1.0)
    factors = ((signs * np.exp2(np.append(scales.exponents, 0)))[own.ids] ** own.power).astype(np.float32)
    error = own.weight - get_format(name).of_array(np.ascontiguousarray(own.weight * factors)) / factors
    return float(((own.held_out if held_out else own.importance) * error.astype(np.float64) ** 2).sum() / 2)


@pytest.mark.parametrize("name", SEARCHED)
def test_damage_is_that_of_the_format(name: str) -> None:
    generator = np.random.default_rng(1)
    scales = scales_of(generator.integers(-3, 4, COLUMNS), generator.random(COLUMNS) < 0.5)
    for own in (reader(), reader(power=-2)):
        found = _Work.of(own, [get_format(name)]).damage(scales, held_out=False)
        assert found[0] == pytest.approx(true_damage(own, name, scales), rel=1e-4)


@pytest.mark.parametrize("columns", [192, 100, 40])
@pytest.mark.parametrize("name", ["int4-g64", "nf4", "int8-row"])
def test_one_step_costs_what_starting_over_says(name: str, columns: int) -> None:
    from vrscope.rescale.search_kernels import change

    own = reader(2, columns=columns)
    work = _Work.of(own, [get_format(name)])
    scales = scales_of(np.random.default_rng(3).integers(-2, 3, columns))
    before = work.damage(scales, held_out=False)[0]
    factors = scales.factors(own.ids, own.power)
    format_ = tuple(part[0] for part in work.formats[:4])
    undo = 1 / factors
    for column in (0, 7, columns - 1):
        for step in (-2, 1, 0):  # 0 for the other sign
            trial = scales_of(scales.exponents.copy(), scales.negative.copy())
            trial.exponents[column] += step
            trial.negative[column] = step == 0
            factor = np.float32((-1.0 if step == 0 else 1.0) * 2.0 ** -float(trial.exponents[column]))
            arguments = (own.weight, own.importance, factors, undo, format_, work.errors[0], work.spans[0])
            told = change(*arguments, column, factor, np.inf, False)
            fresh = _Work.of(own, [get_format(name)])
            after = fresh.damage(trial, held_out=False)[0]
            assert told == pytest.approx(after - before, rel=1e-3, abs=1e-6 * before)
            change(*arguments, column, factor, np.inf, True)
            np.testing.assert_array_equal(work.errors[0], fresh.errors[0])
            np.testing.assert_array_equal(work.spans[0], fresh.spans[0])
            change(*arguments, column, np.float32(2.0 ** -float(scales.exponents[column])), np.inf, True)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_a_step_is_given_up_early_only_where_it_is_above_the_bound(spread: float) -> None:
    from vrscope.rescale.search_kernels import change

    generator = np.random.default_rng(11)
    weight = generator.standard_normal((1024, 64)).astype(np.float32)
    importance = generator.lognormal(sigma=spread, size=weight.shape).astype(np.float32)
    own = Reader(np.arange(64), -1, weight, importance, importance)
    work = _Work.of(own, [get_format("nf4")])
    before = work.damage(_nothing(64), held_out=False)[0]
    factors, format_ = np.ones(64, np.float32), tuple(part[0] for part in work.formats[:4])
    arguments = (own.weight, own.importance, factors, factors.copy(), format_, work.errors[0], work.spans[0])
    early = wrong = 0
    for column in range(64):
        for factor in np.array([0.5, 2.0, -1.0], np.float32):
            full = change(*arguments, column, factor, np.inf, False)
            assert change(*arguments, column, factor, full - 0.5 * before, False) > full - 0.5 * before
            early += change(*arguments, column, factor, full - 0.02 * before, False) != full
            wrong += change(*arguments, column, factor, full + 1e-3 * before, False) != full  # below the bound
    assert early > 50 and wrong < 8
    np.testing.assert_array_equal(factors, 1)


@pytest.mark.parametrize("names", [("int4-g64",), ("nf4",), ("int4-g64", "nf4")])
def test_the_search_lowers_the_true_damage_of_every_format_on_both_texts(names: tuple[str, ...]) -> None:
    own = reader(4)
    found = search([own], [(get_format(name), 1.0) for name in names], COLUMNS, {}, limit=6)
    assert found.stage == "search" and found.method == "awq"
    assert np.abs(found.exponents).max() <= 6
    for name in names:
        nothing = _nothing(COLUMNS)
        assert not found.negative.any()  # nobody said that scales may be
        assert found.before[name] == pytest.approx(true_damage(own, name, nothing, held_out=True), rel=1e-4)
        assert found.after[name] == pytest.approx(true_damage(own, name, found, held_out=True), rel=1e-4)
        assert found.after[name] < 0.9 * found.before[name]
        assert true_damage(own, name, found) < 0.9 * true_damage(own, name, nothing)


def leaning(own: Reader) -> Reader:
    """Return a reader whose columns lean to one side of zero, half of them to the other one."""
    own.weight[:] = np.abs(own.weight) * np.where(np.arange(COLUMNS) % 2, -1, 1)
    return own


def test_signs_lower_the_damage_of_lopsided_levels_only() -> None:
    own = leaning(reader(13))
    for name, gain in (("int4-g64", 0.8), ("nf4", 1.0), ("int8-row", None)):
        plain, signed = (
            search([own], [(get_format(name), 1.0)], COLUMNS, {}, limit=6, signed=signed) for signed in (False, True)
        )
        if gain is None:
            assert not signed.negative.any() and np.array_equal(signed.exponents, plain.exponents)
            continue
        assert signed.negative.any() and not plain.negative.any()
        assert signed.after[name] == pytest.approx(true_damage(own, name, signed, held_out=True), rel=1e-4)
        assert signed.after[name] < gain * plain.after[name]


def test_descent_goes_below_the_grid() -> None:
    from vrscope.rescale import search as module

    own = reader(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SWEEPS", 0)
        grid = search([own], [(get_format("int4-g64"), 1.0)], COLUMNS, {}, limit=6)
    found = search([own], [(get_format("int4-g64"), 1.0)], COLUMNS, {}, limit=6)
    assert true_damage(own, "int4-g64", found) < 0.98 * true_damage(own, "int4-g64", grid)


def test_what_held_out_text_contradicts_is_not_taken() -> None:
    own = reader(6)
    against = Reader(own.ids, own.power, own.weight, own.importance, (1 / own.importance).astype(np.float32))
    found = search([against], [(get_format("int4-g64"), 1.0)], COLUMNS, {}, limit=6)
    assert found.method == "none" and not found.exponents.any()
    assert found.after == found.before


def test_a_given_choice_wins_where_it_is_best_and_ties_stay_tied() -> None:
    ids = np.arange(COLUMNS) % 64  # three columns share a scale
    own = reader(7, ids)
    found = search([own], [(get_format("int4-g64"), 1.0)], 64, {}, limit=6)
    assert found.exponents.shape == (64,)
    again = search([own], [(get_format("int4-g64"), 1.0)], 64, {"wisca": found.exponents.astype(float)}, limit=6)
    assert again.method == "wisca"
    assert sum(again.after.values()) <= sum(found.after.values()) * (1 + 1e-9)


def test_columns_in_one_unit_that_share_a_scale_descend_correctly() -> None:
    ids = np.arange(COLUMNS) // 2  # neighbours, in the same group
    own = reader(8, ids)
    found = search([own], [(get_format("int4-g64"), 1.0)], COLUMNS // 2, {}, limit=3)
    assert true_damage(own, "int4-g64", found) < true_damage(own, "int4-g64", _nothing(COLUMNS // 2))
    assert found.after["int4-g64"] == pytest.approx(true_damage(own, "int4-g64", found, True), rel=1e-4)


def test_columns_of_other_spaces_stay_and_two_patterns_are_searched_by_grid() -> None:
    ids = np.where(np.arange(COLUMNS) < 128, np.arange(COLUMNS), -1)
    shifted = np.where(ids >= 0, (ids + 5) % 128, -1)
    both = [reader(9, ids), reader(10, shifted)]
    found = search(both, [(get_format("nf4"), 1.0)], 128, {}, limit=6)
    assert found.stage in {"grid", ""}
    own = reader(11, ids)
    only = search([own], [(get_format("nf4"), 1.0)], 128, {}, limit=6)
    factors = Scales(only.exponents, only.negative).factors(own.ids, own.power)
    assert only.exponents.any() and (factors[128:] == 1).all()


def test_channels_that_no_text_reached_are_left_at_the_edge_of_the_others() -> None:
    own = reader(12)
    own.importance[:, :5] = 0
    own.held_out[:, :5] = 0
    found = search([own], [(get_format("int4-g64"), 1.0)], COLUMNS, {}, limit=6)
    assert np.isfinite(list(found.after.values())).all()
