"""Plans: files, inverse, composition, and refusals."""

import json

import numpy as np
import pytest

from vrscope.errors import PlanError
from vrscope.rescale.plan import RescalePlan


def plan(scales="pow2", **changes):
    spaces = {"a": np.array([0, 0, 0, 1, -1, -1, 6]), "b": np.zeros(3, np.int64), "c": np.zeros(0, np.int64)}
    if scales == "free":
        spaces = {name: np.exp2(values / 3) for name, values in spaces.items()}
    facts = {"family": "llama", "method": "wisca", "settings": {"norm": "l1"}, "source": "s" * 64, "result": "r" * 64}
    return RescalePlan(**(facts | {"scales": scales, "spaces": spaces} | changes))


@pytest.mark.parametrize("scales", ["pow2", "free"])
def test_a_plan_survives_its_file(tmp_path, scales):
    before = plan(scales)
    after = RescalePlan.load(before.save(tmp_path / "deep" / "plan.json"))
    assert (after.family, after.method, after.settings, after.source, after.result) == (
        before.family, before.method, before.settings, before.source, before.result,
    )  # fmt: skip
    for name, values in before.spaces.items():
        assert np.array_equal(after.spaces[name], values) and after.spaces[name].dtype == values.dtype


def test_the_file_is_readable_and_small(tmp_path):
    text = plan(spaces={"a": np.zeros(100_000, np.int64), "b": np.array([3, 3, -2])}).to_json()
    assert '"a": "0x100000"' in text and '"b": "3x2 -2"' in text and len(text) < 1000


def test_what_a_plan_promises():
    assert plan().equivalent == "bit-equal"
    assert plan("free").equivalent == "equal up to rounding"
    assert plan(affine={"w": (0.5, 0.1)}).equivalent == "not equivalent"
    assert plan(zeroed=("b",)).equivalent == "not equivalent"
    assert plan().changed == 4


def test_inverse_undoes_and_swaps_the_fingerprints():
    undo = plan().inverse()
    assert np.array_equal(undo.spaces["a"], -plan().spaces["a"])
    assert (undo.source, undo.result) == ("r" * 64, "s" * 64)
    free = plan("free")
    assert np.allclose(free.inverse().spaces["a"] * free.spaces["a"], 1, rtol=1e-15)
    with pytest.raises(PlanError, match="no inverse"):
        plan(affine={"w": (0.5, 0.1)}).inverse()


def test_composition_adds_exponents_and_multiplies_factors():
    second = plan(source="r" * 64, result="t" * 64, spaces={"a": np.ones(7, np.int64), "d": np.array([2])})
    both = plan().then(second)
    assert np.array_equal(both.spaces["a"], plan().spaces["a"] + 1) and both.spaces["d"].tolist() == [2]
    assert (both.source, both.result) == ("s" * 64, "t" * 64)
    mixed = plan().then(plan("free", source="r" * 64))
    assert mixed.scales == "free"
    assert np.allclose(mixed.spaces["a"], np.exp2(plan().spaces["a"]) * plan("free").spaces["a"], rtol=1e-15)
    assert plan().then(plan().inverse()).changed == 0


def signed(**changes):
    return plan(negative={"a": np.array([1, 0, 0, 1, 0, 0, 1], bool)}, **changes)


def test_signs_survive_the_file_and_older_readers_refuse_it(tmp_path):
    text = signed().to_json()
    assert '"negative"' in text and json.loads(text)["vrscope_plan"] == 2
    after = RescalePlan.load(signed().save(tmp_path / "plan.json"))
    assert after.negative["a"].dtype == bool and np.array_equal(after.negative["a"], signed().negative["a"])
    assert after.equivalent == "bit-equal"
    assert json.loads(plan().to_json())["vrscope_plan"] == 1 and not plan().negative


def test_signs_count_as_changes_and_cancel_when_composed():
    assert signed().changed == 5 and signed().moved("a").tolist() == [True, False, False, True, True, True, True]
    assert signed().only(["b"]).changed == 0 and not signed().only(["b"]).negative
    assert signed().then(signed().inverse()).changed == 0
    both = signed().then(plan("free", source="r" * 64))
    assert both.scales == "free" and np.array_equal(both.signs("a"), signed().signs("a"))


def test_composition_refuses_what_does_not_join():
    with pytest.raises(PlanError, match="second plan is for"):
        plan().then(plan(source="x" * 64))
    with pytest.raises(PlanError, match="one family"):
        plan().then(plan(family="gpt2", source="r" * 64))
    with pytest.raises(PlanError, match="function-preserving"):
        plan().then(plan(source="r" * 64, zeroed=("b",)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.pop("spaces"), "not a vrscope plan"),
        (lambda body: body.update(vrscope_plan=99), "plan version 99"),
        (lambda body: body.update(scales="dozenal"), "dozenal"),
        (lambda body: body["spaces"].update(a="1 two"), "'two' is not an exponent"),
        (lambda body: body["spaces"].update(a="1.5"), "not an exponent"),
        (lambda body: body["spaces"].update(a="0x99999999999"), "not an exponent"),
        (lambda body: body["spaces"].update(a="5000"), "not an exponent"),
        (lambda body: body.update(scales="free", spaces={"a": [0.0]}), "finite and positive"),
        (lambda body: body.update(scales="free", spaces={"a": ["NaN"]}), "finite and positive"),
        (lambda body: body.update(affine={"w": [1]}), "not a vrscope plan"),
        (lambda body: body.update(affine={"w": [1, float("nan")]}), "must be finite"),
        (lambda body: body.update(zeroed="abc"), "must be a list"),
        (lambda body: body.update(negative={"a": "0x6 2"}), "zeros and ones"),
        (lambda body: body.update(negative={"a": "0x6"}), "zeros and ones"),
        (lambda body: body.update(negative={"z": "1"}), "zeros and ones"),
    ],
)
def test_a_damaged_plan_is_refused_in_one_line(change, words):
    body = json.loads(plan().to_json())
    change(body)
    with pytest.raises(PlanError) as caught:
        RescalePlan.from_json(json.dumps(body), "here.json")
    assert words in str(caught.value) and "here.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", "[" * 5000, '{"vrscope_plan": 1}'])
def test_what_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="not a vrscope plan"):
        RescalePlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="not a readable plan"):
        RescalePlan.load(tmp_path / "absent.json")
