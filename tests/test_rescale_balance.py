"""Channel equalization against ranges taken with numpy from the saved tensors and from hand-made inputs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import outputs, save_tiny

from vrscope.activations.profile import profile_checkpoint
from vrscope.arch.binding import bind
from vrscope.arch.roles import LINEAR
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import PlanError
from vrscope.executors import Serial
from vrscope.progress import silent
from vrscope.quant.text import TextSample
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.balance import cle, power_of, smoothquant
from vrscope.rescale.methods import usable_spaces
from vrscope.rescale.plan import RescalePlan
from vrscope.rescale.profile import profile_weights

FAMILIES = [
    *("llama", "llama-tied", "gpt2", "opt", "bert", "mixtral", "granitemoe", "gpt_oss", "nemotron", "gemma3", "phi3"),
    *("deepseek_v3", "whisper", "jamba", "falcon", "qwen3_next", "mt5"),
]


@dataclass
class Case:
    """A tiny checkpoint, what methods look at, and its tensors in float64."""

    folder: Any
    checkpoint: Any
    binding: Any
    situation: Any

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {name: tensor.double().numpy() for name, tensor in load_file(self.folder / "model.safetensors").items()}

    def plan(self, exponents: Any, scales: str = "pow2") -> RescalePlan:
        make = (lambda e: np.rint(np.clip(e, -6, 6)).astype(np.int64)) if scales == "pow2" else np.exp2
        spaces = {name: make(values) for name, values in exponents.items()}
        return RescalePlan(self.binding.family, "cle", {}, scales, spaces, self.checkpoint.fingerprint())


def inputs_of(checkpoint: Any, binding: Any, seed: int = 3) -> dict[str, np.ndarray]:
    """Return made-up input ranges of every linear weight, batch axes in front."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, role in binding.roles.items():
        if role.kind == LINEAR and "in" in role.dims:
            shape = checkpoint.tensors[name].shape
            sizes = [size for what, size in zip(role.dims, shape, strict=True) if what not in {"out", "in"}]
            found[name] = np.exp(generator.normal(0, 1.5, (*sizes, shape[role.dims.index("in")])))
    return found


def case_of(name: str, folder: Any, *, scales: str = "free", alpha: float = 0.5, dtype: Any = torch.float64) -> Case:
    """Save a tiny model with rows of v, up and fc1 of very different size."""
    save_tiny(name, folder, dtype)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key, tensor in tensors.items():
        if any(part in key for part in ("v_proj.weight", "up_proj.weight", "fc1.weight", "w3.weight")):
            tensor *= torch.exp2(4 * torch.rand((tensor.shape[0], 1), generator=generator) - 2).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    situation = SimpleNamespace(
        binding=binding,
        profile=profile_weights(checkpoint, binding, Serial(), silent),
        spaces=usable_spaces(binding, scales),
        options=SimpleNamespace(alpha=alpha),
        calibration=SimpleNamespace(absmax=inputs_of(checkpoint, binding)),
    )
    return Case(folder, checkpoint, binding, situation)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> Case:
    return case_of("llama", tmp_path_factory.mktemp("balance") / "llama")


def named(values: dict[str, Any], *parts: str) -> Any:
    """Return the only entry whose name holds all parts."""
    (found,) = (value for name, value in values.items() if all(part in name for part in parts))
    return found


def of_rule(case: Case, exponents: Any, rule: str, layer: int | None = 0) -> np.ndarray:
    (space,) = (s for s in case.situation.spaces if s.rule == rule and s.layer == layer and s.name in exponents)
    return np.asarray(exponents[space.name])


# ---- cle ----


def test_cle_of_a_llama_by_hand(llama: Case) -> None:
    w, found = llama.tensors, cle(llama.situation)
    v = np.abs(named(w, ".0.", "v_proj.weight")).max(axis=1)  # KV group x channel
    o = np.abs(named(w, ".0.", "o_proj.weight")).reshape(64, 2, 2, 16).max(axis=(0, 2)).reshape(-1)
    assert of_rule(llama, found, "v.o") == pytest.approx(0.5 * np.log2(o / v), abs=1e-12)
    up = np.abs(named(w, ".0.", "up_proj.weight")).max(axis=1)
    down = np.abs(named(w, ".0.", "down_proj.weight")).max(axis=0)
    assert of_rule(llama, found, "up.down") == pytest.approx(0.5 * np.log2(down / up), abs=1e-12)
    readers = np.max([np.abs(named(w, ".0.", f"{part}_proj.weight")).max(axis=0) for part in "qkv"], axis=0)
    folds = [s for s in llama.situation.spaces if s.rule == "norm fold" and s.layer == 0]
    fold = next(found[s.name] for s in folds if any("q_proj" in term.tensor for term in s.terms))
    assert fold == pytest.approx(np.log2(readers) - np.log2(readers).mean(), abs=1e-12)
    rules = {space.rule for space in llama.situation.spaces if space.name in found}
    assert rules == {"v.o", "up.down", "norm fold"}  # q and k do not follow each other


