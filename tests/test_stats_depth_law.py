"""The depth law against scipy's linear regression."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from stats_oracle import checkpoint_of, weights

from vrscope.arch.roles import roles_from_names
from vrscope.stats.depth_law import DEPTH_LAW_COLUMNS, fit_depth_law
from vrscope.stats.measure import measure_tensors


def table(stds: dict[str, list[float]], kind: str = "linear") -> pd.DataFrame:
    rows = [(role, layer, kind, std) for role, values in stds.items() for layer, std in enumerate(values)]
    return pd.DataFrame(rows, columns=["role", "layer", "kind", "std"]).astype({"layer": "Int64"})


def test_the_fit_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    stds = {
        role: list(0.02 * np.arange(1, 13) ** -p * np.exp(0.1 * rng.normal(size=12)))
        for role, p in [("q", 0.5), ("k", -0.2)]
    }
    fitted = fit_depth_law(table(stds)).set_index("role")
    assert list(fitted.reset_index().columns) == [column.name for column in DEPTH_LAW_COLUMNS]
    for role, values in stds.items():
        line = scipy.stats.linregress(np.log(np.arange(1, 13)), np.log(values))
        row = fitted.loc[role]
        assert row["layers"] == 12
        assert row["exponent_p"] == pytest.approx(-line.slope, rel=1e-9)
        assert row["exponent_sem"] == pytest.approx(line.stderr, rel=1e-9)
        assert row["sigma_1"] == pytest.approx(math.exp(line.intercept), rel=1e-9)
        assert row["r_squared"] == pytest.approx(line.rvalue**2, rel=1e-9)


def test_a_law_that_holds_is_found_exactly() -> None:
    law = fit_depth_law(table({"lir": [0.02 / math.sqrt(layer) for layer in range(1, 9)], "flat": [0.3] * 5}))
    np.testing.assert_allclose(law["exponent_p"], [0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(law["exponent_sem"], [0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(law["sigma_1"], [0.02, 0.3])
    assert law["r_squared"][0] == pytest.approx(1.0)
    assert math.isnan(law["r_squared"][1])


def test_three_layers_are_needed_and_only_positive_spreads_of_weights_count() -> None:
    assert fit_depth_law(table({"two": [1.0, 0.5]})).empty
    assert list(fit_depth_law(table({})).columns) == [column.name for column in DEPTH_LAW_COLUMNS]
    assert fit_depth_law(table({"constant": [1.0, 0.5, 0.0, math.nan]})).empty
    assert fit_depth_law(table({"norm": [1.0, 0.5, 0.4, 0.3]}, kind="norm")).empty
    gap = table({"gap": [1.0, 9.0, 1 / 3, 1 / 4]}).drop(index=1)
    assert fit_depth_law(gap)["exponent_p"][0] == pytest.approx(1.0)
    outside = table({"embed": [1.0, 0.5, 0.25]})
    outside["layer"] = outside["layer"].where(outside["layer"] > 5)
    assert fit_depth_law(outside).empty


def test_several_tensors_of_a_layer_count_once() -> None:
    one = table({"experts": [1.0, 0.5, 0.3, 0.2]})
    pairs = pd.concat([one.assign(std=one["std"] * 2), one.assign(std=one["std"] / 2)])
    pd.testing.assert_frame_equal(fit_depth_law(pairs), fit_depth_law(one), rtol=1e-9, atol=1e-9)


def test_it_reads_the_table_that_measure_writes(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.q_proj.weight": weights((30, 40), "F32", i, scale=1 / (i + 1)) for i in range(4)}
    checkpoint = checkpoint_of(tmp_path, **tensors)
    law = fit_depth_law(measure_tensors(checkpoint, roles_from_names(checkpoint.tensors)))
    assert list(law["role"]) == ["q_proj"]
    assert law["exponent_p"][0] == pytest.approx(1.0, abs=0.1)
