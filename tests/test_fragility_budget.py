"""The greedy choice against every possible one, and the budgets that cannot be met."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vrscope.errors import PlanError
from vrscope.fragility.budget import Item, fuse, within_bytes, within_damage


def items(seed: int, count: int = 10) -> list[Item]:
    rng = np.random.default_rng(seed)
    sizes, damages = rng.integers(1, 20, count) * 100.0, rng.lognormal(-3, 1.5, count)
    return [
        Item(f"u{k}", (f"m{k}",), s, 4 * s, d, 0.02 * d) for k, (s, d) in enumerate(zip(sizes, damages, strict=True))
    ]


def size(own: list[Item], kept: tuple[bool, ...] | list[bool]) -> float:
    return sum(item.high_bytes if keep else item.low_bytes for item, keep in zip(own, kept, strict=True))


def damage(own: list[Item], kept: tuple[bool, ...] | list[bool]) -> float:
    return sum(item.high_damage if keep else item.low_damage for item, keep in zip(own, kept, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_within_bytes_fits_and_is_near_the_best_of_all_choices(seed: int) -> None:
    own = items(seed)
    low = size(own, [False] * 10)
    for share in (0.0, 0.2, 0.5, 1.0):
        room = low * (1 + 3 * share)
        kept = within_bytes(own, room)
        assert size(own, kept) <= room * (1 + 1e-9)
        possible = (
            choice for choice in itertools.product((False, True), repeat=10) if size(own, choice) <= room + 1e-6
        )
        best = min(damage(own, choice) for choice in possible)
        left_out = [item.gain for item, keep in zip(own, kept, strict=True) if not keep]
        assert damage(own, kept) - best <= max(left_out, default=0.0) + 1e-12
        assert share < 1 or all(kept)


@pytest.mark.parametrize("seed", range(12))
def test_within_damage_meets_the_budget_and_gives_up_what_is_not_needed(seed: int) -> None:
    own = items(seed)
    total = damage(own, [False] * 10)
    for share in (0.05, 0.2, 0.5, 0.9, 1.0):
        kept = within_damage(own, share * total)
        assert damage(own, kept) <= share * total + 1e-12
        for k, keep in enumerate(kept):
            less = [False if j == k else other for j, other in enumerate(kept)]
            assert not keep or damage(own, less) > share * total
        possible = (c for c in itertools.product((False, True), repeat=10) if damage(own, c) <= share * total)
        best = min(size(own, choice) for choice in possible)
        assert size(own, kept) <= best + max(item.cost_bytes for item in own)
    assert within_damage(own, total) == [False] * 10


def test_an_impossible_budget_says_the_least_possible() -> None:
    own = items(1)
    least = size(own, [False] * 10)
    with pytest.raises(PlanError, match=f"at least {least:,.0f} bytes"):
        within_bytes(own, least - 1)
    assert within_bytes(own, least) == [False] * 10
    with pytest.raises(PlanError, match="a damage of at least"):
        within_damage(own, 0.5 * damage(own, [True] * 10))


def test_what_gains_nothing_is_never_kept() -> None:
    own = [Item("a", ("a",), 10, 40, 0.1, 0.2), Item("b", ("b",), 10, 40, 0.1, 0.0)]
    assert within_bytes(own, 1000) == [False, True]
    assert within_damage(own, 0.1) == [False, True]


def test_parts_that_engines_join_are_one_item() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    own = [Item(f"l.{k}.{n}", (f"l.{k}.{n}",), 1.0, 4.0, 0.5, 0.1) for k in (1, 11) for n in names]
    own += [Item(f"l.{k}.{n}", (f"l.{k}.{n}",), 1.0, 4.0, 0.5, 0.1) for k in (1, 11) for n in ("gate_proj", "up_proj")]
    fused = fuse(own)
    assert [len(item.modules) for item in fused] == [3, 1, 3, 1, 2, 2]
    assert fused[0].modules == ("l.1.q_proj", "l.1.k_proj", "l.1.v_proj")
    for name in ("low_bytes", "high_bytes", "low_damage", "high_damage"):
        assert sum(getattr(item, name) for item in fused) == pytest.approx(sum(getattr(item, name) for item in own))
