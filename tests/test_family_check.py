"""Families declared by a user, and the check that tells a right declaration from a wrong one."""

import json

import pytest
import torch
from tiny_models import GQA, save_tiny

import vrscope
from vrscope import api
from vrscope.demo import demo_model
from vrscope.errors import FamilyError, VerificationError

WRONG = '[mine]\nlike = "llama"\nmodel_types = ["helium"]\n'
RIGHT = WRONG + 'rope = "interleaved"\n'


@pytest.fixture(scope="module")
def helium(tmp_path_factory):
    """A model with llama's names whose RoPE pairs neighbours: only numbers tell the two apart."""
    from transformers import HeliumConfig, HeliumForCausalLM

    torch.manual_seed(0)
    model = HeliumForCausalLM(HeliumConfig(**GQA)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    folder = tmp_path_factory.mktemp("helium") / "model"
    model.save_pretrained(folder)
    return folder


def declared(tmp_path, text):
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_right_declaration_is_bit_equal_and_works_everywhere(helium, tmp_path):
    families = declared(tmp_path, RIGHT)
    proof = api.check_family(helium, families=families).tables["proof"]
    assert list(proof["check"]) == ["binding", "spaces", "outputs, float32", "outputs, bfloat16", "weights"]
    assert set(proof["result"][2:]) == {"bit-equal"}
    assert vrscope.analyze(helium, families=families, weights_only=True).provenance["family"] == "mine"
    plan = vrscope.plan(helium, method="random", families=families)
    assert plan.family == "mine"
    vrscope.rescale(helium, tmp_path / "out", plan=plan, families=families)
    assert set(vrscope.verify(helium, tmp_path / "out", families=families).tables["proof"]["result"]) == {"bit-equal"}


def test_a_wrong_declaration_is_caught_and_the_space_named(helium, tmp_path):
    with pytest.raises(VerificationError) as caught:
        api.check_family(helium, families=declared(tmp_path, WRONG))
    message = str(caught.value)
    assert "q.k (model.layers.*:q)" in message and "v.o" not in message and "\n" not in message


def test_shipped_families_check_out_on_the_demo_model():
    assert "bit-equal" in set(api.check_family(demo_model()).tables["proof"]["result"])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nobody"}))
    with pytest.raises(FamilyError, match="nobody"):
        api.check_family(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[llama]\nmodel_types = ["x"]\n', "declared already"),
        ("x = 1\n", "is not a table"),
        ('[mine]\nlike = "llana"\n', "names no earlier family"),
        ("[mine\n", "not a readable TOML"),
    ],
)
def test_a_broken_file_is_an_error_even_where_no_family_is_needed(tmp_path, text, words):
    for call in (vrscope.plan, vrscope.analyze):
        with pytest.raises(FamilyError, match=words):
            call(demo_model(), families=declared(tmp_path, text))
