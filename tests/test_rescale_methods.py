"""Methods against definitions computed with numpy from the saved tensors."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import CheckpointError, PlanError, UnknownNameError
from vrscope.executors import Serial, Threads
from vrscope.progress import silent
from vrscope.rescale.methods import METHODS, MethodOptions, Situation, get_method, tvr_system
from vrscope.rescale.planning import make_plan
from vrscope.rescale.profile import profile_weights, side_sizes
from vrscope.rescale.scaling import tensor_scales


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A llama whose sides differ by known factors, so that there is something to balance."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama") / "model")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if any(part in name for part in ("v_proj.weight", "up_proj.weight", "q_proj.weight")):
            tensor *= torch.exp2(torch.randint(-3, 6, (tensor.shape[0], 1), generator=generator).float())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def situation(folder, **options):
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    return Situation(binding, profile_weights(checkpoint, binding, Serial(), silent), MethodOptions(**options))


def planned(folder, method, **options):
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    return make_plan(checkpoint, binding, method, MethodOptions(**options), Serial(), silent)[0]


NORMS = {
    "frobenius": lambda a: np.sqrt((a**2).sum()),
    "l1": lambda a: np.abs(a).sum(),
    "max": lambda a: np.abs(a).max(),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_wisca_balances_v_and_o(llama, norm, granularity):
    """Free scales give exactly s = sqrt(n_reader / n_writer) over what shares the scale."""
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(llama / "model.safetensors").items()}
    v = tensors["model.layers.0.self_attn.v_proj.weight"].reshape(2, 16, 64)
    o = tensors["model.layers.0.self_attn.o_proj.weight"].reshape(64, 2, 2, 16)  # out, group, query head, channel
    size = NORMS[norm]
    expected = np.empty((2, 16))
    for g in range(2):
        for d in range(16):
            part = {"tensor": (v, o), "head": (v[g], o[:, g]), "channel": (v[g, d], o[:, g, :, d])}[granularity]
            expected[g, d] = np.sqrt(size(part[1]) / size(part[0]))
    plan = planned(llama, "wisca", norm=norm, granularity=granularity, scales="free", limit=30)
    assert np.allclose(plan.spaces["model.layers.0:v"].reshape(2, 16), expected, rtol=1e-6)
    whole = planned(llama, "wisca", norm=norm, granularity=granularity)
    assert np.array_equal(whole.spaces["model.layers.0:v"], np.rint(np.log2(expected)).clip(-6, 6).reshape(-1))


def test_wisca_takes_query_heads_of_a_group_and_rope_partners_together(llama):
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(llama / "model.safetensors").items()}
    q = tensors["model.layers.1.self_attn.q_proj.weight"].reshape(2, 2, 2, 8, 64)  # group, head, half, pair, in
    k = tensors["model.layers.1.self_attn.k_proj.weight"].reshape(2, 2, 8, 64)
    expected = np.sqrt(np.sqrt((k**2).sum((1, 3))) / np.sqrt((q**2).sum((1, 2, 4))))
    plan = planned(llama, "wisca", scales="free", limit=30)
    assert np.allclose(plan.spaces["model.layers.1:q"].reshape(2, 8), expected, rtol=1e-6)


def test_wisca_leaves_norm_folds_and_zero_channels_alone(llama, tmp_path):
    assert not any("x1" in name or "x2" in name for name in planned(llama, "wisca").spaces)
    folder = save_tiny("llama", tmp_path / "zero")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][6] *= 2.0**-20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    exponents = planned(folder, "wisca").spaces["model.layers.0:up"]
    assert exponents[5] == 0 and exponents[6] == 6  # clamped


def test_profiles_do_not_depend_on_threads_and_match_numpy(llama):
    checkpoint = open_checkpoint(llama)
    binding = bind(checkpoint)
    serial, threads = (profile_weights(checkpoint, binding, executor, silent) for executor in (Serial(), Threads(2)))
    tensors = load_file(llama / "model.safetensors")
    for name, parts in serial.slices.items():
        array = tensors[name].double().numpy()
        assert serial.smallest[name] == np.abs(array[array != 0]).min()
        assert serial.std(name) == pytest.approx(array.std(), rel=1e-9)
        for dims, part in parts.items():
            over = tuple(dim for dim in range(array.ndim) if dim not in dims)
            assert np.allclose(part.total, array.sum(over, keepdims=True), rtol=1e-9, atol=1e-12)
            assert np.allclose(part.absolute, np.abs(array).sum(over, keepdims=True), rtol=1e-12)
            assert np.allclose(part.square, (array**2).sum(over, keepdims=True), rtol=1e-12)
            assert np.array_equal(part.largest, np.abs(array).max(over, keepdims=True))
            assert np.array_equal(part.square, threads.slices[name][dims].square)


def test_profile_with_scales_is_the_profile_of_the_rescaled(llama):
    checkpoint = open_checkpoint(llama)
    binding = bind(checkpoint)
    plan, _ = make_plan(checkpoint, binding, "wisca", MethodOptions(limit=12), Serial(), silent)
    before = profile_weights(checkpoint, binding, Serial(), silent)
    after = profile_weights(checkpoint, binding, Serial(), silent, tensor_scales(binding, plan))
    for space in binding.spaces:
        if space.rule == "v.o":
            writers, readers = side_sizes(space, after, "frobenius")
            scale = np.exp2(plan.spaces[space.name].astype(float))
            assert np.allclose(writers, side_sizes(space, before, "frobenius")[0] * scale, rtol=1e-12)
            ratio = np.log2(writers / readers)
            assert np.abs(ratio).max() <= 1 + 1e-9  # rounding the exponent leaves at most half a bit on each side


def test_tvr_moves_log_stds_as_its_system_says(llama):
    here = situation(llama, target_std=0.05, scales="free")
    system = tvr_system(here)
    assert len(system.parts) == 14 and np.linalg.matrix_rank(system.matrix) == 10  # the final fold reaches none
    plan = planned(llama, "tvr", target_std=0.05, scales="free", limit=30)
    checkpoint = open_checkpoint(llama)
    after = profile_weights(checkpoint, here.binding, Serial(), silent, tensor_scales(here.binding, plan))
    left = np.log2([0.05 / after.std(name) for name in system.parts])
    best = np.linalg.lstsq(system.matrix, system.wanted, rcond=None)[0]
    assert np.allclose(left, system.wanted - system.matrix @ best, atol=1e-6)


def test_tvr_invariants_cannot_move(llama):
    """log v + log o - (log q + log k) / 2 and log up + log down - log gate stay, whatever the target."""
    here = situation(llama)
    for target in (0.001, 0.01, 1.0):
        plan = planned(llama, "tvr", target_std=target, depth_scaled=True)
        after = profile_weights(
            open_checkpoint(llama), here.binding, Serial(), silent, tensor_scales(here.binding, plan)
        )
        for layer in range(2):
            for profile_pair in [(here.profile, after)]:
                found = []
                for profile in profile_pair:
                    std = {
                        part: np.log2(profile.std(f"model.layers.{layer}.{part}_proj.weight"))
                        for part in (
                            "self_attn.q",
                            "self_attn.k",
                            "self_attn.v",
                            "self_attn.o",
                            "mlp.gate",
                            "mlp.up",
                            "mlp.down",
                        )
                    }
                    found.append(
                        (
                            std["self_attn.v"] + std["self_attn.o"] - (std["self_attn.q"] + std["self_attn.k"]) / 2,
                            std["mlp.up"] + std["mlp.down"] - std["mlp.gate"],
                        )
                    )
                assert np.allclose(found[0], found[1], atol=1e-9)


def test_tvr_of_fused_tensors_counts_each_part(tmp_path):
    system = tvr_system(situation(save_tiny("gpt2", tmp_path / "m")))
    fused = [part.split(".attn.")[-1] for part in system.parts if "h.0.attn.c_attn" in part]
    assert fused == ["c_attn.weight[q]", "c_attn.weight[k]", "c_attn.weight[v]"]


def test_raw_tvr_is_the_papers_formula(llama):
    plan = planned(llama, "tvr", raw=True, target_std=0.01)
    assert plan.equivalent == "not equivalent"
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    array = tensors[name].double().numpy()
    expected = (array - array.mean()) / array.std() * 0.01 + array.mean()
    scale, shift = plan.affine[name]
    assert np.allclose(array * scale + shift, expected, rtol=1e-9, atol=1e-15)
    assert "model.layers.0.self_attn.q_proj.bias" in plan.zeroed
    assert not planned(llama, "tvr", raw=True, target_std=100.0).affine  # nothing over the threshold 1.2


def test_fp16_channels_with_subnormals_are_left_out_and_counted(tmp_path):
    folder = save_tiny("llama", tmp_path / "half", torch.float16)
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 0] = 2.0**-14
    tensors["model.layers.0.mlp.up_proj.weight"][3] *= 8  # wants a scale below 1
    tensors["model.layers.0.mlp.up_proj.weight"][3, 0] = 2.0**-14
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan, _ = make_plan(open_checkpoint(folder), binding, "wisca", MethodOptions(), Serial(), silent)
    assert plan.spaces["model.layers.0:up"][3] == 0 and plan.settings["left_out"] >= 1
    del checkpoint


def test_infinite_weights_are_refused(llama, tmp_path):
    folder = save_tiny("llama", tmp_path / "inf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        planned(folder, "wisca")


def test_unknown_names_and_values():
    with pytest.raises(UnknownNameError, match="'wisca'"):
        get_method("wiska")
    with pytest.raises(UnknownNameError, match="Known: tensor, head, channel"):
        MethodOptions(granularity="row")
    with pytest.raises(PlanError, match="positive"):
        MethodOptions(target_std=0)
    with pytest.raises(PlanError, match="limit"):
        MethodOptions(limit=31)


def test_the_table_names_only_real_options():
    known = {field.name for field in dataclasses.fields(MethodOptions)}
    for method in METHODS:
        assert set(method.uses) <= known and method.meaning.endswith(".")
