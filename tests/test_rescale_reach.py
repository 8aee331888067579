"""The theorem, checked both ways: what `reach` calls unchanged rounds to the same levels, and what changes is found."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny

from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.executors import Serial
from vrscope.progress import silent
from vrscope.quant.formats import FORMATS
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.plan import RescalePlan
from vrscope.rescale.planning import make_plan
from vrscope.rescale.reach import reach, reach_of_spaces
from vrscope.rescale.scaling import TensorScale, tensor_scales

WEIGHT_ONLY = [entry for entry in FORMATS if not entry.activations]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return open_checkpoint(save_tiny("llama", tmp_path_factory.mktemp("reach") / "a"))


def plan_of(checkpoint, method, rules=None, **options):
    """Return a random or chosen plan, cut to the spaces of some rules."""
    binding = bind(checkpoint)
    plan, _ = make_plan(checkpoint, binding, method, MethodOptions(**options), Serial(), silent)
    wanted = {space.name for space in binding.spaces if rules is None or space.rule in rules}
    spaces = {name: values for name, values in plan.spaces.items() if name in wanted}
    return binding, RescalePlan(plan.family, method, {}, "pow2", spaces, plan.source)


def test_tensor_wise_scales_are_invisible_to_everything_but_tensor_wide_units(llama):
    binding, plan = plan_of(llama, "tvr", target_std=0.01)
    assert plan.changed > 0
    table = reach(llama, binding, plan, FORMATS).set_index("format")
    for name in (
        "nf4",
        "fp4",
        "int8-row",
        "int4-g32",
        "int4-g64",
        "int4-g128",
        "int4-row",
        "int8-tensor",
        "nf4-dq",
        "w8a8",
    ):
        assert not table.loc[name, "can_change"], name
        assert "absorbs" in table.loc[name, "reason"]
    assert table.loc["int8", "can_change"]  # folding norms rescales the inputs, and the threshold 6.0 is absolute


@pytest.mark.parametrize(("rules", "felt"), [({"q.k"}, set()), ({"v.o"}, {"o_proj"}), ({"up.down"}, {"down_proj"})])
def test_only_columns_are_felt_by_row_and_group_formats(llama, rules, felt):
    binding, plan = plan_of(llama, "random", rules)
    table = reach(llama, binding, plan, FORMATS).set_index("format")
    for name in ("int8-row", "int4-row", "int4-g32", "w8a8"):
        assert table.loc[name, "tensors_changed"] == 2 * len(felt)
    spaces = reach_of_spaces(llama, binding, plan, FORMATS)
    assert all(("int4-g32" in names) == bool(felt) for names in spaces.values())


def test_column_factors_change_formats_that_quantize_inputs_and_the_reason_says_so(llama):
    binding, plan = plan_of(llama, "random", {"norm fold"})
    table = reach(llama, binding, plan, FORMATS).set_index("format")
    assert table.loc["w8a8", "tensors_changed"] == table.loc["w8a8", "tensors_total"] - 4  # o and down read no norm
    reason = "one scale per output row, and one scale for all of a layer's inputs"
    assert reason in table.loc["w8a8", "reason"] and "or rescale the layer's input" in table.loc["w8a8", "reason"]
    assert "fixed outlier threshold" in table.loc["int8", "reason"]


@pytest.mark.parametrize(
    ("method", "rules", "options"),
    [
        ("random", {"q.k"}, {}),
        ("random", {"v.o"}, {}),
        ("random", {"norm fold"}, {}),
        ("random", None, {}),
        ("tvr", None, {"target_std": 0.02}),
        ("wisca", None, {"granularity": "head"}),
    ],
)
def test_reach_agrees_with_how_every_weight_rounds(llama, tmp_path, method, rules, options):
    """Where reach says unchanged, the rounded weights follow the scales exactly: same levels. Elsewhere some do not."""
    binding, plan = plan_of(llama, method, rules, **options)
    apply_plan(llama, binding, plan, tmp_path / "out", force=False, progress=silent)
    table = reach(llama, binding, plan, WEIGHT_ONLY).set_index("format")
    first, second = (load_file(folder / "model.safetensors") for folder in (llama.folder, tmp_path / "out"))
    scales = tensor_scales(binding, plan)
    for entry in WEIGHT_ONLY:
        moved = 0
        for name, role in binding.roles.items():
            if role.kind != "linear":
                continue
            exponents = scales.get(name, TensorScale()).exponents
            factors = np.exp2(sum(exponents, np.zeros((1, 1))).astype(np.float32))
            expected = entry.roundtrip(first[name]) * torch.from_numpy(factors)
            moved += not torch.equal(entry.roundtrip(second[name]), expected)
        assert moved <= table.loc[entry.name, "tensors_changed"], entry.name
        assert (moved > 0) == table.loc[entry.name, "can_change"], entry.name


def test_signs_alone_are_felt_by_levels_that_differ_on_the_two_sides_of_zero(llama, tmp_path):
    binding = bind(llama)
    signs = {space.name: np.arange(space.size) % 2 == 0 for space in binding.spaces if space.rule == "norm fold"}
    spaces = {name: np.zeros(values.size, np.int64) for name, values in signs.items()}
    plan = RescalePlan("llama", "none", {}, "pow2", spaces, llama.fingerprint(), negative=signs)
    apply_plan(llama, binding, plan, tmp_path / "out", force=False, progress=silent)
    table = reach(llama, binding, plan, FORMATS).set_index("format")
    first, second = (load_file(folder / "model.safetensors") for folder in (llama.folder, tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    turned = torch.where(first[name].signbit() == second[name].signbit(), 1.0, -1.0)
    assert torch.equal(second[name], first[name] * turned) and 0.4 < float((turned < 0).float().mean()) < 0.6
    for entry in FORMATS:
        same = torch.equal(entry.roundtrip(second[name]), entry.roundtrip(first[name]) * turned)
        assert same == (not table.loc[entry.name, "can_change"]) or entry.name == "fp4", entry.name
    changing = set(table.index[table["can_change"]])
    assert changing == {"nf4", "nf4-dq", "fp4", "int4-g32", "int4-g64", "int4-g128", "int4-row"}


def test_an_empty_plan_changes_nothing(llama):
    plan = RescalePlan("llama", "none", {}, "pow2", {}, llama.fingerprint())
    table = reach(llama, bind(llama), plan, FORMATS)
    assert not table["can_change"].any() and (table["reason"] == "The plan changes no scale.").all()


def test_raw_tvr_changes_everything(llama):
    binding = bind(llama)
    plan, _ = make_plan(llama, binding, "tvr", MethodOptions(raw=True), Serial(), silent)
    assert reach(llama, binding, plan, FORMATS)["can_change"].all()


def test_transposed_storage_is_read_the_right_way(tmp_path):
    checkpoint = open_checkpoint(save_tiny("gpt2", tmp_path / "a"))
    binding, plan = plan_of(checkpoint, "random", {"v.o"})
    table = reach(checkpoint, binding, plan, FORMATS).set_index("format")
    assert table.loc["int8-row", "tensors_changed"] == 2  # attn.c_proj of both layers; c_attn only by rows
    assert load_file(checkpoint.folder / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)
