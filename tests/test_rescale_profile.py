"""The sums behind a plan: every stored type against numpy, what follows from them after a plan, and what is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from vrscope import api
from vrscope.arch.binding import bind
from vrscope.checkpoint.source import BlockPlace, Checkpoint, StoredBlock, open_checkpoint
from vrscope.errors import CheckpointError, PlanError
from vrscope.executors import Serial
from vrscope.progress import silent
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.planning import make_plan
from vrscope.rescale.profile import balanced, profile_weights, rescaled_profile
from vrscope.rescale.scaling import TensorScale, tensor_scales
from vrscope.rescale.sum_kernels import add_sums
from vrscope.stats.encoding import encoding

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (7, 1024), (5, 2500), (9, 1030)])
def test_sums_of_every_type_and_ragged_shape_match_numpy(dtype: str, shape: tuple[int, int]) -> None:
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(TYPES[dtype])
    random[0, 0] = 0.0
    code = encoding(dtype)
    bits = random.view(torch.uint8).numpy().view(code.unsigned)
    rows, columns = np.zeros((shape[0], 3)), np.zeros((3, shape[1]))
    tops = np.zeros(shape[0], code.unsigned), np.zeros(shape[1], code.unsigned)
    low = add_sums(bits, None if dtype == "BF16" else code.floats(bits), rows, columns, *tops)
    values = random.double().numpy()
    magnitude = np.abs(values)
    for field, part in enumerate((values, magnitude, values**2)):
        assert np.allclose(rows[:, field], part.sum(1), rtol=1e-12, atol=1e-12)
        assert np.allclose(columns[field], part.sum(0), rtol=1e-12, atol=1e-12)
    assert np.array_equal(code.floats(tops[0]), magnitude.max(1))
    assert np.array_equal(code.floats(tops[1]), magnitude.max(0))
    if magnitude.any():
        assert code.floats(np.array([low + 1], code.unsigned))[0] == magnitude[magnitude > 0].min()
    else:
        assert low == 2**code.width - 1


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama") / "model", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "up_proj" in name or "v_proj" in name:
            tensor[::3] *= 16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each block was read."""
    seen: Counter[str] = Counter()
    original = Checkpoint.read_stored

    def counting(self: Checkpoint, place: BlockPlace, *rest: object) -> StoredBlock:
        seen[f"{place.name} {place.first_row} {place.first_column}"] += 1
        return original(self, place, *rest)

    monkeypatch.setattr(Checkpoint, "read_stored", counting)
    return seen


@pytest.mark.parametrize(("method", "read_again"), [("wisca", False), ("cle", True)])
def test_what_follows_from_the_sums_before_is_what_reading_gives(
    llama: Path, visits: Counter[str], method: str, read_again: bool
) -> None:
    checkpoint = open_checkpoint(llama)
    binding = bind(checkpoint)
    plan, _ = make_plan(checkpoint, binding, method, MethodOptions(), Serial(), silent)
    before = profile_weights(checkpoint, binding, Serial(), silent)
    assert any(values.any() for values in plan.spaces.values())
    scales = tensor_scales(binding, plan)
    visits.clear()
    after = rescaled_profile(checkpoint, binding, before, scales, Serial(), silent)
    assert bool(visits) == read_again
    read = profile_weights(checkpoint, binding, Serial(), silent, scales)
    assert list(after.slices) == list(read.slices)
    for name in read.slices:
        assert after.std(name) == pytest.approx(read.std(name), rel=1e-12)
    for space in filter(balanced, binding.spaces):
        for term in space.terms:
            for field in ("count", "total", "absolute", "square", "largest"):
                found, expected = (getattr(profile.of(term), field) for profile in (after, read))
                assert np.array_equal(found, expected), (term.tensor, field)


def test_scales_that_leave_the_range_are_found_by_reading(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    binding = bind(checkpoint)
    before = profile_weights(checkpoint, binding, Serial(), silent)
    name = "model.layers.0.mlp.up_proj.weight"
    scales = {name: TensorScale((np.full((checkpoint.tensors[name].shape[0], 1), 400),))}
    with pytest.raises(PlanError, match="normal range"):
        rescaled_profile(checkpoint, binding, before, scales, Serial(), silent)


def test_a_plan_and_its_description_read_every_block_once(llama: Path, visits: Counter[str]) -> None:
    plan, report = api.plan_and_describe(llama, method="wisca")
    assert visits and set(visits.values()) == {1}
    assert plan.to_json() == api.plan(llama, method="wisca").to_json()
    described = api.describe(llama, plan)
    assert report.tables.keys() == described.tables.keys()
    for name, table in described.tables.items():
        assert report.tables[name].equals(table), name


@pytest.mark.parametrize("place", [(0, 0), (3, 5), (15, 63)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_refused(
    llama: Path, tmp_path: Path, place: tuple[int, int], value: float
) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][place] = value
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.v_proj.*NaN or infinite"):
        profile_weights(checkpoint, bind(checkpoint), Serial(), silent)
