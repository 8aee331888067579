"""Which tensors stay in higher precision: a greedy choice by damage avoided per byte spent.

Single damages are added up. That is an assumption: errors of different tensors are taken as independent, and what one
does to another's is left out. The real damage of a choice has to be measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vrscope.errors import PlanError

_FUSED = (  # layers that inference engines run as one matrix, which has one format
    re.compile(r"^(.*\.)?(?:q_proj|k_proj|v_proj)$"),
    re.compile(r"^(.*\.)?(?:gate_proj|up_proj)$"),
    re.compile(r"^(.*\.)?(?:query|key|value)$"),
)


@dataclass(frozen=True, slots=True)
class Item:
    """What is kept in higher precision as a whole or not at all.

    Attributes
    ----------
    name
        For messages.
    modules
        Its modules in the running model.
    low_bytes, high_bytes
        Size in either format.
    low_damage, high_damage
        Additive damage in either format: KL in nats, or squared relative error.
    """

    name: str
    modules: tuple[str, ...]
    low_bytes: float
    high_bytes: float
    low_damage: float
    high_damage: float

    @property
    def gain(self) -> float:
        """Damage avoided by the higher precision."""
        return self.low_damage - self.high_damage

    @property
    def cost_bytes(self) -> float:
        """Bytes that the higher precision takes more."""
        return self.high_bytes - self.low_bytes


def within_bytes(items: Sequence[Item], budget_bytes: float) -> list[bool]:
    """Return for each item whether it is kept, so that all together take at most `budget_bytes`.

    Items are kept in the order of damage avoided per byte as long as they fit. That avoids at least as much as any
    choice could, less the gain of the first item that did not fit.

    Raises
    ------
    PlanError
        If even the lowest precision takes more.
    """
    room = budget_bytes - sum(item.low_bytes for item in items)
    if room < -1e-6 * max(1.0, budget_bytes):
        message = (
            f"budget: expected at least {budget_bytes - room:,.0f} bytes for these weights, the size with all of them "
            f"in the lower precision, found {budget_bytes:,.0f}. Allow more, or choose a smaller --low format."
        )
        raise PlanError(message)
    kept = [False] * len(items)
    for index in _by_worth(items):
        if items[index].gain > 0 and items[index].cost_bytes <= room * (1 + 1e-9):
            kept[index] = True
            room -= items[index].cost_bytes
    return kept


def within_damage(items: Sequence[Item], budget: float) -> list[bool]:
    """Return for each item whether it is kept, so that the summed damage is at most `budget`, in few bytes.

    Items are kept in the order of damage avoided per byte until the sum is small enough; then those that turn out not
    to be needed are given up again, the largest first.

    Raises
    ------
    PlanError
        If the sum is larger even with all items kept.
    """
    least = sum(min(item.low_damage, item.high_damage) for item in items)
    if budget < least or budget < 0:
        message = (
            f"budget: expected a damage of at least {least:.4g}, the sum with every weight in the higher precision, "
            f"found {budget:.4g}. Allow more, or choose a better --high format."
        )
        raise PlanError(message)
    kept = [False] * len(items)
    for index in _by_worth(items):
        if _damage(items, kept) <= budget:
            break
        kept[index] = items[index].gain > 0
    for index in sorted(range(len(items)), key=lambda index: -items[index].cost_bytes):
        if kept[index]:
            kept[index] = False
            kept[index] = _damage(items, kept) > budget
    return kept


def fuse(items: Sequence[Item]) -> list[Item]:
    """Return items in which q, k and v of a layer are one, and gate and up, as inference engines join them."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(_fused_name(item), []).append(item)
    return [own[0] if len(own) == 1 else _join(name, own) for name, own in groups.items()]


def _join(name: str, items: Sequence[Item]) -> Item:
    return Item(
        name,
        tuple(module for item in items for module in item.modules),
        sum(item.low_bytes for item in items),
        sum(item.high_bytes for item in items),
        sum(item.low_damage for item in items),
        sum(item.high_damage for item in items),
    )


def _fused_name(item: Item) -> str:
    if len(item.modules) == 1:
        for kind, pattern in enumerate(_FUSED):
            match = pattern.match(item.modules[0])
            if match:
                return f"{match[1] or ''}({('qkv', 'gate and up', 'qkv')[kind]})"
    return item.name


def _by_worth(items: Sequence[Item]) -> list[int]:
    """Return the items' numbers, the largest gain per byte first; those that cost nothing come before all."""
    free = [item.cost_bytes <= 0 for item in items]
    worth = [0.0 if free[k] else item.gain / item.cost_bytes for k, item in enumerate(items)]
    return sorted(range(len(items)), key=lambda k: (not free[k], -worth[k]))


def _damage(items: Sequence[Item], kept: Sequence[bool]) -> float:
    return sum(item.high_damage if keep else item.low_damage for item, keep in zip(items, kept, strict=True))
