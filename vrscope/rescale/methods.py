"""The table of methods: each one a way to choose the scale of every space. To add one, add a function and an entry.

A method gets a `Situation` (binding, weight profile, options) and returns real exponents: log2 of the scale of every
space it wants to move. Rounding to powers of two, clamping and range checks are the same for all and happen elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.roles import LINEAR
from vrscope.arch.spaces import Space
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import PlanError, UnknownNameError
from vrscope.executors import Executor, Serial
from vrscope.progress import Progress, silent
from vrscope.rescale.awq import Choice, choose, searchable
from vrscope.rescale.balance import cle, consecutive, smoothquant
from vrscope.rescale.plan import POW2
from vrscope.rescale.profile import Profile, balanced, side_sizes

if TYPE_CHECKING:
    from vrscope.activations.importance import Calibration
    from vrscope.arch.binding import Binding
Exponents = Mapping[str, NDArray[np.float64]]
MOST_ROUNDS = 16
SHRINK = -3  # log2: below an eighth, the error through eps, which grows with the square, soon shows


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """Options of the methods; each method says which it uses.

    Attributes
    ----------
    granularity
        wisca: one scale per "tensor", per KV-group "head", or per "channel".
    norm
        wisca: "frobenius", "l1" or "max".
    scales
        "pow2" (bit-exact) or "free" (real factors, one rounding per weight).
    target_std
        tvr: the standard deviation every matrix inside the layers should have.
    depth_scaled
        tvr: target over the square root of the layer's number, counted from 1.
    raw
        tvr: the paper's formula, which changes the function.
    seed
        random: seed of the generator.
    limit
        Largest |log2 scale| of a single space.
    approximate
        tvr, random: also scale what a norm undoes up to its eps; by at least 1, where its eps only fades.
    allow_shrink
        With `approximate`: also shrink the inputs of norms, to no less than `SHRINK`.
    target
        awq, auto: names of the formats whose damage to lower, all at once.
    rounds
        awq, auto: how often scales are moved once more by what the rounded model shows; 0 leaves that out.
    alpha
        smoothquant: share of the inputs' range, of 1, that moves into the weights.
    """

    granularity: Literal["tensor", "head", "channel"] = "channel"
    norm: Literal["frobenius", "l1", "max"] = "frobenius"
    scales: Literal["pow2", "free"] = "pow2"
    target_std: float = 0.01
    depth_scaled: bool = False
    raw: bool = False
    seed: int = 0
    limit: int = 6
    approximate: bool = False
    allow_shrink: bool = False
    target: tuple[str, ...] = ("nf4", "int4-g64")
    alpha: float = 0.5
    rounds: int = 1

    def __post_init__(self) -> None:
        norms, sizes = ("frobenius", "l1", "max"), ("tensor", "head", "channel")
        for name, known in (("granularity", sizes), ("norm", norms), ("scales", ("pow2", "free"))):
            if getattr(self, name) not in known:
                raise UnknownNameError.of(name, str(getattr(self, name)), known)
        for name, wanted, fits in (
            ("target_std", "a positive number", 0 < self.target_std < float("inf")),
            ("alpha", "0 to 1", 0 <= self.alpha <= 1),
            ("rounds", f"0 to {MOST_ROUNDS}", 0 <= self.rounds <= MOST_ROUNDS),
            ("limit", "0 to 30 (log2 of the largest scale)", 0 <= self.limit <= 30),
        ):
            if not fits:
                message = f"{name}: expected {wanted}, found {getattr(self, name)}."
                raise PlanError(message)
        searchable(self.target)


@dataclass(frozen=True, slots=True, eq=False)
class Situation:
    """What a method may look at; the checkpoint and the calibration only if the method is one that calibrates."""

    binding: Binding
    profile: Profile
    options: MethodOptions
    checkpoint: Checkpoint | None = None
    calibration: Calibration | None = None
    executor: Executor = field(default_factory=Serial)
    progress: Progress = silent

    @property
    def spaces(self) -> tuple[Space, ...]:
        """The spaces that the wanted kind of scale leaves exact."""
        return usable_spaces(self.binding, self.options.scales)


@dataclass(frozen=True, slots=True)
class Method:
    """One entry of the table: name, one sentence, the options it uses, and the function that chooses.

    `calibrates` says whether it needs a model run on text, `tries` whether that model is needed later on, to be run
    with rounded weights; `apart` accepts the spaces it scales, if it chooses each from the tensors of that space alone,
    and is None if it has to see all of them at once.
    """

    name: str
    meaning: str
    uses: tuple[str, ...]
    choose: Callable[[Situation], Exponents | Choice]
    calibrates: bool = False
    tries: bool = False
    apart: Callable[[Space], bool] | None = None


def usable_spaces(binding: Binding, scales: str) -> tuple[Space, ...]:
    """Return the spaces that may be scaled: with powers of two only those without 1+w gains, which would round."""
    return tuple(space for space in binding.spaces if space.exact or scales != POW2)


def reach_of(space: Space, options: MethodOptions) -> tuple[int, int]:
    """Return the smallest and largest log2 scale that a space may have."""
    if space.limit is None:
        return -options.limit, options.limit
    lowest = max(-options.limit, -(-SHRINK // space.limit.power)) if options.allow_shrink else 0
    return lowest, options.limit


def wisca(situation: Situation) -> Exponents:
    """Balance the two matrices that meet in a product (q.k, v.o, up.down): equal norms on both sides.

    The scale is `(n_reader / n_writer)^(1 / (1 + p))` with p the degree between them: the square root, or the cube root
    behind a squared ReLU. Norms are taken over everything that shares the scale. After WISCA, arXiv 2508.16676, whose
    granularity is "tensor"; "head" and "channel" are refinements made here.
    """
    chosen = {}
    for space in filter(balanced, situation.spaces):
        degree = max(abs(term.power) for term in space.terms)
        writers, readers = (
            pooled(sizes, space, situation.options)
            for sizes in side_sizes(space, situation.profile, situation.options.norm)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            exponents = (np.log2(readers) - np.log2(writers)) / (1 + degree)
        chosen[space.name] = np.where(np.isfinite(exponents), exponents, 0.0)  # a zero row or column stays as it is
    return chosen


def pooled(sizes: NDArray[np.float64], space: Space, options: MethodOptions) -> NDArray[np.float64]:
    """Return norms pooled to the granularity asked for, again one value per scale of the space, shape `(size,)`."""
    if options.granularity == "channel":
        return sizes
    groups = sizes.reshape(-1, space.shape[-1])  # one row per head; a space without heads has one row
    if options.granularity == "tensor" or len(space.shape) < 2:
        groups = sizes.reshape(1, -1)
    if options.norm == "frobenius":
        value = np.sqrt((groups**2).sum(axis=1))
    else:
        value = groups.sum(axis=1) if options.norm == "l1" else groups.max(axis=1, initial=0.0)
    return np.repeat(value, groups.shape[1])


def tvr(situation: Situation) -> Exponents:
    """Bring every matrix inside the layers as near to the target std as the exact scales reach, one scale per space.

    Each scale adds to the log-std of its writers and takes from its readers, so this is the least-squares problem
    `A x = log2(target) - log2(std)`. The function-preserving part of TVR (arXiv 2503.17500): its factor without its
    shift of the mean.
    """
    system = tvr_system(situation)
    if not system.matrix.size:
        return {}
    low, high = np.array([reach_of(space, situation.options) for space in situation.spaces], np.float64).T
    solution = np.linalg.lstsq(system.matrix, system.wanted, rcond=None)[0]
    if any(space.limit is not None for space in situation.spaces):
        solution = _bounded(system, low, high)
    if situation.options.scales == POW2:
        solution = _integer_descent(system.matrix, system.wanted, np.round(solution), (low, high))
    return {
        space.name: np.full(space.size, value)
        for space, value in zip(situation.spaces, solution, strict=True)
        if value != 0
    }


@dataclass(frozen=True, slots=True, eq=False)
class TvrSystem:
    """The least-squares problem of preserving TVR: parts of matrices (rows) against spaces (columns), in log2."""

    parts: tuple[str, ...]
    matrix: NDArray[np.float64]
    wanted: NDArray[np.float64]


def tvr_system(situation: Situation) -> TvrSystem:
    """Return how one scale per space moves the log2-std of every matrix, and how far each is from its target.

    A fused tensor counts once per part (q, k, v), told apart by the spaces its rows write.
    """
    roles, profile = situation.binding.roles, situation.profile
    uses: dict[str, list[tuple[int, int, NDArray[np.int32]]]] = {}
    for column, space in enumerate(situation.spaces):
        for term in space.terms:
            role = roles[term.tensor]
            if role.kind == LINEAR and role.layer is not None:
                uses.setdefault(term.tensor, []).append((column, term.power, term.index))
    names, rows, wanted = [], [], []
    for tensor, moves in uses.items():
        for part, keep in _parts(situation, tensor):
            row = np.zeros(len(situation.spaces))
            for column, power, index in moves:
                on = index >= 0
                row[column] += power * float(np.mean(on[keep] if on.shape == keep.shape else on))
            spread = _std(profile, tensor, keep)
            if spread > 0:
                names.append(part)
                rows.append(row)
                wanted.append(np.log2(target_std(situation.options, roles[tensor].layer) / spread))
    matrix = np.array(rows) if rows else np.zeros((0, len(situation.spaces)))
    return TvrSystem(tuple(names), matrix, np.array(wanted))


def _parts(situation: Situation, tensor: str) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return masks, broadcastable against the tensor, of the parts of its output dimension."""
    role, info = situation.binding.roles[tensor], situation.profile.infos[tensor]
    dim = role.dims.index("out")
    view = [info.shape[dim] if at == dim else 1 for at in range(len(info.shape))]
    splits = [split for split in role.heads if split.dim == dim]
    if len(splits) < 2:
        return [(tensor, np.ones(view, np.bool_))]
    return [(f"{tensor}[{split.part}]", (split.index >= 0).reshape(view)) for split in splits]