def test_cle_of_transposed_and_fused_weights(tmp_path: Any) -> None:
    gpt2 = case_of("gpt2", tmp_path / "gpt2")
    w, found = gpt2.tensors, cle(gpt2.situation)
    attn = np.abs(named(w, ".0.", "c_attn.weight"))  # (in, q | k | v)
    width = attn.shape[0]
    v, o = attn[:, 2 * width :].max(axis=0), np.abs(named(w, ".0.", "attn.c_proj.weight")).max(axis=1)
    assert of_rule(gpt2, found, "v.o") == pytest.approx(0.5 * np.log2(o / v), abs=1e-12)
    folds = [s for s in gpt2.situation.spaces if s.rule == "norm fold" and s.layer == 0]
    (fold,) = (found[s.name] for s in folds if any("c_attn" in term.tensor for term in s.terms))
    columns = np.log2(attn.max(axis=1))
    assert fold == pytest.approx(columns - columns.mean(), abs=1e-12)


def test_cle_of_experts(tmp_path: Any) -> None:
    """Every expert has its own up and down; the norm in front is shared by all of them, and by the router."""
    case = case_of("granitemoe", tmp_path / "moe")
    w, found = case.tensors, cle(case.situation)
    both = np.abs(named(w, ".0.", "input_linear"))  # (expert, gate | up, in)
    half = both.shape[1] // 2
    up, down = both[:, half:].max(axis=2), np.abs(named(w, ".0.", "output_linear")).max(axis=1)
    assert of_rule(case, found, "up.down").reshape(up.shape) == pytest.approx(0.5 * np.log2(down / up), abs=1e-12)
    router = np.abs(named(w, ".0.", "router")).max(axis=0)
    columns = np.log2(np.maximum(router, both.max(axis=(0, 1))))
    folds = [s for s in case.situation.spaces if s.rule == "norm fold" and s.layer == 0]
    (fold,) = (found[s.name] for s in folds if any("router" in term.tensor for term in s.terms))
    assert fold == pytest.approx(columns - columns.mean(), abs=1e-12)


def test_cle_behind_a_squared_relu_is_a_cube_root(tmp_path: Any) -> None:
    case = case_of("nemotron", tmp_path / "relu2")
    w, found = case.tensors, cle(case.situation)
    up, down = (np.abs(named(w, ".0.", f"{part}_proj.weight")) for part in ("up", "down"))
    ratio = np.log2(down.max(axis=0) / up.max(axis=1))
    assert of_rule(case, found, "fc1.fc2") == pytest.approx(ratio / 3, abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "opt", "nemotron", "mixtral"])
