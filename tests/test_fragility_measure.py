"""The damage of single units against hand-quantized models and scipy, and the tables made of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from quant_tiny import START, STOP, tiny_checkpoint, tiny_sample
from scipy import special

from vrscope import stages
from vrscope.activations.capture import find_sites
from vrscope.errors import ModelError
from vrscope.fragility.journal import Journal
from vrscope.fragility.measure import (
    ADDITIVITY_COLUMNS,
    EVERYTHING,
    SENSITIVITY_COLUMNS,
    Bench,
    Costs,
    additivity_table,
    divergence,
    measure_units,
    sensitivity_table,
)
from vrscope.fragility.units import Unit, find_linears, group
from vrscope.quant.formats import get_format
from vrscope.quant.layers import quantized
from vrscope.quant.loading import LoadedModel, load_model
from vrscope.quant.metrics import compare_predictions
from vrscope.quant.model import measure_model
from vrscope.quant.spool import Spool
from vrscope.quant.text import TextSample


def prepared(case: str, folder: Path, scheme: str, by: str = "tensor", **kind: str):
    checkpoint = tiny_checkpoint(case, folder, **kind)
    loaded, sample = load_model(checkpoint, "cpu", "float32"), tiny_sample(checkpoint)
    roles, _ = stages.read_roles(checkpoint)
    sites = find_sites(loaded, checkpoint, roles)
    return checkpoint, loaded, sample, group(find_linears(loaded, checkpoint, roles, get_format(scheme), sites), by)


def measured(loaded: LoadedModel, sample: TextSample, units: list[Unit], scheme: str) -> Journal:
    journal = Journal()
    with Spool() as spool:
        measure_units(Bench.of(loaded, sample, spool, units), units, get_format(scheme), journal)
    return journal


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 3.0, 200.0])
def test_divergence_is_that_of_scipy_from_tiny_to_huge(scale: float) -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(0, 3, (40, 500)).astype(np.float32)
    logits = (reference + scale * rng.normal(size=(40, 500))).astype(np.float32)
    logs = [special.log_softmax(x.astype(np.float64), axis=1) for x in (reference, logits)]
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1)
    found = divergence(torch.from_numpy(reference), torch.from_numpy(logits))
    if scale < 1e-4:  # where the oracle itself cancels, the second-order term is the truth
        d = logits.astype(np.float64) - reference
        p = np.exp(logs[0])
        expected = 0.5 * ((p * d**2).sum(1) - (p * d).sum(1) ** 2)
    assert found == pytest.approx(expected, rel=1e-5)


def test_divergence_of_equal_logits_is_zero_and_shifts_do_not_count() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    assert (divergence(logits, logits) == 0).all()
    assert (divergence(logits, logits + 2.0) < 1e-12).all()
    barred = logits.clone()
    barred[:, 3] = -math.inf
    assert (divergence(barred, barred) == 0).all() and np.isfinite(divergence(barred, logits)).all()
    assert np.isinf(divergence(logits, barred)).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 11, 12])
def test_divergence_has_the_same_bits_with_any_number_of_threads_and_of_rows_beside(rows: int) -> None:
    generator = torch.Generator().manual_seed(8)
    reference, logits = (4 * torch.randn(40, 50_000, generator=generator) for _ in range(2))
    whole = divergence(reference, logits)
    assert whole.max() > 20 > whole.min(), "both ways of summing are at work"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert (divergence(reference[:rows], logits[:rows]) == whole[:rows]).all()
    finally:
        torch.set_num_threads(before)


def test_divergence_agrees_with_the_damage_of_whole_models() -> None:
    generator = torch.Generator().manual_seed(4)
    reference, logits = (torch.randn(64, 300, generator=generator) for _ in range(2))
    assert divergence(reference, logits) == pytest.approx(
        compare_predictions(reference, logits, tuple(range(64))).kl, rel=1e-6
    )


@pytest.mark.parametrize(("case", "scheme"), [("llama", "nf4"), ("mixtral", "int4-g32"), ("gpt2", "int8-row")])
def test_each_unit_alone_does_the_damage_of_the_model_with_it_quantized(case: str, scheme: str, tmp_path: Path) -> None:
    _, loaded, sample, units = prepared(case, tmp_path, scheme)
    journal, entry = measured(loaded, sample, units, scheme), get_format(scheme)
    before = [loaded.run(window) for window in sample.windows]
    for unit in units:
        (linear,) = unit.linears
        kept = linear.weight.parameter.data.clone()
        for matrix in linear.weight.matrices(linear.weight.parameter.data):
            matrix.copy_(entry.roundtrip(matrix.contiguous()))
        pairs = zip(before, (loaded.run(window) for window in sample.windows), sample.windows, strict=True)
        kl = np.concatenate([compare_predictions(a, b, window).kl for a, b, window in pairs])
        linear.weight.parameter.data = kept
        figures = journal.done[unit.name]
        assert figures["damage"] == pytest.approx(kl.mean(), rel=1e-5) and figures["damage"] > 0
        assert figures["damage_sem"] == pytest.approx(kl.std(ddof=1) / math.sqrt(72), rel=1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_everything_at_once_is_the_damage_of_the_command_measure(scheme: str, tmp_path: Path) -> None:
    checkpoint, loaded, sample, units = prepared("llama", tmp_path, scheme, "layer")
    journal = measured(loaded, sample, units, scheme)
    row = measure_model({"original": checkpoint}, [get_format(scheme)], sample).iloc[1]
    assert journal.done[EVERYTHING]["damage"] == pytest.approx(row["kl"], rel=1e-5)
    assert journal.done[EVERYTHING]["damage_sem"] == pytest.approx(row["kl_sem"], rel=1e-5)


def test_encoders_are_ranked_by_relative_error(tmp_path: Path) -> None:
    checkpoint, loaded, sample, units = prepared("bert", tmp_path, "nf4", before=START, after=STOP)
    journal = measured(loaded, sample, units, "nf4")
    row = measure_model({"original": checkpoint}, [get_format("nf4")], sample).iloc[1]
    assert journal.done[EVERYTHING]["damage"] == pytest.approx(row["relative_error"], rel=1e-9)
    frame = sensitivity_table(units, journal, causal=False)
    assert frame["kl"].isna().all() and (frame["relative_error"] > 0).all()
    squares = frame["relative_error"] ** 2
    assert frame["share"].to_numpy() == pytest.approx((squares / squares.sum()).to_numpy())
    both = additivity_table(frame, journal, causal=False)
    assert both["relative_error"][1] == pytest.approx(math.sqrt(squares.sum()))


def test_the_table_is_ranked_and_its_shares_add_up(tmp_path: Path) -> None:
    _, loaded, sample, units = prepared("llama", tmp_path, "nf4")
    journal = measured(loaded, sample, units, "nf4")
    frame = sensitivity_table(units, journal, causal=True)
    assert list(frame.columns) == [column.name for column in SENSITIVITY_COLUMNS]
    assert frame["kl"].is_monotonic_decreasing and list(frame["rank"]) == list(range(1, 15))
    assert frame["share"].sum() == pytest.approx(1) and frame["cumulative_share"].iloc[-1] == pytest.approx(1)
    assert frame["cumulative_size_share"].iloc[-1] == 1 and frame["relative_error"].isna().all()
    assert {unit.name for unit in units} == set(frame["unit"])
    both = additivity_table(frame, journal, causal=True)
    assert list(both.columns) == [column.name for column in ADDITIVITY_COLUMNS]
    assert both["kl"].tolist() == [journal.done[EVERYTHING]["damage"], pytest.approx(frame["kl"].sum())]
    assert both["kl_sem"][1] == pytest.approx(math.sqrt((frame["kl_sem"] ** 2).sum()))


def test_only_missing_units_are_measured_and_progress_tells_the_time(tmp_path: Path) -> None:
    _, loaded, sample, units = prepared("llama", tmp_path, "nf4")
    journal, told = measured(loaded, sample, units, "nf4"), []
    last = units[-1].name
    again = Journal(None, {name: figures for name, figures in journal.done.items() if name != last})
    entry = get_format("nf4")
    with Spool() as spool:
        bench = Bench.of(loaded, sample, spool, units)
        seconds = measure_units(bench, units, entry, again, lambda *call: told.append(call))
        assert measure_units(bench, units, entry, again) == 0.0
    assert again.done == journal.done
    stage, _, total, unit = told[0]
    assert stage.startswith("1 units of 14, about ") and unit == "ms" and total == pytest.approx(1000 * seconds)
    assert told[-1][1] == total and len({call[0] for call in told}) == 1


def test_the_time_foreseen_falls_with_the_calls_that_are_replayed() -> None:
    costs = Costs(whole=3.0, tail=1.0, comparison=0.5)
    assert [costs.of(first, 4) for first in (0, 2, 4)] == [3.5, 2.5, 1.5]
    assert costs.of(0, 0) == 3.5


def test_a_model_whose_own_outputs_are_not_finite_is_refused(tmp_path: Path) -> None:
    _, loaded, sample, units = prepared("llama", tmp_path, "nf4")
    loaded.model.lm_head.weight.data[3, 3] = math.nan
    with Spool() as spool, pytest.raises(ModelError, match="expected finite outputs"):
        Bench.of(loaded, sample, spool, units)


def test_quantized_touches_only_the_weights_named(tmp_path: Path) -> None:
    _, loaded, _, units = prepared("llama", tmp_path, "nf4")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with quantized(loaded.model, get_format("nf4"), units[3].weights):
        changed = [name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [units[3].name]
