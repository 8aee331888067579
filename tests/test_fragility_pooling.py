"""Statistics of joined weights against those measured on the joined values themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from quant_tiny import START, STOP, text, tiny_checkpoint

from vrscope import api
from vrscope.activations.capture import find_sites, run_windows, watching
from vrscope.fragility.correlation import statistics_of
from vrscope.fragility.pooling import pooled
from vrscope.quant.formats import get_format
from vrscope.quant.loading import load_model
from vrscope.quant.weights import weight_error
from vrscope.stages import read_roles
from vrscope.stats.measure import measure_tensors

JOINED = {"ab": ("a", "b"), "half known": ("a", "nowhere")}


def table(parts: dict[str, np.ndarray]) -> pd.DataFrame:
    from scipy import stats

    return pd.DataFrame(
        {
            "tensor": name, "layer": 3, "count": x.size, "mean": x.mean(), "std": x.std(), "skewness": stats.skew(x),
            "kurtosis_excess": stats.kurtosis(x), "absmax": abs(x).max(), "zero_share": (x == 0).mean(),
            "frobenius_norm": np.linalg.norm(x), "stable_rank": 2.0,
        }
        for name, x in parts.items()
    )  # fmt: skip


def test_moments_norms_and_extremes_are_those_of_all_values_together() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.normal(0.5, 2.0, 3000), rng.gamma(1.0, 0.3, 500)
    second[:20] = 0.0
    found = pooled({"tensors": table({"a": first, "b": second})}, JOINED)["tensors"].set_index("tensor")
    assert list(found.index) == ["a", "b", "ab"], "no row for what has an unknown part"
    expected = table({"ab": np.concatenate([first, second])}).iloc[0]
    for name in ("layer", "count", "mean", "std", "skewness", "kurtosis_excess", "absmax", "zero_share"):
        assert found.loc["ab", name] == pytest.approx(expected[name], rel=1e-9), name
    assert found.loc["ab", "frobenius_norm"] == pytest.approx(expected["frobenius_norm"])
    assert found.loc["ab", "variance"] == pytest.approx(expected["std"] ** 2)
    assert np.isnan(found.loc["ab", "stable_rank"]), "it does not follow from the parts"


def test_tables_without_the_statistics_stay_as_they_are() -> None:
    tables = {
        "activations": pd.DataFrame({"tensor": ["a", "b"], "absmax": 1.0}),
        "tensors": pd.DataFrame({"tensor": []}),
    }
    found = pooled(tables, JOINED)
    assert all(found[name] is frame for name, frame in tables.items())


@pytest.mark.parametrize("scheme", ["nf4", "int8-row"])
def test_a_stack_of_experts_has_the_errors_of_the_weight_that_runs(scheme: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("mixtral", tmp_path)
    roles, _ = read_roles(checkpoint)
    model = load_model(checkpoint, "cpu", "float32").model
    name = "model.layers.1.mlp.experts.gate_up_proj"
    parts = [f"model.layers.1.block_sparse_moe.experts.{k}.{end}.weight" for k in range(4) for end in ("w1", "w3")]
    entry = get_format(scheme)
    tables = {"tensors": measure_tensors(checkpoint, roles), "weight_error": weight_error(checkpoint, roles, [entry])}
    found = pooled(tables, {name: parts})
    halves = [half for expert in model.model.layers[1].mlp.experts.gate_up_proj.data for half in expert.chunk(2)]
    error = np.concatenate([(entry.roundtrip(half.contiguous()) - half).flatten().numpy() for half in halves])
    weight = np.concatenate([half.flatten().numpy() for half in halves]).astype(np.float64)
    row = found["weight_error"].set_index("tensor").loc[name]
    relative = np.linalg.norm(error.astype(np.float64)) / np.linalg.norm(weight)
    assert row["relative_error"] == pytest.approx(relative, rel=1e-5)
    assert row["sqnr_db"] == pytest.approx(-20 * np.log10(relative), rel=1e-5)
    assert row["max_error"] == pytest.approx(abs(error).max(), rel=1e-5)
    row = found["tensors"].set_index("tensor").loc[name]
    assert row["std"] == pytest.approx(weight.std(), rel=1e-6) and row["absmax"] == abs(weight).max()


def test_every_unit_of_a_mixture_takes_part_in_the_correlation(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("mixtral", tmp_path / "model")
    (tmp_path / "text.txt").write_text(text(400))
    report = api.sensitivity(checkpoint.folder, tokens=64, text=tmp_path / "text.txt")
    units = report.tables["linears"]
    assert units["stacked"].sum() == 4 and len(units) > 4
    rows = report.tables["correlation"].set_index("statistic")
    every = ("std", "kurtosis_excess", "absmax", "frobenius_norm", "relative_error[nf4]", "input absmax", "input std")
    names = {name for row, more in rows["same_ranking"].items() for name in (row, *more.split(", "))}
    assert set(every) <= names
    for name in every:
        if name in rows.index:
            assert rows.loc[name, "n"] == len(units), name
    assert rows.loc["row_absmax_spread", "n"] == len(units) - 4
    assert any("joins from several tensors" in note for note in report.provenance["notes"])


def test_joined_inputs_are_all_inputs_of_the_stack(tmp_path: Path) -> None:
    from quant_tiny import tiny_sample

    from vrscope.activations.profile import profile_activations
    from vrscope.activations.tables import input_table

    checkpoint = tiny_checkpoint("mixtral", tmp_path)
    loaded, sample = load_model(checkpoint, "cpu", "float32"), tiny_sample(checkpoint)
    roles, _ = read_roles(checkpoint)
    sites = find_sites(loaded, checkpoint, roles)
    parts = [f"model.layers.0.block_sparse_moe.experts.{k}.w2.weight" for k in range(4)]
    seen = []

    def collect(own, inputs, output) -> None:  # type: ignore[no-untyped-def]
        if own[0].tensor in parts:
            seen.append(inputs.clone())

    with watching(sites, collect):
        run_windows(loaded, sample)
    profile = profile_activations(loaded, checkpoint, roles, sample, sites=sites, joined={"stack": parts})
    row = statistics_of({"activations": input_table(profile)})
    values = np.concatenate([x.numpy() for x in seen]).astype(np.float64)
    assert row["activations", "input absmax"]["stack"] == abs(values).max()
    assert row["activations", "input std"]["stack"] == pytest.approx(values.std(), rel=1e-6)


def test_an_encoder_under_other_names_takes_part_as_well(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert-mlm", tmp_path / "model", START, STOP)  # stored with a prefix, run without
    (tmp_path / "text.txt").write_text(text(400))
    report = api.sensitivity(checkpoint.folder, tokens=64, text=tmp_path / "text.txt")
    units = report.tables["linears"]
    assert all(name in checkpoint.tensors and name.startswith("bert.") for name in units["tensor"])
    assert report.tables["correlation"].set_index("statistic").loc["std", "n"] == len(units) == 12
    assert not any("not recognised" in note for note in report.provenance["notes"])
