"""Declarations: strict reading, inheritance, and what the shipped file says."""

import pytest

from vrscope.arch.binding import find_family
from vrscope.arch.families import FAMILIES_FILE, families
from vrscope.arch.flow import read_families
from vrscope.arch.graph import values_of
from vrscope.errors import FamilyError

BASE = """
[base]
model_types = ["base"]
prefixes = ["model."]
stacks.layer = { path = "{p}layers.{i}.", count = "num_hidden_layers" }
top."{p}embed" = "embed tok -> res"
layer."norm" = "norm res -> x1"
layer."up?" = "x1 -> up"
"""


def declared(tmp_path, text):
    path = tmp_path / "families.toml"
    path.write_text(text, encoding="utf-8")
    return {family.name: family for family in read_families(path)}


def test_like_inherits_replaces_and_removes_lines(tmp_path):
    text = BASE + '[child]\nlike = "base"\nmodel_types = ["child"]\nlayer."up" = "x1 -> fc"\nlayer."norm" = ""\n'
    family = declared(tmp_path, text)["child"]
    assert [(line.stem, line.required) for line in family.lines["layer"]] == [("up", True)]
    assert family.prefixes == ("model.",)


def test_a_child_does_not_inherit_model_types(tmp_path):
    assert declared(tmp_path, BASE + '[child]\nlike = "base"\n')["child"].model_types == ()


def test_drop_removes_lines_and_refuses_to_miss(tmp_path):
    text = BASE + '[child]\nlike = "base"\ndrop = ["up", "{p}embed"]\n'
    family = declared(tmp_path, text)
    assert [line.stem for line in family["child"].lines["layer"]] == ["norm"]
    assert not family["child"].lines["top"] and len(family["base"].lines["top"]) == 1
    with pytest.raises(FamilyError, match="has no line 'down'"):
        declared(tmp_path, BASE + '[child]\nlike = "base"\ndrop = ["down"]\n')


def test_sets_of_optional_lines_are_read(tmp_path):
    text = BASE + 'layer."a?pair" = "x1 -> a"\nlayer."b?pair" = "a -> res"\nop.odd_thing = "opaque a up"\n'
    family = declared(tmp_path, text)["base"]
    assert [(line.stem, line.required, line.group) for line in family.lines["layer"]][-2:] == [
        ("a", False, "pair"),
        ("b", False, "pair"),
    ]
    assert family.operations[-1].inputs == ("a", "up") and family.operations[-1].name == "odd_thing"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("rotaryy = 1\n", "unknown key 'rotaryy'"),
        ('rope = "helf"\n', "expected one of half"),
        ('layer."x" = "x1 up"\n', "expected 'reads -> writes'"),
        ('layer."x" = { flow = "x1 -> up", bais = "none" }\n', "unknown option 'bais'"),
        ('layer."x" = { flow = "x1 -> up", bias = "maybe" }\n', "expected one of none"),
        ('layer."x" = "x1 -> (up"\n', "not a layout"),
        ('op.a = "gated gate up"\n', "expected an operation"),
        ('op.a = "mix a b -> c"\n', "expected an operation"),
        ('spaces.q = "g-r"\n', "expected axis names"),
        ('tied = { head = "lm_head" }\n', "expected head, embedding and default"),
        ('like = "nobody"\n', "names no earlier family"),
        ('op.a = "opaque"\n', "expected an operation"),
        ('stacks.other = { path = "x", count = "n" }\n', "expected path"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path, more, words):
    with pytest.raises(FamilyError, match="base") as caught:
        declared(tmp_path, BASE.replace("[base]\n", "[base]\n" + more))
    assert words in str(caught.value)


def test_the_families_of_one_model_type_are_those_among_all():
    for kind in {kind for family in families() for kind in family.model_types}:
        alone = read_families(FAMILIES_FILE, model_type=kind)
        assert alone == tuple(family for family in families() if kind in family.model_types)
    assert read_families(FAMILIES_FILE, model_type="unheard of") == ()


def test_not_toml(tmp_path):
    with pytest.raises(FamilyError, match="not a readable TOML"):
        declared(tmp_path, "[base")


def test_every_shipped_family_is_reached_by_its_own_model_types():
    for family in families():
        for model_type in family.model_types:
            found = find_family({"model_type": model_type, **family.when})
            assert found.name == family.name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "expected a model_type"),
        ({"model_type": "cohere2_moe"}, "not a declared architecture"),  # claimed by qwen2_moe's names, parallel
        ({"model_type": "nanochat"}, "not a declared architecture"),  # norms without weights
        ({"model_type": "lama"}, "'llama' is a different one"),
        ({"model_type": ["llama"]}, "expected a model_type"),
    ],
)
def test_unknown_architectures_are_refused_never_guessed(config, words):
    with pytest.raises(FamilyError) as caught:
        find_family(config)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv"),
        ({"model_type": "mpt", "attn_config": {"clip_qkv": 6}}, "attn_config.clip_qkv"),
        (
            {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm",
        ),
    ],
)
def test_settings_that_change_the_function_are_refused(config, key):
    with pytest.raises(FamilyError, match="Not rescaled") as caught:
        find_family(config)
    assert f"{key} = " in str(caught.value)
    unset = {"model_type": config["model_type"], "clip_qkv": None, "attn_config": {"clip_qkv": None}}
    assert find_family(unset).name == config["model_type"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "falcon"}, "falcon_mqa"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "multi_query": True}, "falcon"),
        ({"model_type": "falcon", "multi_query": False}, "falcon_mha"),
        ({"model_type": "gpt_bigcode"}, "gpt_bigcode"),
        ({"model_type": "gpt_bigcode", "multi_query": False}, "gpt_bigcode_mha"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "deepseek_v3_half"),
    ],
)
def test_a_silent_config_counts_as_the_default(config, name):
    assert find_family(config).name == name


def test_defaults_are_those_of_the_config_classes():
    """What a config.json leaves out is what transformers would fill in: tied heads and the rotated share."""
    from transformers import AutoConfig

    for family in families():
        for model_type in family.model_types:
            config = AutoConfig.for_model(model_type)
            if family.tied is not None:
                assert family.tied[2] >= bool(config.tie_word_embeddings), model_type
            rope = getattr(config, "rope_parameters", None) or {}
            if family.rope != "none" and "partial_rotary_factor" in rope:
                assert next(values_of(family.rotary, {}, {"d": 64})) == rope["partial_rotary_factor"], model_type


def test_variants_of_one_model_type_are_told_apart_by_config():
    assert find_family({"model_type": "opt"}).name == "opt"
    assert find_family({"model_type": "opt", "do_layer_norm_before": False}).name == "opt_postln"