def _std(profile: Profile, tensor: str, keep: NDArray[np.bool_]) -> float:
    """Return the population std of the part of a tensor that `keep` selects; exact when its slices are at hand."""
    for part in profile.slices[tensor].values():
        mask = keep if part.total.shape == keep.shape else np.ones(part.total.shape, np.bool_) if keep.all() else None
        if mask is not None:
            count = part.count * int(mask.sum())
            mean = float(part.total[mask].sum()) / count
            return float(np.sqrt(max(float(part.square[mask].sum()) / count - mean * mean, 0.0)))
    return 0.0  # a part whose rows no space moves cannot be brought anywhere


def target_std(options: MethodOptions, layer: int | None) -> float:
    """Return the target std of a matrix in a layer (counted from 0)."""
    return options.target_std / np.sqrt((layer or 0) + 1) if options.depth_scaled else options.target_std


def _bounded(system: TvrSystem, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the least-squares solution within bounds; where several are equally good, one near zero."""
    from scipy.optimize import lsq_linear

    count, small = len(low), 1e-4
    matrix = np.vstack([system.matrix, small * np.eye(count)])
    wanted = np.append(system.wanted, np.zeros(count))
    outside = np.spacing(1.0)  # the bounds have to differ where the limit is 0
    solution: NDArray[np.float64] = lsq_linear(matrix, wanted, (low - outside, high + outside), method="bvls").x
    return np.clip(solution, low, high)


def _integer_descent(
    matrix: NDArray[np.float64],
    wanted: NDArray[np.float64],
    start: NDArray[np.float64],
    bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Return integers near the least-squares optimum: single steps of one, as long as one makes the error smaller."""
    best = np.clip(start, *bounds)
    left = wanted - matrix @ best
    norms = (matrix**2).sum(axis=0)
    for _ in range(100 * max(1, best.size)):
        gain = 2 * np.abs(matrix.T @ left) - norms  # fall of the squared error for a step of one
        step = np.sign(matrix.T @ left)
        gain[(best + step < bounds[0]) | (best + step > bounds[1]) | (norms == 0)] = -np.inf
        column = int(np.argmax(gain))
        if gain[column] <= 1e-9:
            break
        best[column] += step[column]
        left -= matrix[:, column] * step[column]
    return best


def random(situation: Situation) -> Choice:
    """Put random scales on every channel of every space: whatever declaration is wrong, the logits will show it.

    Half of them are negative where scales may be.
    """
    generator = np.random.default_rng(situation.options.seed)
    pow2 = situation.options.scales == POW2
    most = min(situation.options.limit, 3 if pow2 else 2)
    chosen, negative = {}, {}
    for space in situation.spaces:
        low, high = np.clip(reach_of(space, situation.options), -most, most)
        if space.limit is not None and low == 0:
            low = min(1, high)  # a norm has one scale or few; left at 1, they would test nothing
        drawn = generator.integers(low, high + 1, space.size) if pow2 else generator.uniform(low, high, space.size)
        chosen[space.name] = drawn.astype(np.float64)
        if space.signed:
            negative[space.name] = generator.random(space.size) < 0.5
    return Choice(chosen, negative)


def awq(situation: Situation) -> Choice:
    """Search every space for the exponents that lower the predicted damage of the target formats most."""
    return choose(situation, {})


def auto(situation: Situation) -> Choice:
    """Search like awq, and also from what the other methods choose; whatever does best on held-out text is taken."""
    return choose(situation, {"wisca": wisca(situation), "cle": cle(situation), "smoothquant": smoothquant(situation)})


METHODS: tuple[Method, ...] = (
    Method(
        "auto",
        "Starts from the best of all other methods for each space, then searches as awq does, and says what won.",
        ("target", "alpha", "limit", "rounds"),
        auto,
        calibrates=True,
        tries=True,
    ),
    Method(
        "awq",
        "Searches every space for the exponents that lower the predicted damage of the target formats most.",
        ("target", "limit", "rounds"),
        awq,
        calibrates=True,
        tries=True,
    ),
    Method(
        "smoothquant",
        "Moves range from the inputs of layers into their weights, for formats that quantize both.",
        ("alpha", "scales", "limit"),
        smoothquant,
        calibrates=True,
        apart=consecutive,
    ),
    Method(
        "cle",
        "Gives every channel the same range on both sides of its scale.",
        ("scales", "limit"),
        cle,
        apart=consecutive,
    ),
    Method(
        "wisca",
        "Gives the two matrices that meet in a product (q.k, v.o, up.down) equal norms.",
        ("granularity", "norm", "scales", "limit"),
        wisca,
        apart=balanced,
    ),
    Method(
        "tvr",
        "Brings the std of every matrix as near to a target as exact scales reach; with raw, the paper's formula, "
        "which is not equivalent.",
        ("target_std", "depth_scaled", "raw", "scales", "limit", "approximate", "allow_shrink"),
        tvr,
    ),
    Method(
        "random",
        "Random scales on every space: the self-test of a family.",
        ("seed", "scales", "limit", "approximate", "allow_shrink"),
        random,
    ),
)


def get_method(name: str) -> Method:
    """Return the method of that name.

    Raises
    ------
    UnknownNameError
        If there is none; lists the known ones and suggests the nearest.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise UnknownNameError.of("method", name, (method.name for method in METHODS))  # noqa: EM101
