"""The table of statistics is complete, described, and the only place that knows a statistic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from stats_oracle import checkpoint_of, weights

from vrscope.arch.roles import roles_from_names
from vrscope.stats import measure as measuring
from vrscope.stats.statistics import SPECTRAL_STATISTICS, STATISTICS, Statistic


@pytest.mark.parametrize("statistic", STATISTICS + SPECTRAL_STATISTICS, ids=lambda statistic: statistic.name)
def test_every_statistic_says_what_it_is(statistic: Statistic) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", statistic.name)
    assert re.fullmatch(r"[A-Z0-9].*[^.]\.", statistic.meaning)
    assert statistic.column.name == statistic.name


def test_names_are_unique() -> None:
    names = [statistic.name for statistic in STATISTICS + SPECTRAL_STATISTICS]
    assert len(set(names)) == len(names)


def test_a_new_entry_is_measured_without_another_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = Statistic("outlier_share_2sigma", "share", "Share beyond 2.", lambda summary: summary.share_beyond(2.0))
    monkeypatch.setattr(measuring, "STATISTICS", (*STATISTICS, share))
    monkeypatch.setattr(measuring, "TENSOR_COLUMNS", (*measuring.TENSOR_COLUMNS, share.column))
    checkpoint = checkpoint_of(tmp_path, w=weights((50, 50), "F32"))
    frame = measuring.measure_tensors(checkpoint, roles_from_names(checkpoint.tensors))
    assert 0.02 < frame["outlier_share_2sigma"][0] < 0.08
