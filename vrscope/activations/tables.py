"""An activation profile as tables, with a description of every column."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vrscope.activations.channels import LARGE_SHARE, ChannelStatistics
from vrscope.activations.profile import ActivationProfile
from vrscope.activations.residual import ResidualStream
from vrscope.activations.statistics import ACTIVATION_STATISTICS
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

MASSIVE_RATIO, MASSIVE_MAGNITUDE = 1000, 100  # Sun et al. 2024, section 2
OUTLIER_LAYERS = 0.25  # of the layers, Dettmers et al. 2022, section 4.1

_TENSOR = Column("tensor", "", "Name on disk of the weight.")
_ROLE = Column("role", "", "Its name without layer and expert numbers.")
_LAYER = Column("layer", "", "Layer number from 0; empty outside the layers.")

ACTIVATION_COLUMNS: tuple[Column, ...] = (
    _TENSOR,
    _ROLE,
    _LAYER,
    Column("shared_with", "", "The first weight that has the same inputs; itself if it is the first."),
    Column("channels", "channels", "Number of input channels."),
    Column("tokens", "tokens", "Number of tokens that reached the weight; of stacked experts, of all together."),
    *(statistic.column for statistic in ACTIVATION_STATISTICS),
)
RESIDUAL_COLUMNS: tuple[Column, ...] = (
    Column("layer", "", "The layer that the hidden state enters, from 0; the last row is what leaves the last layer."),
    Column("top1", "", "Largest magnitude in a window of the text, mean over windows."),
    Column("top2", "", "Second largest magnitude in a window, mean over windows."),
    Column("top3", "", "Third largest magnitude in a window, mean over windows."),
    Column("median_abs", "", "Median magnitude, to 0.2 %."),
    Column("top1_ratio", "ratio", "top1 over the median magnitude."),
    Column("massive", "", "Whether top1 is above 100 and at least 1000 times the median."),
    Column("over_100", "values", "Number of values above 100 times the median."),
    Column("over_1000", "values", "Number of values above 1000 times the median."),
    Column("peak_window", "", "Window of the text in which the largest value of all stands, from 0."),
    Column("peak_position", "", "Its position in the window, from 0."),
    Column("peak_channel", "", "Its channel, from 0."),
    Column("tokens", "tokens", "Number of tokens."),
    *(statistic.column for statistic in ACTIVATION_STATISTICS),
)
OUTLIER_COLUMNS: tuple[Column, ...] = (
    Column("roles", "", "The roles of the weights whose common input it is."),
    Column("channel", "", "Dimension, from 0."),
    Column(
        "layers", "layers", "Number of layers in which it reaches a magnitude of 6 at 6 % of the positions or more."
    ),
    Column("layer_share", "share", "The same over the number of layers; 0.25 or more makes it an outlier dimension."),
    Column("position_share", "share", "Share of positions with a magnitude of 6 or more, mean over all layers."),
    Column("absmax", "", "Its largest magnitude in any layer."),
)
EXPERT_COLUMNS: tuple[Column, ...] = (
    Column("role", "", "Name of the weight without layer and expert numbers."),
    _LAYER,
    Column("expert", "", "Number of the expert, from 0."),
    Column("tokens", "tokens", "Number of tokens routed to it; 0 if it was never chosen."),
    Column("token_share", "share", "The same over the tokens routed to all experts of the layer."),
    Column("absmax", "", "Largest magnitude of its inputs; empty without tokens."),
)
CHANNEL_ACTIVATION_COLUMNS: tuple[Column, ...] = (
    _TENSOR,
    _ROLE,
    _LAYER,
    Column("channel", "", "Input channel, from 0."),
    Column("absmax", "", "Largest magnitude of the channel."),
    Column("mean_abs", "", "Mean magnitude over tokens."),
    Column("std", "", "Population standard deviation over tokens."),
    Column("kurtosis_excess", "", "Excess kurtosis over tokens, 0 for a normal distribution."),
    Column("large_share", "share", "Share of tokens with a magnitude of 6 or more."),
)


def input_table(profile: ActivationProfile) -> pd.DataFrame:
    """Return the table "activations": one row per linear weight, columns `ACTIVATION_COLUMNS`."""
    rows: list[list[object]] = [
        [
            *(entry.tensor, entry.role.role, entry.role.layer, entry.shared_with),
            *(entry.statistics.mean_abs.size, entry.statistics.tokens),
            *(float(statistic.value(entry.statistics)) for statistic in ACTIVATION_STATISTICS),
        ]
        for entry in profile.inputs.values()
    ]
    return _frame(rows, ACTIVATION_COLUMNS).astype({"layer": "Int64", "outlier_channels": "Int64"})


def residual_table(profile: ActivationProfile) -> pd.DataFrame:
    """Return the table "residual": one row per layer and one for what leaves the last, columns `RESIDUAL_COLUMNS`."""
    frame = _frame([_residual_row(stream) for stream in profile.residual], RESIDUAL_COLUMNS)
    return frame.astype({"outlier_channels": "Int64"})


def outlier_table(profile: ActivationProfile) -> pd.DataFrame:
    """Return the table "outlier_dimensions": one row per role and outlier dimension, columns `OUTLIER_COLUMNS`.

    An outlier dimension of the inputs of a role has magnitudes of 6 or more in 25 % of its layers and there at 6 % of
    the positions (Dettmers et al. 2022, section 4.1). Roles that share their inputs are listed together. The residual
    stream itself is not looked at: it is never quantized, and in deep models all of it exceeds 6.
    """
    rows: list[list[object]] = []
    for name, members in _streams(profile).items():
        width = min(len(member.mean_abs) for member in members)
        if any(len(member.mean_abs) != width for member in members):
            continue  # layers of different widths have no dimension in common
        reached = np.sum([member.large_share >= LARGE_SHARE for member in members], axis=0)
        share = np.mean([np.nan_to_num(member.large_share) for member in members], axis=0)
        largest = np.nanmax([member.channels.absmax for member in members], axis=0)
        for channel in np.flatnonzero(reached >= OUTLIER_LAYERS * len(members)).tolist():
            layers = int(reached[channel])
            if layers:
                rows.append([name, channel, layers, layers / len(members), share[channel], largest[channel]])
    return _frame(rows, OUTLIER_COLUMNS)


def expert_table(profile: ActivationProfile) -> pd.DataFrame:
    """Return the table "experts": one row per role, layer and expert of a mixture, columns `EXPERT_COLUMNS`."""
    totals: dict[tuple[str, int | None], int] = {}
    for entry in profile.experts:
        totals[entry.role, entry.layer] = totals.get((entry.role, entry.layer), 0) + entry.tokens
    rows: list[list[object]] = [
        [e.role, e.layer, e.expert, e.tokens, e.tokens / (totals[e.role, e.layer] or math.nan), e.absmax]
        for e in profile.experts
    ]
    return _frame(rows, EXPERT_COLUMNS).astype({"layer": "Int64"})


def channel_table(profile: ActivationProfile) -> pd.DataFrame:
    """Return the table "activation_channels": one row per input channel, columns `CHANNEL_ACTIVATION_COLUMNS`."""
    import pandas as pd

    frames = [_frame([], CHANNEL_ACTIVATION_COLUMNS)]
    for entry in profile.inputs.values():
        statistics = entry.statistics
        columns = {
            "tensor": entry.tensor,
            "role": entry.role.role,
            "layer": pd.array([entry.role.layer] * statistics.mean_abs.size, dtype="Int64"),
            "channel": np.arange(statistics.mean_abs.size),
            "absmax": statistics.channels.absmax,
            "mean_abs": statistics.mean_abs,
            "std": statistics.channels.std,
            "kurtosis_excess": statistics.channels.kurtosis_excess,
            "large_share": statistics.large_share,
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def notes(profile: ActivationProfile) -> list[str]:
    """Return sentences on what the profile does not cover: linear weights that no run used."""
    found = []
    if profile.unseen:
        some = ", ".join(profile.unseen[:3]) + (f" and {len(profile.unseen) - 3} more" if profile.unseen[3:] else "")
        found.append(f"No activations of linear weights that the model does not use on text: {some}.")
    return found


def _residual_row(stream: ResidualStream) -> list[object]:
    top, peak = stream.tops[0], stream.peak
    ratio = top / stream.median if stream.median > 0 else math.nan
    return [
        *(stream.layer, *stream.tops, stream.median, ratio),
        top > MASSIVE_MAGNITUDE and ratio >= MASSIVE_RATIO,
        *(stream.over_100, stream.over_1000, peak.window, peak.position, peak.channel, stream.statistics.tokens),
        *(float(statistic.value(stream.statistics)) for statistic in ACTIVATION_STATISTICS),
    ]


def _streams(profile: ActivationProfile) -> dict[str, list[ChannelStatistics]]:
    """Return the statistics of each stream, layer by layer; experts see other tokens each and are left out."""
    experts = {entry.role for entry in profile.experts}
    roles: dict[str, dict[str, None]] = {}  # of the first to see an input: all that see it
    members: dict[str, list[ChannelStatistics]] = {}
    for entry in profile.inputs.values():
        first = profile.inputs.get(entry.shared_with, entry)
        if entry.role.layer is None or {entry.role.role, first.role.role} & experts:
            continue
        roles.setdefault(first.role.role, {first.role.role: None})[entry.role.role] = None
        if first is entry:
            members.setdefault(entry.role.role, []).append(entry.statistics)
    return {", ".join(roles[name]): found for name, found in members.items()}


def _frame(rows: list[list[object]], columns: tuple[Column, ...]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=[column.name for column in columns])
