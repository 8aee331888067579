"""A rescale as a small file: which checkpoint it is for, how it was chosen, and the scale of every space.

All exact rescales are diagonal and commute, so whatever method chose them, a plan is one vector per space. Powers of
two are stored as integer exponents, run-length encoded ("0x12 1 -1x3"); free scales as real factors; which of them are
negative apart from that, as zeros and ones ("0x12 1 0x3").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrscope.errors import OutputError, PlanError
from vrscope.tables import write_text

PLAN_FILE = "vrscope_plan.json"
PLAN_VERSION = 2  # with negative scales, which a reader of version 1 would pass over; plans without are version 1
POW2, FREE = "pow2", "free"
BIT_EQUAL, ROUNDED, UP_TO_EPS = "bit-equal", "equal up to rounding", "equal up to eps"
NOT_EQUIVALENT = "not equivalent"
EXPONENT = np.int16  # a plan has one per scale of the checkpoint; sums and products are taken in int64
_LARGEST = 1000  # magnitude of an exponent
_RUN = re.compile(r"(-?\d+)(?:x(\d+))?")


@dataclass(frozen=True, slots=True, eq=False)
class RescalePlan:
    """The scales of a rescale, before or after it was applied.

    Attributes
    ----------
    family
        The declared architecture.
    method, settings
        How the scales were chosen.
    scales
        "pow2": `spaces` holds integer exponents k, the scale is 2**k. "free": it holds the real factors themselves.
    spaces
        Space name to an array of shape `(size,)`; a space that is not listed is left alone. Exponents become int16 if
        they fit.
    negative
        Those of `spaces` of which some scales are negative, each with a bool array of shape `(size,)`: true where the
        scale is minus what `spaces` says.
    source, result
        Fingerprints of the checkpoint the plan is for and, once it was applied, of what came out ("" before).
    affine
        For raw TVR only: tensor name to `(scale, shift)`, `w' = scale * w + shift`. Never function-preserving.
    zeroed
        For raw TVR only: biases that are set to zero.
    approximate
        Those of `spaces` whose scale a norm undoes only up to its eps, each with that eps.
    gains
        Of methods that predict it: for every space and format the damage before and after (see
        `vrscope.rescale.gains`).
    """

    family: str
    method: str
    settings: Mapping[str, Any]
    scales: str
    spaces: Mapping[str, NDArray[Any]]
    source: str
    result: str = ""
    affine: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    zeroed: tuple[str, ...] = ()
    approximate: Mapping[str, float] = field(default_factory=dict)
    gains: tuple[Mapping[str, Any], ...] = ()
    negative: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scales == POW2:
            object.__setattr__(self, "spaces", {name: _narrow(values) for name, values in self.spaces.items()})

    @property
    def equivalent(self) -> str:
        """What the rescaled model computes.

        "bit-equal", "equal up to rounding" (free scales), "equal up to eps" (an approximate space is scaled, by powers
        of two or not), or "not equivalent".
        """
        if self.affine or self.zeroed:
            return NOT_EQUIVALENT
        if any(np.any(self.spaces[name] != self.neutral) for name in self.approximate if name in self.spaces):
            return UP_TO_EPS
        return BIT_EQUAL if self.scales == POW2 else ROUNDED

    @property
    def neutral(self) -> float:
        """The entry of a space that changes nothing."""
        return 0 if self.scales == POW2 else 1.0

    @property
    def changed(self) -> int:
        """Number of scales that are not 1; for raw TVR, of tensors that are not what they were."""
        moved = sum(int(np.count_nonzero(self.moved(name))) for name in self.spaces)
        return len(self.affine) + len(self.zeroed) + moved

    def moved(self, name: str) -> NDArray[np.bool_]:
        """Return which scales of a listed space are not 1, shape `(size,)`."""
        moved: NDArray[np.bool_] = (self.spaces[name] != self.neutral) | self.signs(name)
        return moved

    def signs(self, name: str) -> NDArray[np.bool_]:
        """Return which scales of a listed space are negative, shape `(size,)`."""
        return self.negative.get(name, np.zeros(len(self.spaces[name]), np.bool_))

    def only(self, names: Iterable[str]) -> RescalePlan:
        """Return the plan with all but the spaces named left alone."""
        spaces = {name: self.spaces[name] for name in names}
        negative = {name: values for name, values in self.negative.items() if name in spaces}
        return replace(self, spaces=spaces, negative=negative)

    def inverse(self) -> RescalePlan:
        """Return the plan that undoes this one.

        Raises
        ------
        PlanError
            If the plan is not function-preserving: what raw TVR drops cannot be brought back.
        """
        if self.equivalent == NOT_EQUIVALENT:
            message = "the plan is raw TVR, which zeroes biases and shifts means: it has no inverse. Keep the original."
            raise PlanError(message)
        undo = np.negative if self.scales == POW2 else np.reciprocal
        spaces = {name: undo(values) for name, values in self.spaces.items()}
        settings = {**self.settings, "inverted": not self.settings.get("inverted", False)}
        return replace(self, spaces=spaces, settings=settings, source=self.result, result=self.source, gains=())

    def then(self, other: RescalePlan) -> RescalePlan:
        """Return one plan that does this one and then `other`.

        Raises
        ------
        PlanError
            If the two are of different families, or `other` is for another checkpoint than this one makes.
        """
        if NOT_EQUIVALENT in {self.equivalent, other.equivalent} or self.family != other.family:
            message = "only function-preserving plans of one family compose; apply them one after the other instead."
            raise PlanError(message)
        if self.result and other.source and self.result != other.source:
            message = (
                f"the second plan is for checkpoint {other.source[:12]}, but the first one makes {self.result[:12]}. "
                "Plan the second on the output of the first."
            )
            raise PlanError(message)
        scales = POW2 if self.scales == other.scales == POW2 else FREE
        first, second = self._as(scales), other._as(scales)
        spaces = dict(first)
        for name, values in second.items():
            if name in spaces:
                both = spaces[name], values
                spaces[name] = np.add(*both, dtype=np.int64) if scales == POW2 else np.multiply(*both)
            else:
                spaces[name] = values
        negative = dict(self.negative)
        for name, values in other.negative.items():
            negative[name] = negative[name] ^ values if name in negative else values
        settings = {"first": dict(self.settings), "second": dict(other.settings)}
        method = f"{self.method}+{other.method}"
        plan = RescalePlan(self.family, method, settings, scales, spaces, self.source, other.result)
        return replace(plan, approximate={**self.approximate, **other.approximate}, negative=negative)

    def _as(self, scales: str) -> Mapping[str, NDArray[Any]]:
        if scales == self.scales:
            return self.spaces
        return {name: np.exp2(values.astype(np.float64)) for name, values in self.spaces.items()}

    def to_json(self) -> str:
        """Return the plan as JSON text, one line per space."""
        body = {
            "vrscope_plan": PLAN_VERSION if self.negative else 1,
            "family": self.family,
            "method": self.method,
            "settings": dict(self.settings),
            "equivalent": self.equivalent,
            "scales": self.scales,
            "source": self.source,
            "result": self.result,
            "affine": {name: list(pair) for name, pair in self.affine.items()},
            "zeroed": list(self.zeroed),
            "spaces": {name: _encode(values, self.scales) for name, values in self.spaces.items()},
        } | ({"approximate": dict(self.approximate)} if self.approximate else {})
        if self.negative:
            body["negative"] = {name: _encode(values.astype(EXPONENT), POW2) for name, values in self.negative.items()}
        if self.gains:
            body["gains"] = [dict(row) for row in self.gains]
        return json.dumps(body, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the plan as a JSON file and return its path.

        Raises
        ------
        OutputError
            If the file cannot be written, or holds something that is not a plan.
        """
        if Path(path).exists():
            try:
                self.load(path)
            except PlanError as error:
                message = f"{path}: exists and is not a plan, so it is not overwritten. Choose another name."
                raise OutputError(message) from error
        write_text(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> RescalePlan:
        """Return the plan in a JSON file.

        Raises
        ------
        PlanError
            If the file is missing or is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            message = f"{path}: not a readable plan ({error}). Make one with `vrscope plan MODEL -o plan.json`."
            raise PlanError(message) from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> RescalePlan:
        """Return the plan in a JSON text; `where` names it in messages.

        Raises
        ------
        PlanError
            If the text is not a plan of this version.
        """
        try:
            body = json.loads(text)
            version = body["vrscope_plan"]
            if version not in range(1, PLAN_VERSION + 1):
                message = f"{where}: plan version {version!r}, expected {PLAN_VERSION} or less. Make the plan again."
                raise PlanError(message)
            scales = body["scales"]
            if scales not in {POW2, FREE}:
                message = f"{where}: scales {scales!r}, expected {POW2} or {FREE}."
                raise PlanError(message)
            affine = {str(name): (float(a), float(b)) for name, (a, b) in body["affine"].items()}
            if not all(math.isfinite(number) for pair in affine.values() for number in pair):
                message = f"{where}: scale and shift must be finite. Make the plan again."
                raise PlanError(message)
            approximate = {str(name): float(eps) for name, eps in body.get("approximate", {}).items()}
            spaces = {str(name): _decode(values, scales) for name, values in body["spaces"].items()}
            negative = {str(name): _decode(values, POW2) for name, values in body.get("negative", {}).items()}
            for name, values in negative.items():
                if name not in spaces or len(values) != len(spaces[name]) or not np.isin(values, (0, 1)).all():
                    message = f"{where}: expected zeros and ones, one per scale of {name!r}. Make the plan again."
                    raise PlanError(message)
            if not isinstance(body["zeroed"], list):
                message = f"{where}: zeroed must be a list of tensor names. Make the plan again."
                raise PlanError(message)
            return cls(
                family=str(body["family"]),
                method=str(body["method"]),
                settings=dict(body["settings"]),
                scales=scales,
                spaces=spaces,
                source=str(body["source"]),
                result=str(body["result"]),
                affine=affine,
                zeroed=tuple(str(name) for name in body["zeroed"]),
                approximate=approximate,
                gains=tuple(dict(row) for row in body.get("gains", ())),
                negative={name: values.astype(np.bool_) for name, values in negative.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            message = f"{where}: not a vrscope plan ({type(error).__name__}: {error}). Make one with `vrscope plan`."
            raise PlanError(message) from error


def _narrow(exponents: NDArray[Any]) -> NDArray[Any]:
    """Return whole exponents in two bytes each if they fit."""
    if exponents.dtype == EXPONENT or exponents.dtype.kind != "i":
        return exponents
    limits = np.iinfo(EXPONENT)
    fit = limits.min < exponents.min(initial=0) and exponents.max(initial=0) <= limits.max  # also when negated
    return exponents.astype(EXPONENT) if fit else exponents


def _encode(values: NDArray[Any], scales: str) -> str | list[float]:
    if scales == FREE:
        return [float(value) for value in values]
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] + 1))  # of runs of equal exponents
    counts = np.diff(starts, append=len(values))
    runs = list(zip(values[starts].tolist(), counts.tolist(), strict=True))
    words = {run: f"{run[0]}x{run[1]}" if run[1] > 1 else f"{run[0]}" for run in set(runs)}  # few differ
    return " ".join([words[run] for run in runs])


def _decode(text: str | list[float], scales: str) -> NDArray[Any]:
    if scales == FREE:
        factors = np.asarray(text, np.float64)
        if factors.ndim != 1 or not np.all(np.isfinite(factors) & (factors > 0)):
            message = "factors must be finite and positive"
            raise ValueError(message)
        return factors
    words = str(text).split()
    runs = {word: _run(word) for word in dict.fromkeys(words)}  # few differ
    exponents = np.array([runs[word][0] for word in words], EXPONENT)
    return np.repeat(exponents, np.array([runs[word][1] for word in words], np.int64))


def _run(word: str) -> tuple[int, int]:
    """Return an exponent and how often it follows itself."""
    match = _RUN.fullmatch(word)
    if match is None or int(match[2] or 1) > 10**8 or abs(int(match[1])) > _LARGEST:
        message = f"{word[:20]!r} is not an exponent"
        raise ValueError(message)
    return int(match[1]), int(match[2] or 1)
