"""The methods that calibrate: bit-equal on every family, gains that add up, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_activations_capture import RUN
from tiny_models import outputs, save_tiny

from vrscope.activations.importance import calibrate
from vrscope.arch.binding import bind
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import PlanError
from vrscope.executors import Serial, Threads
from vrscope.progress import silent
from vrscope.quant.loading import load_model
from vrscope.quant.text import TextSample
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.gains import gain_table
from vrscope.rescale.methods import METHODS, MethodOptions
from vrscope.rescale.plan import RescalePlan
from vrscope.rescale.planning import make_plan

SAMPLE = TextSample("made up", tuple(tuple((7 * i + w) % 90 + 3 for i in range(32)) for w in range(4)), 32, (0, 0))
FEW = ["llama", "mixtral", "gpt2", "opt", "bert", "gpt_oss", "deepseek_v3", "jamba", "gemma3", "olmo2", "nemotron"]
TARGET = ("int4-g32", "nf4")


def planned(
    folder: Path,
    method: str,
    executor: Serial | Threads = Serial(),  # noqa: B008
    target: tuple[str, ...] = TARGET,
) -> RescalePlan:
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    found = calibrate(load_model(checkpoint, "cpu", "float32"), checkpoint, binding.roles, SAMPLE, keep=True)
    return make_plan(checkpoint, binding, method, MethodOptions(target=target), executor, silent, found)[0]


def is_bit_equal(case: str, tmp_path: Path, method: str) -> RescalePlan:
    for dtype in (torch.float32, torch.bfloat16):
        folder, out = save_tiny(case, tmp_path / f"{dtype}", dtype), tmp_path / f"{dtype}-out"
        plan = planned(folder, method)
        checkpoint = open_checkpoint(folder)
        apply_plan(checkpoint, bind(checkpoint), plan, out, force=False, progress=silent)
        assert plan.equivalent == "bit-equal"
        assert torch.equal(outputs(folder, case, dtype), outputs(out, case, dtype))
    return plan


@pytest.mark.parametrize("case", [case for case in FEW if case in RUN])
def test_auto_is_bit_equal(case: str, tmp_path: Path) -> None:
    is_bit_equal(case, tmp_path, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "awq", "smoothquant", "cle"])
@pytest.mark.parametrize("case", RUN)
def test_every_method_is_bit_equal_on_every_family(case: str, method: str, tmp_path: Path) -> None:
    is_bit_equal(case, tmp_path, method)


def test_gains_are_told_per_space_and_format_and_survive_the_file(tmp_path: Path) -> None:
    plan = planned(save_tiny("llama", tmp_path / "model"), "auto")
    frame = gain_table(plan.gains)
    felt = [space for space in plan.spaces if ":q" not in space]
    assert len(frame) == len(TARGET) * len(felt) and set(frame["format"]) == set(TARGET)
    assert plan.changed > 0
    per_space = frame.groupby("space")[["damage_before", "damage_after"]].sum()
    idle = frame[frame["method"] == "none"]
    assert (idle["damage_before"] == idle["damage_after"]).all()
    assert per_space["damage_after"].sum() < per_space["damage_before"].sum()
    again = RescalePlan.from_json(plan.to_json())
    assert gain_table(again.gains).equals(frame)
    assert plan.settings["target"] == list(TARGET) and plan.settings["calibration_tokens"] == 128
    assert plan.inverse().gains == ()


def test_threads_change_nothing(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    assert planned(folder, "awq").to_json() == planned(folder, "awq", Threads(3)).to_json()


def test_a_method_that_calibrates_says_so_when_it_cannot(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "model"))
    for method in METHODS:
        if method.calibrates:
            with pytest.raises(PlanError, match=r"expected (a calibration|the ranges of activations)"):
                make_plan(checkpoint, bind(checkpoint), method.name, MethodOptions(), Serial(), silent)


def test_formats_whose_scale_spans_all_columns_and_rows_are_refused() -> None:
    with pytest.raises(PlanError, match="'int8-tensor' cannot be searched for"):
        MethodOptions(target=("int8-tensor",))
    with pytest.raises(PlanError, match="at least one format"):
        MethodOptions(target=())


def test_free_scales_are_refused_where_only_powers_of_two_are_searched(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "model"))
    for method in ("auto", "awq"):
        with pytest.raises(PlanError, match=f"'{method}' searches for powers of two"):
            make_plan(checkpoint, bind(checkpoint), method, MethodOptions(scales="free"), Serial(), silent)


def test_rows_keep_their_signs_for_code_books_which_would_round_them_differently(tmp_path: Path) -> None:
    """What is predicted for the columns of a weight would no longer hold if its rows turned."""
    folder = save_tiny("llama", tmp_path / "a")
    rules = {space.name: space.rule for space in bind(open_checkpoint(folder)).spaces}
    turned = {
        name: {rules[space] for space in planned(folder, "awq", target=(name,)).negative}
        for name in ("nf4", "int4-g32")
    }
    assert turned == {"nf4": {"norm fold"}, "int4-g32": {"norm fold", "v.o", "up.down"}}
