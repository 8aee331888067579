"""Scales that norms undo up to their eps: exact without eps, bounded with it, refused where they would not hold."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from test_families import Float64Casts, broken, without
from tiny_models import MODELS, inputs, make_model, save_tiny

import vrscope
from vrscope import api, cli
from vrscope.arch.approximate import norm_eps
from vrscope.arch.binding import bind, find_family, own_config
from vrscope.checkpoint.source import open_checkpoint
from vrscope.demo import demo_model
from vrscope.errors import PlanError, VerificationError
from vrscope.executors import Serial
from vrscope.progress import silent
from vrscope.quant.loading import remove_eps
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.bounds import describe_bounds, mean_squares
from vrscope.rescale.methods import MethodOptions, Situation, tvr_system
from vrscope.rescale.plan import PLAN_FILE, RescalePlan
from vrscope.rescale.planning import make_plan
from vrscope.rescale.profile import profile_weights

NONE = {"olmo", "mistral3", "qwen2_vl", "qwen2_5_vl"}  # a norm without a gain; a vision tower writes the stream


def limited(binding):
    """Return the binding with its approximate spaces alone."""
    return dataclasses.replace(binding, spaces=tuple(space for space in binding.spaces if space.limit))


def planned(folder, **options):
    """Return checkpoint, binding, plan and surveys of random scales on the approximate spaces alone."""
    checkpoint = open_checkpoint(folder)
    binding = limited(bind(checkpoint, approximate=True))
    settings = MethodOptions(approximate=True, **options)
    return checkpoint, binding, *make_plan(checkpoint, binding, "random", settings, Serial(), silent)


def rescaled(folder, out, **options):
    checkpoint, binding, plan, _ = planned(folder, **options)
    return apply_plan(checkpoint, binding, plan, out, force=False, progress=silent)


def load(folder, case, dtype=torch.float64):
    return getattr(transformers, MODELS[case][2]).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


def run(model, dtype=torch.float64):
    with torch.no_grad(), Float64Casts() if dtype == torch.float64 else torch.device("cpu"):
        found = model.eval()(**inputs(model, dtype))
    return found.last_hidden_state if getattr(found, "logits", None) is None else found.logits


def distance(first, second):
    return float((first - second).abs().max() / first.abs().max())


@pytest.mark.parametrize("case", [case for case in MODELS if case not in NONE])
def test_growing_is_exact_without_eps_and_within_reach_of_it_with_eps(case, tmp_path):
    """Real factors of 1 to 4 on every approximate space, in float64: algebra first, then what the shipped eps does."""
    folder = save_tiny(case, tmp_path / "model", torch.float64)
    checkpoint, binding, plan, surveys = planned(folder, scales="free")
    names = [space.name for space in (*bind(checkpoint).spaces, *binding.spaces)]
    assert sorted(names) == sorted({space.name for space in bind(checkpoint, approximate=True).spaces})
    apply_plan(checkpoint, binding, plan, tmp_path / "out", force=False, progress=silent)
    assert plan.equivalent == "equal up to eps" and plan.changed and min(v.min() for v in plan.spaces.values()) >= 1
    models = [load(path, case) for path in (folder, tmp_path / "out")]
    shipped = distance(*map(run, models))
    for model in models:
        remove_eps(model)
    assert distance(*map(run, models)) < 1e-12
    # A norm's output moves by at most its bound; what follows amplifies that, most where scores are not divided (T5).
    assert shipped < 100 * describe_bounds(binding, plan, surveys.before.mean_squares)["bound"].sum() + 1e-13
    assert shipped < 2e-3


@pytest.mark.parametrize("case", ["llama-tied", "gpt2", "olmo2", "gemma3", "bert-mlm", "deepseek_v3", "jamba", "vit"])
def test_powers_of_two_are_bit_equal_without_eps_and_undone_byte_for_byte(case, tmp_path):
    folder = save_tiny(case, tmp_path / "model")
    plan = rescaled(folder, tmp_path / "out")
    assert plan.equivalent == "equal up to eps" and min(values.min() for values in plan.spaces.values()) >= 1
    models = [load(path, case, torch.float32) for path in (folder, tmp_path / "out")]
    for model in models:
        remove_eps(model)
    assert torch.equal(*(run(model, torch.float32) for model in models))
    undo = RescalePlan.load(tmp_path / "out" / PLAN_FILE).inverse()
    assert undo.equivalent == "equal up to eps"
    back = open_checkpoint(tmp_path / "out")
    apply_plan(back, bind(back, approximate=True), undo, tmp_path / "back", force=False, progress=silent)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# ---- what it derives ----


def spaces_of(folder):
    return {space.name: space for space in bind(open_checkpoint(folder), approximate=True).spaces if space.limit}


def test_nothing_changes_unless_it_is_asked_for(tmp_path):
    folder = save_tiny("gemma3", tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    exact, both = bind(checkpoint), bind(checkpoint, approximate=True)
    assert all(space.limit is None for space in exact.spaces)
    assert [s.name for s in both.spaces if s.limit is None] == [s.name for s in exact.spaces]
    plan = vrscope.plan(folder, method="random")
    assert plan.equivalent == "bit-equal" and "approximate" not in json.loads(plan.to_json())
    assert not {"approximate", "allow_shrink"} & set(plan.settings)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("llama", {"res": 1}),
        ("gemma3", {"res": 1, "model.layers.0:q0": 4, "model.layers.0:k0": 2, "model.layers.1:o1": 1}),
        ("olmo2", {"res": 1, "model.layers.0:q0": 1, "model.layers.0:k0": 1, "model.layers.1:m1": 1}),
        ("bitnet", {"res": 1, "model.layers.0:ctx": 1, "model.layers.0:h": 1}),
        ("bert-mlm", {"emb": 1, "encoder.layer.0:s1": 1, "encoder.layer.1:s2": 1}),
    ],
)
def test_one_scale_per_thing_that_a_norm_averages(case, sizes, tmp_path):
    found = {
        name.removeprefix("bert."): space.size for name, space in spaces_of(save_tiny(case, tmp_path / "m")).items()
    }
    assert {name: found.get(name) for name in sizes} == sizes


def test_a_declared_eps_is_that_of_the_model():
    """Every norm of every model type, with an eps in its configuration that no class has by default."""
    for case, (config_name, arguments, model_name) in MODELS.items():
        kind = getattr(transformers, config_name)
        plain = kind(**arguments).to_dict()
        family = find_family(plain)
        lines = [line for found in family.lines.values() for line in found if line.kind == "norm"]
        odd = {line.eps: 3e-4 for line in lines if norm_eps(line.eps, {}) is None}
        nested = (
            {"text_config": {**arguments["text_config"], **odd}}
            if family.inside and "text_config" in arguments
            else odd
        )
        config = kind(**{**arguments, **nested})
        with torch.device("meta"):
            model = getattr(transformers, model_name)(config)
        known = {line.stem.split(".")[-1]: norm_eps(line.eps, own_config(family, config.to_dict())) for line in lines}
        checked = 0
        for name, module in model.named_modules():
            eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
            stem = name.split(".")[-1]
            if eps is not None and stem in known and not any(word in name for word in ("vision", "visual")):
                assert eps == known[stem], (case, name)
                checked += 1
        assert checked or not lines, case


def edited(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def test_an_unknown_eps_is_refused_with_the_reason(tmp_path):
    folder = save_tiny("qwen3", tmp_path / "model")
    edited(folder, lambda config: {key: value for key, value in config.items() if key != "rms_norm_eps"})
    binding = bind(open_checkpoint(folder), approximate=True)
    assert not limited(binding).spaces
    reasons = dict(binding.rigid)
    assert "whose eps is unknown: config.json does not give it as rms_norm_eps" in reasons["res"]
    scales = {"res": np.ones(1, np.int64)}
    plan = RescalePlan(binding.family, "x", {}, "pow2", scales, "", approximate={"res": 1e-6})
    with pytest.raises(PlanError, match="eps is unknown"):
        vrscope.rescale(folder, tmp_path / "out", plan=plan)


def test_streams_with_undeclared_writers_are_refused(tmp_path):
    whisper = dict(bind(open_checkpoint(save_tiny("whisper", tmp_path / "w")), approximate=True).rigid)
    assert whisper["eres"] == "at the convolutions, which no scale passes through"
    tower = dict(bind(open_checkpoint(save_tiny("qwen2_vl", tmp_path / "v")), approximate=True).rigid)
    assert tower["res"].startswith("a part of the model that is not declared")
    bert = dict(bind(open_checkpoint(save_tiny("bert", tmp_path / "b"))).rigid)
    assert bert["pooled"] == "at the pooler activation, which no scale passes through"


def test_a_model_without_a_head_keeps_its_hidden_states(tmp_path):
    """Only a head that is the embedding matrix needs the final norm to make up for it; a base model's output stays."""
    model = make_model("llama").model.double()
    model.save_pretrained(tmp_path / "model")
    rescaled(tmp_path / "model", tmp_path / "out", scales="free")
    states = []
    for name in ("model", "out"):
        loaded = transformers.AutoModel.from_pretrained(
            tmp_path / name, dtype=torch.float64, attn_implementation="eager"
        )
        remove_eps(loaded)
        states.append(run(loaded))
    assert distance(*states) < 1e-12


