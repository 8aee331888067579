"""Plans made from one group of tied tensors after the other: the groups, what is kept of them, the memory it takes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.executors import Executor, Serial, Threads
from vrscope.progress import silent
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.methods import METHODS, MethodOptions, Situation
from vrscope.rescale.plan import EXPONENT, RescalePlan
from vrscope.rescale.planning import make_plan
from vrscope.rescale.profile import balanced, profile_weights, wanted_slices
from vrscope.rescale.survey import groups_of, survey_plan, survey_weights

CASES = ["llama", "phi3", "gpt2", "deepseek_v3", "qwen3_moe", "t5", "opt"]
DATA_FREE = [method for method in METHODS if not method.calibrates]


@pytest.fixture(scope="module", params=CASES)
def uneven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose channels differ so much that every method has something to do."""
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "model", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for tensor in (tensor for tensor in tensors.values() if tensor.ndim == 2):
        tensor[::3] *= 16
        tensor[:, ::5] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_groups_hold_what_balanced_spaces_tie_and_no_more(tmp_path: Path) -> None:
    binding = bind(open_checkpoint(save_tiny("llama", tmp_path / "model")))
    groups = groups_of(binding, balanced)
    names = [name for group in groups for name in group.wanted]
    assert sorted(names) == sorted(wanted_slices(binding)) and len(names) == len(set(names))
    tied = [sorted({name.split(".")[4] for name in group.wanted}) for group in groups if len(group.wanted) > 1]
    assert sorted(tied) == sorted(2 * [["k_proj", "q_proj"], ["o_proj", "v_proj"], ["down_proj", "up_proj"]])
    held = [space.name for group in groups for space in group.binding.spaces]
    assert sorted(held) == sorted(space.name for space in binding.spaces if balanced(space))


@pytest.mark.parametrize("method", [method for method in DATA_FREE if method.apart], ids=lambda method: method.name)
@pytest.mark.parametrize("executor", [Serial(), Threads(2)], ids=["serial", "threads"])
def test_a_method_chooses_from_groups_what_it_chooses_from_everything(uneven, method, executor: Executor) -> None:
    checkpoint = open_checkpoint(uneven)
    binding = bind(checkpoint)
    options = MethodOptions(scales="free", limit=30)
    plan, _ = make_plan(checkpoint, binding, method.name, options, executor, silent)
    whole = method.choose(Situation(binding, profile_weights(checkpoint, binding, Serial(), silent), options))
    assert list(plan.spaces) == list(whole) and plan.changed
    for name, exponents in whole.items():
        assert np.array_equal(plan.spaces[name], np.exp2(np.clip(exponents, -30, 30))), name


@pytest.mark.parametrize("method", [method.name for method in DATA_FREE])
@pytest.mark.parametrize("scales", ["pow2", "free"])
def test_the_survey_after_a_plan_is_the_survey_of_the_rescaled_checkpoint(uneven, tmp_path, method, scales) -> None:
    checkpoint = open_checkpoint(uneven)
    binding = bind(checkpoint)
    options = MethodOptions(scales=scales, limit=3)
    plan, made = make_plan(checkpoint, binding, method, options, Serial(), silent, described=True)
    assert plan.changed
    apply_plan(checkpoint, binding, plan, tmp_path / "out", force=False, progress=silent)
    written = survey_weights(open_checkpoint(tmp_path / "out"), binding, Serial(), silent)
    described = survey_plan(checkpoint, binding, plan, Threads(2), silent)
    original = survey_weights(checkpoint, binding, Serial(), silent)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, std in written.stds.items():
        assert std == pytest.approx(float(tensors[name].double().std(correction=0)), rel=1e-9)
    for surveys, expected in ((made, written), (described, written)):
        for found, wanted in ((surveys.before, original), (surveys.after, expected)):
            for field in ("stds", "imbalances"):
                assert getattr(found, field) == pytest.approx(getattr(wanted, field), rel=1e-12, nan_ok=True)


def test_memory_of_a_plan_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Of 14 more layers, the sums of all channels would take 5 MB, their exponents take 0.1 MB."""
    peaks = []
    for layers in (2, 16, 2, 16):  # the first two also load code
        folder = tmp_path / str(layers)
        if not folder.exists():
            _wide_llama(folder, layers)
        checkpoint = open_checkpoint(folder)
        binding = bind(checkpoint)
        tracemalloc.start()
        plan, _ = make_plan(checkpoint, binding, "wisca", MethodOptions(), Serial(), silent, described=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(plan.spaces) == 3 * layers
    assert peaks[3] - peaks[2] < 500_000


def _wide_llama(folder: Path, layers: int) -> None:
    save_tiny("llama", folder)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 4096, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    first = {name: tensors[name] for name in tensors if ".layers.0." in name}
    tensors = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        for name, tensor in first.items():
            shape = tuple(4096 if size == 96 else size for size in tensor.shape)
            tensors[name.replace(".0.", f".{layer}.")] = torch.randn(shape, generator=generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_share_their_index_arrays(tmp_path: Path) -> None:
    binding = bind(open_checkpoint(save_tiny("llama", tmp_path / "model")), approximate=True)
    terms = {(term.tensor, space.name): term.index for space in binding.spaces for term in space.terms}
    for (tensor, space), index in terms.items():
        twin = terms.get((tensor.replace(".0.", ".1."), space.replace(".0:", ".1:")))
        if twin is not None:
            assert np.shares_memory(index, twin) and not index.flags.writeable, (tensor, space)


def test_exponents_that_outgrow_their_type_add_up() -> None:
    half = RescalePlan("llama", "none", {}, "pow2", {"s": np.full(3, 20_000, EXPONENT)}, "")
    assert half.then(half).spaces["s"].tolist() == [40_000] * 3


@pytest.mark.parametrize("exponent", [-32_768, 32_768])
def test_exponents_that_do_not_fit_are_kept_as_they_are(exponent: int) -> None:
    plan = RescalePlan("llama", "none", {}, "pow2", {"s": np.array([exponent]), "t": np.array([-32_767])}, "")
    assert plan.spaces["s"].tolist() == [exponent] and plan.inverse().spaces["s"].tolist() == [-exponent]
    assert plan.spaces["t"].dtype == EXPONENT and plan.inverse().spaces["t"].tolist() == [32_767]
