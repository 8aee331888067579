"""Activation statistics against numpy and scipy over everything that was captured, and against transformers' states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quant_tiny import save_tokenizer, tiny_checkpoint, tiny_sample
from scipy import stats
from tiny_models import make_model

from vrscope.activations import tables
from vrscope.activations.capture import find_sites, run_windows, watching
from vrscope.activations.channels import ChannelSums, channel_part
from vrscope.activations.profile import ActivationProfile, profile_activations, profile_checkpoint
from vrscope.activations.residual import layer_stacks
from vrscope.activations.statistics import ACTIVATION_STATISTICS
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.errors import ModelError
from vrscope.quant import memory
from vrscope.quant.loading import LoadedModel, load_model
from vrscope.quant.memory import run_bytes
from vrscope.stages import read_roles, read_sample
from vrscope.tables import Report, from_json, to_json

Inputs = dict[str, np.ndarray]


def profiled(checkpoint: Checkpoint, dtype: str = "float32") -> ActivationProfile:
    sample = tiny_sample(checkpoint)
    return profile_checkpoint(checkpoint, read_roles(checkpoint)[0], sample, ("cpu", dtype))


def everything(checkpoint: Checkpoint, loaded: LoadedModel) -> Inputs:
    """Return all inputs of each tensor, `(tokens, channels)` in float64."""
    found: dict[str, list[np.ndarray]] = {}
    sites = find_sites(loaded, checkpoint, read_roles(checkpoint)[0])

    def keep(own, inputs, output):
        for site in own:
            rows = inputs.double().numpy().copy()
            if site.index:
                rows = rows[np.any(rows != 0, axis=1)]
            found.setdefault(site.tensor, []).append(rows)

    with watching(sites, keep):
        run_windows(loaded, tiny_sample(checkpoint))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def saved(model: torch.nn.Module, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "mixtral", "gpt_oss", "llama4", "gemma2"])
def test_statistics_are_those_of_scipy_over_all_inputs(case: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(case, tmp_path)
    loaded = load_model(checkpoint, "cpu", "float32")
    sample = tiny_sample(checkpoint)
    profile = profile_activations(loaded, checkpoint, read_roles(checkpoint)[0], sample)
    expected = everything(checkpoint, loaded)
    assert {name for name, entry in profile.inputs.items() if entry.statistics.tokens} == set(expected)
    assert profile.tokens == sample.tokens and profile.windows == len(sample.windows) > 1
    rows = tables.input_table(profile).set_index("tensor")
    channels = tables.channel_table(profile)
    for name, x in expected.items():
        row, channel = rows.loc[name], channels[channels["tensor"] == name]
        assert row["tokens"] == len(x) and row["channels"] == x.shape[1] == len(channel)
        maxima, means = np.abs(x).max(axis=0), np.abs(x).mean(axis=0)
        large = (np.abs(x) >= 6).mean(axis=0)
        wanted = {
            "absmax": np.abs(x).max(),
            "mean_abs": np.abs(x).mean(),
            "std": x.std(),
            "kurtosis_excess": stats.kurtosis(x, axis=None),
            "channel_spread": maxima.max() / np.median(maxima),
            "mean_abs_spread": means.max() / np.median(means),
            "large_share": large.mean(),
            "outlier_channels": (large >= 0.06).sum(),
        }
        if len(x) > 2:
            wanted["channel_kurtosis_max"] = stats.kurtosis(x, axis=0).max()
        for column, value in wanted.items():
            assert row[column] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, column)
        np.testing.assert_allclose(channel["absmax"], maxima, rtol=1e-7)
        np.testing.assert_allclose(channel["mean_abs"], means, rtol=1e-7)
        np.testing.assert_allclose(channel["std"], x.std(axis=0), rtol=1e-6, atol=1e-12)
        if len(x) > 2:
            np.testing.assert_allclose(channel["kurtosis_excess"], stats.kurtosis(x, axis=0), rtol=1e-5, atol=1e-6)
    assert set(rows.columns) >= {statistic.name for statistic in ACTIVATION_STATISTICS}
    assert [c.name for c in tables.ACTIVATION_COLUMNS] == ["tensor", *rows.columns]


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "falcon", "jamba", "gemma3-multimodal"])
def test_the_residual_stream_is_that_of_transformers(case: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(case, tmp_path)
    loaded = load_model(checkpoint, "cpu", "float32")
    sample = tiny_sample(checkpoint)
    profile = profile_activations(loaded, checkpoint, read_roles(checkpoint)[0], sample)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    states = []
    for window in sample.windows:
        with torch.no_grad():
            found = loaded.model(input_ids=torch.tensor([window]), output_hidden_states=True)
        states.append([state[0].double().numpy() for state in found.hidden_states])
    depths = len(states[0])
    table = tables.residual_table(profile)
    assert list(table["layer"]) == list(range(depths))
    for layer in range(depths - 1):  # transformers' last state went through the final norm
        row = table.iloc[layer]
        x = np.concatenate([window[layer] for window in states])
        tops = np.mean([np.sort(np.abs(window[layer]), axis=None)[:-4:-1] for window in states], axis=0)
        assert row[["top1", "top2", "top3"]].tolist() == pytest.approx(tops, rel=1e-6)
        assert row["median_abs"] == pytest.approx(np.median(np.abs(x)), rel=4e-3)
        assert row["top1_ratio"] == pytest.approx(tops[0] / row["median_abs"], rel=1e-6)
        assert row["std"] == pytest.approx(x.std(), rel=1e-6) and row["tokens"] == sample.tokens
        place = row["peak_window"], row["peak_position"], row["peak_channel"]
        assert abs(states[place[0]][layer][place[1], place[2]]) == pytest.approx(np.abs(x).max(), rel=1e-6)


def test_massive_activations_are_found_and_counted(tmp_path: Path) -> None:
    model = make_model("llama")
    token = tiny_sample(tiny_checkpoint("llama", tmp_path / "a")).windows[0][5]
    with torch.no_grad():
        model.model.embed_tokens.weight[token, 17] = -5000.0
    profile = profiled(saved(model, tmp_path / "b"))
    first = profile.residual[0]
    sample = tiny_sample(open_checkpoint(tmp_path / "b"))
    times = sum(window.count(token) for window in sample.windows)
    assert times >= 1 and first.over_1000 == first.over_100 == times
    assert first.peak.magnitude == 5000 and first.peak.channel == 17
    assert sample.windows[first.peak.window][first.peak.position] == token
    table = tables.residual_table(profile)
    means = np.mean([5000.0 if token in window else 0 for window in sample.windows])
    assert bool(table["massive"][0]) == (means > 100) and table["absmax"][0] == 5000
    assert tables.residual_table(profiled(tiny_checkpoint("llama", tmp_path / "c")))["massive"].sum() == 0


def test_outlier_dimensions_need_a_quarter_of_the_layers_and_six_percent_of_the_positions(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[9] = 300.0
        model.model.layers[1].post_attention_layernorm.weight[4] = -300.0
    checkpoint = saved(model, tmp_path)
    profile = profiled(checkpoint)
    table = tables.outlier_table(profile)
    inputs = everything(checkpoint, load_model(checkpoint, "cpu", "float32"))
    expected = set()
    for roles, first in (
        ("self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", "self_attn.q_proj"),
        ("self_attn.o_proj", "self_attn.o_proj"),
        ("mlp.gate_proj, mlp.up_proj", "mlp.gate_proj"),
        ("mlp.down_proj", "mlp.down_proj"),
    ):
        large = np.array([(np.abs(inputs[f"model.layers.{k}.{first}.weight"]) >= 6).mean(axis=0) for k in (0, 1)])
        found = np.flatnonzero((large >= 0.06).mean(axis=0) >= 0.25)
        expected |= {(roles, int(channel)) for channel in found}
    listed = {(", ".join(sorted(row.roles.split(", "))), row.channel) for row in table.itertuples()}
    assert listed == {(", ".join(sorted(roles.split(", "))), channel) for roles, channel in expected}
    q = table[table["roles"].str.contains("q_proj")].set_index("channel")
    assert q.loc[9, "layers"] == 2 and q.loc[9, "layer_share"] == 1
    gate = table[table["roles"].str.contains("gate_proj")].set_index("channel")
    assert gate.loc[4, "layers"] == 1 and gate.loc[4, "layer_share"] == 0.5


def test_inputs_that_several_weights_share_are_marked(tmp_path: Path) -> None:
    profile = profiled(tiny_checkpoint("llama", tmp_path))
    shared = {name.split(".layers.")[1]: entry.shared_with for name, entry in profile.inputs.items()}
    assert shared["1.self_attn.v_proj.weight"] == shared["1.self_attn.k_proj.weight"]
    assert shared["1.self_attn.k_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert shared["0.mlp.up_proj.weight"] == "model.layers.0.mlp.gate_proj.weight"
    assert shared["0.mlp.down_proj.weight"] == "model.layers.0.mlp.down_proj.weight"
    assert shared["0.self_attn.o_proj.weight"] == "model.layers.0.self_attn.o_proj.weight"


def test_an_expert_that_saw_no_token_is_reported(tmp_path: Path) -> None:
    model = make_model("glm4_moe")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -1000.0
    profile = profiled(saved(model, tmp_path))
    table = tables.expert_table(profile)
    assert set(table["expert"]) == {0, 1, 2, 3} and set(table["layer"]) == {1}
    idle = table[table["tokens"] == 0]
    assert set(idle["expert"]) == {3} and len(idle) == 3 and idle["absmax"].isna().all()
    per_matrix = table.groupby("role")["tokens"].sum()
    assert (per_matrix == 2 * profile.tokens).all() and len(per_matrix) == 3
    assert table.groupby("role")["token_share"].sum().to_numpy() == pytest.approx(1)
    inputs = tables.input_table(profile).set_index("tensor")
    row = inputs.loc["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert row["tokens"] == 0 and np.isnan(row["absmax"]) and profile.unseen == ()
    frames = {"activations": tables.input_table(profile), "experts": table, "residual": tables.residual_table(profile)}
    again = from_json(to_json(Report("analyze", {}, (), frames))).tables
    assert len(again["experts"]) == len(table) and again["experts"]["absmax"].isna().sum() == 3


def test_tokens_routed_elsewhere_are_no_tokens_of_an_expert(tmp_path: Path) -> None:
    profile = profiled(tiny_checkpoint("llama4", tmp_path))
    table = tables.expert_table(profile)
    assert (table.groupby("role")["tokens"].sum() == profile.tokens).all()  # one expert per token
    assert table["tokens"].max() < profile.tokens


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            3,
            r"the inputs of model\.layers\.1\.mlp\.down_proj\.weight .*after .*up_",
        ),
        ("model.embed_tokens.weight", None, r"the hidden state at layer 0 \(window 1\), before the first linear"),
        ("lm_head.weight", 5, r"the model's output \(window 1\), after model\.layers\.1\.mlp\.down_proj"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_where_nan_or_infinity_begins_is_said(
    name: str, row: int | None, words: str, value: float, tmp_path: Path
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[slice(None) if row is None else row] = value
    if name == "lm_head.weight" and value == float("inf"):
        words = "NaN"  # infinity times inputs of both signs
    with pytest.raises(ModelError, match=words) as caught:
        profiled(saved(model, tmp_path))
    assert "\n" not in str(caught.value) and "--weights-only" in str(caught.value)


def test_bfloat16_runs_and_is_near(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path)
    exact, rough = (tables.input_table(profiled(checkpoint, dtype)) for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose(rough["std"], exact["std"], rtol=0.02)
    assert not np.array_equal(rough["std"], exact["std"])


def test_sums_do_not_depend_on_how_tokens_are_cut() -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_t(3, (200, 7)).astype(np.float32))
    whole, pieces = ChannelSums(7), ChannelSums(7)
    whole.add(channel_part(x))
    for piece in x.split([1, 99, 40, 60]):
        pieces.add(channel_part(piece))
    a, b = whole.statistics(), pieces.statistics()
    assert a.tokens == b.tokens == 200
    np.testing.assert_allclose(a.channels.kurtosis_excess, b.channels.kurtosis_excess, rtol=1e-10)
    np.testing.assert_allclose(a.channels.kurtosis_excess, stats.kurtosis(x.double().numpy()), rtol=1e-10)
    np.testing.assert_array_equal(a.large_share, b.large_share)


def test_an_input_changed_in_place_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    from vrscope.activations.capture import Site
    from vrscope.activations.profile import _Collector

    collector = _Collector("m", tiny_sample(tiny_checkpoint("llama", tmp_path)))
    first, second, third = (Site(name, (), slice(0, 4, 1), slice(0, 4, 1)) for name in "abc")
    x = torch.ones(5, 3)
    collector.on_linear((first,), x, x)
    collector.on_linear((second,), x, x)
    x.mul_(2)
    collector.on_linear((third,), x, x)
    assert collector.inputs[third].statistics().pooled.mean == 2
    assert collector.leader == {first: first, second: first, third: third}


def test_layer_lists_without_matrices_are_no_layers() -> None:
    assert [len(stack) for stack in layer_stacks(make_model("granite_swa"))] == [2]


def test_a_linear_weight_that_no_run_uses_is_named(tmp_path: Path) -> None:
    profile = profiled(tiny_checkpoint("bert-mlm", tmp_path))
    assert profile.unseen == ("cls.predictions.transform.dense.weight",)
    assert "cls.predictions" in tables.notes(profile)[0]


def test_too_little_memory_for_activations_is_said_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path)
    weights = 4 * sum(info.numel for info in checkpoint.tensors.values())
    needed = weights + run_bytes(checkpoint.config, 32, 4)
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - 1)
    with pytest.raises(
        ModelError, match=r"to run 32 tokens at once in float32.*bfloat16 if the command has it, fewer --tokens"
    ) as caught:
        profiled(checkpoint)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    profiled(checkpoint)


def test_the_estimate_counts_output_scores_and_layer() -> None:
    config = {"vocab_size": 1000, "num_attention_heads": 4, "hidden_size": 8, "intermediate_size": 16}
    assert run_bytes(config, 10, 4) == (10 * 1000 * 8 + 4 * 100 * 12 + 10 * (64 + 48) * 12) * 5 // 4
    assert run_bytes({"text_config": config}, 10, 4) == run_bytes(config, 10, 4)
    assert run_bytes({"vocab_size": "many"}, 10, 4) == 0


@pytest.mark.real
def test_smollm2_has_massive_first_tokens(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    sample = read_sample(checkpoint, None, 128)
    profile = profile_checkpoint(checkpoint, read_roles(checkpoint)[0], sample, ("cpu", "float32"))
    table = tables.residual_table(profile)
    assert len(table) == 31 and set(table.loc[table["massive"], "layer"]) == set(range(12, 29))
    assert (table["peak_position"][12:] == 0).all() and (table["peak_channel"][12:29] == 507).all()
    assert len(profile.inputs) == 210 and profile.unseen == ()
