"""The table of gains as arrays: which space has which predicted damage before and after, in which format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vrscope.report.columns import frame_of, numbers, texts
from vrscope.tables import Report

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GainRows:
    """The rows of the table "gains"; a damage that is missing counts as 0 in sums."""

    spaces: list[str]
    rules: list[str]
    layers: Floats
    formats: list[str]
    methods: list[str]
    stages: list[str]
    reasons: list[str]
    before: Floats
    after: Floats

    def names(self) -> list[str]:
        """Return the distinct formats in order."""
        return list(dict.fromkeys(self.formats))

    def of(self, name: str) -> list[int]:
        """Return the rows of one format."""
        return [k for k, found in enumerate(self.formats) if found == name]

    def sums(self, at: list[int]) -> tuple[float, float]:
        """Return the summed damage of some rows, before and after; rows that lack either are left out of both."""
        known = [k for k in at if np.isfinite(self.before[k]) and np.isfinite(self.after[k])]
        return float(self.before[known].sum()), float(self.after[known].sum())


def read_gains(report: Report) -> GainRows | None:
    """Return the rows of the table "gains", or None if there are none."""
    frame = frame_of(report, "gains")
    if frame is None:
        return None
    words = [texts(frame, name) for name in ("space", "rule", "format", "method", "stage", "reason")]
    space, rule, name, method, stage, reason = words
    before, after = numbers(frame, "damage_before"), numbers(frame, "damage_after")
    return GainRows(space, rule, numbers(frame, "layer"), name, method, stage, reason, before, after)


def gain_unit(report: Report) -> str:
    """Return what predicted damage is counted in: nats, or for an encoder the relative error squared."""
    damage = frame_of(report, "damage")
    encoder = damage is not None and not np.isfinite(numbers(damage, "kl")).any()
    return "relative error squared" if encoder and damage is not None else "nats per token"