def test_ranges_of_both_sides_are_equal_after_cle_with_free_scales(name: str, tmp_path: Any) -> None:
    case = case_of(name, tmp_path / "model")
    pairs = [space for space in case.situation.spaces if space.rule in {"v.o", "up.down", "fc1.fc2"}]
    chosen = cle(case.situation)
    plan = case.plan({space.name: chosen[space.name] for space in pairs}, "free")
    apply_plan(case.checkpoint, case.binding, plan, tmp_path / "out", force=False, progress=silent)
    after = {k: t.double().numpy() for k, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    for space in pairs:
        sides = np.zeros((2, space.size))
        for term in space.terms:
            if after[term.tensor].ndim < 2:
                continue
            index = np.broadcast_to(term.index, after[term.tensor].shape)
            used = index >= 0
            np.maximum.at(sides[int(term.power < 0)], index[used], np.abs(after[term.tensor][used]))
        assert sides[0] == pytest.approx(sides[1], rel=1e-12), space.name


def test_cle_brings_the_columns_behind_a_norm_to_one_range(llama: Case, tmp_path: Any) -> None:
    chosen = cle(llama.situation)
    folds = {s.name: chosen[s.name] for s in llama.situation.spaces if s.rule == "norm fold"}
    apply_plan(
        llama.checkpoint,
        llama.binding,
        llama.plan(folds, "free"),
        tmp_path / "out",
        force=False,
        progress=silent,
    )
    after = {k: t.double().numpy() for k, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    ranges = np.max([np.abs(named(after, ".0.", f"{part}_proj.weight")).max(axis=0) for part in "qkv"], axis=0)
    assert np.ptp(np.log2(ranges)) < 1e-12


def test_zero_channels_keep_their_scale(tmp_path: Any) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight"
    tensors[key][:, 5] = 0
    for part in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{part}_proj.weight"][:, 7] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    profile = profile_weights(checkpoint, binding, Serial(), silent)
    absmax = inputs_of(checkpoint, binding)
    absmax["model.layers.0.mlp.down_proj.weight"][9] = 0
    absmax["model.layers.0.mlp.down_proj.weight"][11] = np.nan
    situation = SimpleNamespace(
        binding=binding,
        profile=profile,
        spaces=usable_spaces(binding, "free"),
        options=SimpleNamespace(alpha=0.5),
        calibration=SimpleNamespace(absmax=absmax),
    )
    case = Case(folder, checkpoint, binding, situation)

    def still(exponents: np.ndarray) -> set[int]:
        return {int(channel) for channel in np.flatnonzero(exponents == 0)}

    for method, zero in ((cle, {5}), (smoothquant, {5, 9, 11})):  # and, of an odd number, the one in the middle
        found = method(situation)
        assert all(np.isfinite(values).all() for values in found.values())
        pair = still(of_rule(case, found, "up.down"))
        assert zero <= pair and len(pair - zero) <= (method is smoothquant)
        (fold,) = (
            found[s.name]
            for s in situation.spaces
            if s.rule == "norm fold" and s.layer == 0 and any("up_proj" in term.tensor for term in s.terms)
        )
        assert 7 in still(fold) and len(still(fold)) <= 1 + (method is smoothquant)


# ---- smoothquant ----


def smoothed(seen: np.ndarray, held: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Return log2 of what the readers' columns are multiplied by."""
    factor = seen**alpha / held ** (1 - alpha)
    return np.log2(factor) - np.median(np.log2(factor))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_of_a_llama_by_hand(llama: Case, alpha: float) -> None:
    llama.situation.options = SimpleNamespace(alpha=alpha)
    w, x, found = llama.tensors, llama.situation.calibration.absmax, smoothquant(llama.situation)

    o = np.abs(named(w, ".0.", "o_proj.weight")).reshape(64, 2, 2, 16).max(axis=(0, 2)).reshape(-1)
    seen = named(x, ".0.", "o_proj").reshape(2, 2, 16).max(axis=1).reshape(-1)
    assert -of_rule(llama, found, "v.o") == pytest.approx(smoothed(seen, o, alpha), abs=1e-12)
    down, seen = np.abs(named(w, ".0.", "down_proj.weight")).max(axis=0), named(x, ".0.", "down_proj")
    assert -of_rule(llama, found, "up.down") == pytest.approx(smoothed(seen, down, alpha), abs=1e-12)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    readers = np.max([np.abs(w[name]).max(axis=0) for name in names], axis=0)
    seen = np.max([x[name] for name in names], axis=0)
    folds = [s for s in llama.situation.spaces if s.rule == "norm fold" and s.layer == 0]
    (fold,) = (found[s.name] for s in folds if any("q_proj" in term.tensor for term in s.terms))
    assert -fold == pytest.approx(smoothed(seen, readers, alpha), abs=1e-12)
    # The output head has no calibrated input, so the final norm stays.
    assert {s.rule for s in llama.situation.spaces if s.name in found} == {"v.o", "up.down", "norm fold"}
    assert all(s.layer is not None for s in llama.situation.spaces if s.name in found)


def test_smoothquant_behind_a_squared_relu_takes_the_root(tmp_path: Any) -> None:
    case = case_of("nemotron", tmp_path / "relu2")
    w, x, found = case.tensors, case.situation.calibration.absmax, smoothquant(case.situation)
    down, seen = np.abs(named(w, ".0.", "down_proj.weight")).max(axis=0), named(x, ".0.", "down_proj")
    assert -2 * of_rule(case, found, "fc1.fc2") == pytest.approx(smoothed(seen, down), abs=1e-12)
    (space,) = (s for s in case.situation.spaces if s.rule == "fc1.fc2" and s.layer == 0)
    assert (power_of(space, 1), power_of(space, -1)) == (1, 2)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("name", "part", "axis"), [("granitemoe", "output_linear", 1), ("llama4", "experts.down_proj", 2)]
)
def test_smoothquant_of_experts(name: str, part: str, axis: int, pooled: bool, tmp_path: Any) -> None:
    """Ranges per expert, or one for all; granitemoe stores (expert, out, in), llama4 (expert, in, out)."""
    case = case_of(name, tmp_path / "moe")
    w, x = case.tensors, case.situation.calibration.absmax
    if pooled:
        x.update({key: value.max(axis=0) for key, value in x.items() if value.ndim == 2})
    found = smoothquant(case.situation)
    space = next(s for s in case.situation.spaces if s.name in found and any(part in t.tensor for t in s.terms))
    (key,) = (term.tensor for term in space.terms if term.power < 0)
    held = np.abs(w[key]).max(axis=axis)
    wanted = smoothed(np.broadcast_to(x[key], held.shape), held)
    assert -found[space.name].reshape(held.shape) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "first", "axis"), [("granitemoe", "input_linear", (0, 1)), ("gpt_oss", "experts.gate_up_proj", (0, 2))]
)
def test_smoothquant_of_a_norm_in_front_of_experts(name: str, first: str, axis: tuple[int, int], tmp_path: Any) -> None:
    """One scale per channel for the router and every expert together."""
    case = case_of(name, tmp_path / "moe")
    w, x, found = case.tensors, case.situation.calibration.absmax, smoothquant(case.situation)
    folds = [s for s in case.situation.spaces if s.rule == "norm fold" and s.layer == 0]
    (fold,) = (s for s in folds if any(first in term.tensor for term in s.terms))
    router, experts = sorted((t.tensor for t in fold.terms if t.power < 0), key=lambda name: w[name].ndim)
    held = np.maximum(np.abs(w[router]).max(axis=0), np.abs(w[experts]).max(axis=axis))
    seen = np.maximum(x[router], x[experts].max(axis=0))
    assert -found[fold.name] == pytest.approx(smoothed(seen, held), abs=1e-12)


