"""By what share a measured damage fell, with the standard error of that share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vrscope.report.text import is_missing


@dataclass(frozen=True, slots=True)
class Removed:
    """The share of a damage that is gone, negative if it grew, its standard error, and if it is more than noise."""

    share: float
    sem: float
    clear: bool

    @property
    def percent(self) -> str:
        """Return the amount in percent with its standard error, without a sign: "60.1 ± 1.2 %"."""
        value = 100 * abs(self.share)
        return f"{value:.{self._places}f} {self.margin}" if self.margin else f"{value:.3g} %"

    @property
    def margin(self) -> str:
        """Return the standard error alone: "± 1.2 %", nothing where it is missing or zero."""
        return "" if self._places < 0 else f"± {100 * self.sem:.{self._places}f} %"

    @property
    def _places(self) -> int:
        """Return the decimals that show two digits of the standard error; -1 if there is none to show."""
        error = 100 * self.sem
        return -1 if is_missing(error) or error <= 1e-9 else max(0, min(4, 1 - math.floor(math.log10(error))))


def removed(first: Mapping[Any, Any], other: Mapping[Any, Any], measure: str) -> Removed | None:
    """Return by what share `measure` is lower in `other` than in `first`, two rows of the table "damage".

    Both are means over the same tokens. With a, b the means and d = b - a, the share is r = -d / a, and its variance by
    the delta method is `(Var d (1 - r) + Var a (r^2 - r) + r Var b) / a^2`, as the paired errors also give Cov(a, d).
    None if either is missing or the first is zero. Without a standard error of the difference, `sem` is NaN and the
    share counts as noise.
    """
    before, after = first.get(measure), other.get(measure)
    if before is None or after is None or is_missing(before) or is_missing(after) or float(before) == 0:
        return None
    share = 1 - float(after) / float(before)
    moved, error = other.get("change"), other.get("change_sem")
    if moved is None or error is None or is_missing(moved) or is_missing(error):
        return Removed(share, math.nan, share == 0)
    own = [entry.get(f"{measure}_sem") for entry in (first, other)]
    if any(is_missing(value) for value in own):
        sem = float(error) / abs(float(before))
    else:
        at, then = (float(value) ** 2 for value in own if value is not None)
        variance = float(error) ** 2 * (1 - share) + at * (share**2 - share) + share * then
        sem = math.sqrt(max(0.0, variance)) / abs(float(before))
    return Removed(share, sem, abs(float(moved)) >= 2 * float(error))
