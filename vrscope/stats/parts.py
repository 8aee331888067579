"""Statistics of the parts of tensors: channels, heads and KV groups.

In: a checkpoint and the roles of its tensors. Out: the tables "channels" and "heads". Moments of channels are taken
block by block and merged in the stored order; a head is the merger of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.roles import HeadSplit, TensorRole
from vrscope.checkpoint.source import Checkpoint, StoredBlock, TensorInfo
from vrscope.checkpoint.stream import SERIAL, Streaming, stream
from vrscope.errors import UnknownNameError
from vrscope.executors import Executor
from vrscope.progress import Progress, silent
from vrscope.stats.encoding import encoding
from vrscope.stats.matrix import MatrixView, matrix_view
from vrscope.stats.measure import IDENTITY_COLUMNS, role_of
from vrscope.stats.moments import moments_of
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = NDArray[np.float64]
Axis: TypeAlias = Literal["rows", "columns"]

_FIGURES: tuple[Column, ...] = (
    Column("count", "elements", "Number of finite weights."),
    Column("mean", "", "Arithmetic mean of the weights."),
    Column("std", "", "Population standard deviation of the weights."),
    Column("absmax", "", "Largest magnitude of a weight."),
    Column("kurtosis_excess", "", "Fourth standardized moment less 3, 0 for a normal distribution."),
    Column("frobenius_norm", "", "Root of the sum of squared weights."),
)
CHANNEL_COLUMNS: tuple[Column, ...] = (
    *IDENTITY_COLUMNS,
    Column("axis", "", "out for output channels (rows of the weight), in for input channels (columns)."),
    Column("channel", "", "Number of the channel from 0; channels of stacked experts count on from one to the next."),
    *_FIGURES,
)
HEAD_COLUMNS: tuple[Column, ...] = (
    *IDENTITY_COLUMNS,
    Column("part", "", "Which part of the attention the weights belong to, such as q, k or v."),
    Column("unit", "", "head or kv group."),
    Column("head", "", "Number of the head or group from 0."),
    *_FIGURES,
)


@dataclass(frozen=True, slots=True)
class _Axes:
    """The matrix view of a tensor and the axes whose channels are asked for."""

    view: MatrixView
    axes: frozenset[Axis]


def measure_parts(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    per: Literal["channel", "head"],
    *,
    executor: Executor = SERIAL,
    progress: Progress = silent,
    block_bytes: int = 4 << 20,
) -> pd.DataFrame:
    """Return statistics of the parts of every float tensor, one row per part.

    Parameters
    ----------
    checkpoint
        Where the tensors are.
    roles
        Say which dimension is which, and how dimensions divide into heads.
    per
        "channel": every output and every input channel of every matrix. "head": every head and KV group that the roles
        declare.
    executor
        Runs the work; it does not change the result.
    progress
        Is told of bytes read.
    block_bytes
        Aimed size of a row block; moments of columns change by rounding alone.

    Raises
    ------
    CheckpointError
        If a tensor cannot be read.
    UnknownNameError
        If `per` is neither.
    """
    import pandas as pd

    if per not in ("channel", "head"):
        error = UnknownNameError.of("part", per, ("channel", "head"))
        raise error
    wanted: dict[str, _Axes] = {}
    for name, info in checkpoint.tensors.items():
        axes = _wanted(info, role_of(roles, info), per) if info.is_float else None
        if axes is not None:
            wanted[name] = axes

    def part_of(info: TensorInfo, block: StoredBlock) -> list[_Part]:
        return [_channels(info, wanted[info.name].view, axis, block) for axis in sorted(wanted[info.name].axes)]

    frames = []
    for name, blocks in stream(checkpoint, wanted, part_of, Streaming(executor, progress, f"{per}s", block_bytes)):
        info = checkpoint.tensors[name]
        role = role_of(roles, info)
        states = {axis: _zeros(wanted[name].view, axis) for axis in wanted[name].axes}
        for parts in blocks:
            for part in parts:
                _merge(states[part.axis], part)
        if per == "channel":
            frames += _channel_frames(role, wanted[name].view, states)
        else:
            frames += [_head_frame(info, role, split, wanted[name].view, states) for split in role.heads]
    columns = [column.name for column in (CHANNEL_COLUMNS if per == "channel" else HEAD_COLUMNS)]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    return table.astype({"layer": "Int64"})[columns]


@dataclass(frozen=True, slots=True)
class _Part:
    """Running moments of the channels `first`, `first + 1`, ... of one axis, from one block, shape `(n, 10)`."""

    axis: Axis
    first: int
    states: Floats


def _wanted(info: TensorInfo, role: TensorRole, per: str) -> _Axes | None:
    """Return the channels that `per` needs of a tensor, None if none."""
    view = matrix_view(info, role)
    if per == "channel":
        return _Axes(view, frozenset({"rows", "columns"})) if view is not None else None
    if not role.heads:
        return None
    view = view or MatrixView(1, info.numel, 1, False)  # every element of a vector is a channel
    return _Axes(view, frozenset(_labels(info, view, split)[0] for split in role.heads))


def _labels(info: TensorInfo, view: MatrixView, split: HeadSplit) -> tuple[Axis, NDArray[np.int64]]:
    """Return the axis that a split divides, and the head of each channel along it, all matrices one after the other."""
    row_dims = len(info.shape) - 1 if view.matrices > 1 else 1
    rows = split.dim < row_dims
    shape = info.shape[:row_dims] if rows else info.shape[row_dims:]
    along = [1] * len(shape)
    along[split.dim if rows else split.dim - row_dims] = -1
    labels = np.broadcast_to(split.index.reshape(along), shape).reshape(-1)
    return ("rows", labels) if rows else ("columns", np.tile(labels, view.matrices))


def _zeros(view: MatrixView, axis: Axis) -> Floats:
    """Return running moments of nothing for all channels of an axis."""
    from vrscope.stats import kernels

    return np.zeros((view.matrices * (view.rows if axis == "rows" else view.columns), kernels.MOMENT_FIELDS))


def _channels(info: TensorInfo, view: MatrixView, axis: Axis, block: StoredBlock) -> _Part:
    """Return the moments of the channels of one axis within a block; whole rows, and pieces of columns."""
    from vrscope.stats import kernels

    code = encoding(info.dtype)
    values = code.floats(block.bits).reshape(-1, view.columns)
    row = (block.first_row * info.columns + block.first_column) // view.columns
    first, length = row, view.columns
    if axis == "columns":
        length = view.rows if view.matrices > 1 else values.shape[0]
        first = row // view.rows * view.columns if view.matrices > 1 else 0
        values = np.ascontiguousarray(np.swapaxes(values.reshape(-1, length, view.columns), 1, 2))
    single = encoding("F64" if values.dtype == np.float64 else "F32")
    flat = values.reshape(-1)
    states = np.zeros((flat.size // length, kernels.MOMENT_FIELDS))
    kernels.chunk_moments(flat, flat.view(single.unsigned), length, single.unsigned.type(single.limit), states)
    return _Part(axis, first, states)


def _merge(states: Floats, part: _Part) -> None:
    """Merge the channels of a block into those of its tensor."""
    from vrscope.stats import kernels

    kernels.merge_each(states[part.first : part.first + len(part.states)], part.states)


def _channel_frames(role: TensorRole, view: MatrixView, states: Mapping[Axis, Floats]) -> list[pd.DataFrame]:
    """Return the rows of the table "channels" of one tensor: output channels, then input channels."""
    axes: tuple[tuple[str, Axis], ...] = (("out", "rows"), ("in", "columns"))
    if view.transposed:
        axes = (("out", "columns"), ("in", "rows"))
    return [_frame(role, {"axis": name, "channel": np.arange(len(states[axis]))}, states[axis]) for name, axis in axes]


def _head_frame(
    info: TensorInfo, role: TensorRole, split: HeadSplit, view: MatrixView, states: Mapping[Axis, Floats]
) -> pd.DataFrame:
    """Return the rows of the table "heads" for one split of one tensor."""
    from vrscope.stats import kernels

    axis, labels = _labels(info, view, split)
    heads = np.zeros((split.count, kernels.MOMENT_FIELDS))
    for head in range(split.count):
        kernels.fold(heads[head], states[axis][labels == head])
    return _frame(role, {"part": split.part, "unit": split.unit, "head": np.arange(split.count)}, heads)


def _frame(role: TensorRole, which: Mapping[str, object], states: Floats) -> pd.DataFrame:
    """Return a table of the figures of `states`, one row each, that says which parts of which tensor they are."""
    import pandas as pd

    moments = moments_of(states)
    figures = {
        "count": moments.count.astype(np.int64),
        "mean": moments.mean,
        "std": moments.std,
        "absmax": moments.absmax,
        "kurtosis_excess": moments.kurtosis_excess,
        "frobenius_norm": moments.frobenius_norm,
    }
    layer = pd.NA if role.layer is None else role.layer
    return pd.DataFrame({"tensor": role.tensor, "role": role.role, "layer": layer, **which, **figures})