def test_smoothquant_refuses_what_it_cannot_use(llama: Case) -> None:
    def asked(**change: Any) -> SimpleNamespace:
        return SimpleNamespace(**(vars(llama.situation) | {"options": SimpleNamespace(alpha=0.5)} | change))

    with pytest.raises(PlanError, match=r"expected the ranges of activations, found none\. Give it text"):
        smoothquant(asked(calibration=None))
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(PlanError, match="alpha: expected 0"):
            smoothquant(asked(options=SimpleNamespace(alpha=alpha)))
    wrong = {"model.layers.0.mlp.down_proj.weight": np.ones(5)}
    with pytest.raises(PlanError, match=r"down_proj.*shape \(96,\), found \(5,\)"):
        smoothquant(asked(calibration=SimpleNamespace(absmax=wrong)))


def measured(checkpoint: Any, binding: Any) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    windows = tuple(tuple(int(t) for t in generator.integers(3, 90, 32)) for _ in range(3))
    profile = profile_checkpoint(checkpoint, binding.roles, TextSample("t", windows, 32, (0, 0)), ("cpu", "float32"))
    return {name: found.statistics.channels.absmax for name, found in profile.inputs.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "nemotron", "mixtral"])
def test_smoothquant_evens_the_inputs_it_was_calibrated_on(name: str, tmp_path: Any) -> None:
    """The spread (largest over median channel) of real inputs shrinks, and alpha 1 with free scales removes it."""
    case = case_of(name, tmp_path / "model", alpha=1.0, dtype=torch.float32)
    tensors = load_file(case.folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for key, tensor in tensors.items():
        if (tensor.ndim == 1 and "norm" in key) or key.endswith(("ln_1.weight", "ln_2.weight")):
            tensor *= torch.exp2(6 * torch.rand(tensor.shape, generator=generator) - 3)
    save_file(tensors, case.folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(case.folder)
    binding = bind(checkpoint)
    before = measured(checkpoint, binding)
    case.situation.calibration = SimpleNamespace(absmax=before)
    case.situation.profile = profile_weights(checkpoint, binding, Serial(), silent)
    case = Case(case.folder, checkpoint, binding, case.situation)
    found = smoothquant(case.situation)
    apply_plan(checkpoint, binding, case.plan(found, "free"), tmp_path / "out", force=False, progress=silent)
    other = open_checkpoint(tmp_path / "out")
    after = measured(other, bind(other))

    def spread(x: np.ndarray) -> float:
        return float(x.max() / np.median(x))

    moved = {t.tensor for s in case.situation.spaces if s.name in found and s.rule == "norm fold" for t in s.terms}
    moved &= set(before)
    assert moved
    for tensor in moved:
        assert spread(before[tensor]) > 1.5
        assert spread(after[tensor]) == pytest.approx(1, abs=0.01 if "expert" not in tensor else 0.6), tensor


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", [cle, smoothquant], ids=["cle", "smoothquant"])
def test_rounded_to_powers_of_two_the_logits_are_bit_equal(name: str, method: Any, tmp_path: Any) -> None:
    case = case_of(name, tmp_path / "model", scales="pow2", dtype=torch.float32)
    plan = case.plan(method(case.situation))
    assert plan.changed > 0 and plan.equivalent == "bit-equal"
    apply_plan(case.checkpoint, case.binding, plan, tmp_path / "out", force=False, progress=silent)
    assert torch.equal(outputs(case.folder, name), outputs(tmp_path / "out", name))