# ---- wrong twins: each must show ----


def everything(term):
    return dataclasses.replace(term, index=np.maximum(term.index, 0))


TWINS = {
    "tied head not compensated": ("llama-tied", "res", without("model.norm")),
    "position embeddings forgotten": ("gpt2", "res", without("wpe")),
    "bias of a writer forgotten": ("gpt2", "res", without("mlp.c_proj.bias")),
    "gain of a post-norm forgotten": ("olmo2", "res", without("post_attention_layernorm")),
    "linear reader of the stream forgotten": ("olmo2", "res", without("gate_proj")),
    "token types forgotten": ("bert", "emb", without("token_type")),
    "tied decoder not compensated": ("bert-mlm", "emb", without("transform.LayerNorm")),
    "class token forgotten": ("vit", "res", without("cls_token")),
    "rotated key taken into the latent": ("deepseek_v3", "c0", everything),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_rule_shows_even_without_eps(twin, tmp_path):
    case, part, change = TWINS[twin]
    folder = save_tiny(case, tmp_path / "model", torch.float64)
    checkpoint, binding, _, _ = planned(folder)
    space = next(space for space in binding.spaces if space.name.split(":")[-1] == part)
    wrong = dataclasses.replace(binding, spaces=(broken(space, change),))
    grown = {space.name: np.full(space.size, 2)}
    limits = {space.name: space.limit.eps}
    plan = RescalePlan(binding.family, "twin", {}, "pow2", grown, checkpoint.fingerprint(), approximate=limits)
    apply_plan(checkpoint, wrong, plan, tmp_path / "out", force=False, progress=silent)
    models = [load(path, case) for path in (folder, tmp_path / "out")]
    for model in models:
        remove_eps(model)
    assert distance(*map(run, models)) > 1e-3


# ---- growing and shrinking ----


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    return save_tiny("gemma3", tmp_path_factory.mktemp("gemma3") / "model")


def test_shrinking_has_to_be_asked_for_and_ends_at_an_eighth(gemma3, tmp_path):
    def lowest(**options):
        plan = vrscope.plan(gemma3, method="random", approximate=True, **options)
        return plan, min(plan.spaces[name].min() for name in plan.approximate)

    grown, least = lowest()
    assert least == 1 and grown.settings["approximate"] is True and grown.settings["allow_shrink"] is False
    shrunk, least = lowest(allow_shrink=True)
    assert least == -3
    vrscope.rescale(gemma3, tmp_path / "asked", plan=shrunk)
    silently = dataclasses.replace(shrunk, settings={"approximate": True})
    with pytest.raises(PlanError, match="shrinks the input of a norm"):
        vrscope.rescale(gemma3, tmp_path / "out", plan=silently)
    with pytest.raises(PlanError, match="shrinks the input of a norm"):
        vrscope.verify(gemma3, tmp_path / "asked", plan=silently)
    for scales in ("pow2", "free"):
        fitted = vrscope.plan(gemma3, method="tvr", scales=scales, approximate=True, target_std=1e-3)
        values = [fitted.spaces[name] for name in fitted.approximate]
        assert all(value.min() >= (0 if scales == "pow2" else 1) for value in values)


def test_a_plan_cannot_pass_an_approximate_space_off_as_exact(gemma3, tmp_path):
    plan = vrscope.plan(gemma3, method="random", approximate=True)
    for claimed in ({}, dict.fromkeys(plan.approximate, 1e-9)):
        with pytest.raises(PlanError):
            vrscope.rescale(gemma3, tmp_path / "out", plan=dataclasses.replace(plan, approximate=claimed))
    assert not (tmp_path / "out").exists()
    undone = plan.then(plan.inverse())
    assert undone.equivalent == "bit-equal" and undone.changed == 0
    assert RescalePlan.from_json(plan.to_json()).approximate == plan.approximate


def test_tvr_comes_nearer_with_more_to_scale(tmp_path):
    """Sandwich and qk-norms free every matrix: rank 14 of 14 where exact scales reach 8 (gemma3, two layers)."""
    checkpoint = open_checkpoint(save_tiny("gemma3", tmp_path / "model"))
    ranks, left = [], []
    for approximate in (False, True):
        binding = bind(checkpoint, approximate=approximate)
        options = MethodOptions(scales="free", target_std=0.5, approximate=approximate)
        plan, _ = make_plan(checkpoint, binding, "tvr", options, Serial(), silent)
        profile = profile_weights(checkpoint, binding, Serial(), silent)
        system = tvr_system(Situation(binding, profile, options))
        ranks.append(np.linalg.matrix_rank(system.matrix))
        chosen = [np.log2(plan.spaces.get(space.name, np.ones(1)))[0] for space in binding.spaces]
        left.append(np.linalg.norm(system.matrix @ chosen - system.wanted))
    assert ranks == [8, 14] and left[1] < 0.2 * left[0]


# ---- the bound ----


def test_the_bound_holds_for_every_token_and_is_no_larger_than_it_must_be(tmp_path):
    """The first norm of a llama, whose input is an embedding: its output's change against eps/2 |1/(s^2 m) - 1/m|."""
    folder = save_tiny("llama", tmp_path / "model", torch.float64)
    _, binding, _, surveys = planned(folder)
    (space,) = binding.spaces
    eps, table = 1e-3, load(folder, "llama").model.embed_tokens.weight.detach()
    for exponent in (-3, -1, 1, 6):
        m, scale = (table**2).mean(1), 2.0**exponent
        before, after = table / (m + eps).sqrt()[:, None], table * scale / (m * scale**2 + eps).sqrt()[:, None]
        change = (after - before).norm(dim=1) / before.norm(dim=1)
        bound = eps / 2 * (1 / (scale**2 * m) - 1 / m).abs()
        assert bool((change <= bound).all()) and float((change / bound).min()) > 0.2
    assert surveys.before.mean_squares[space.name][0] == pytest.approx(float(m.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("case", "part", "module"),
    [
        ("qwen3", "q0", "model.layers.0.self_attn.q_norm"),
        ("gemma3", "k0", "model.layers.0.self_attn.k_norm"),
        ("deepseek_v3", "c0", "model.layers.0.self_attn.kv_a_layernorm"),
        ("bert", "emb", "embeddings.LayerNorm"),
    ],
)
def test_the_estimated_mean_square_is_of_the_order_of_the_measured_one(case, part, module, tmp_path):
    folder = save_tiny(case, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint, approximate=True)
    profile = profile_weights(checkpoint, binding, Serial(), silent)
    space = next(space for space in binding.spaces if space.name.split(":")[-1] == part)
    model, seen = load(folder, case, torch.float32), []
    model.get_submodule(module).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    run(model, torch.float32)
    measured = float(seen[0].pow(2).mean())
    assert measured / 3 < mean_squares(space, binding, profile).mean() < measured * 3


# ---- through the interface ----


def test_the_whole_way_on_the_demo_model(tmp_path):
    plan = vrscope.plan(demo_model(), method="random", approximate=True)
    report = api.describe(demo_model(), plan)
    frame = report.tables["approximate"]
    assert list(frame["space"]) == ["res"] and 0 < frame["bound"][0] < 1e-2
    assert "up to eps" in report.verdict[0]["text"] and report.provenance["equivalent"] == "equal up to eps"
    assert "approximate" not in api.describe(demo_model(), vrscope.plan(demo_model())).tables
    vrscope.rescale(demo_model(), tmp_path / "out", plan=plan)
    proof = vrscope.verify(demo_model(), tmp_path / "out", logits=True, tokens=64)
    assert set(proof.tables["proof"]["result"]) <= {"equal up to eps", "bit-equal"}
    assert proof.tables["proof"]["result"][0] == "equal up to eps"
    assert "spaces feed norms that undo their scale up to eps" in proof.tables["proof"]["detail"][0]
    assert "of the largest" in proof.tables["proof"]["detail"][1]
    api.save(report, tmp_path / "saved")
    page = (tmp_path / "saved" / "report.html").read_text()
    assert "Equal up to eps" in page and "mean square m of the input" in page


def test_check_family_tells_a_right_stream_from_a_wrong_one(tmp_path):
    folder = save_tiny("gpt2", tmp_path / "model")
    rows = api.check_family(folder, approximate=True).tables["proof"]
    assert dict(zip(rows["check"], rows["result"], strict=True))["outputs, float32, eps = 0"] == "bit-equal"
    families = tmp_path / "my.toml"
    families.write_text('[mine]\nlike = "gpt2"\nmodel_types = ["gpt2"]\ntop."{p}wpe" = "fixed"\n')
    assert "residual" not in str(api.check_family(folder, families=families).tables["proof"])
    with pytest.raises(VerificationError, match=r"residual \(res\)"):
        api.check_family(folder, families=families, approximate=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "m", "--approximate"], "--approximate does nothing for method 'wisca'"),
        (["plan", "m", "--method", "tvr", "--allow-shrink"], "does nothing without --approximate"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, words, capsys):
    assert cli.main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    with pytest.raises(PlanError, match="approximate"):
        vrscope.plan(demo_model(), **({"approximate": True} if "tvr" not in arguments else {"allow_shrink": True}))
