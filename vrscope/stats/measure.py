"""Statistics of all tensors of a checkpoint as tables.

In: a checkpoint and the roles of its tensors. Out: the tables "tensors" and "histograms", with a description of every
column. Only row blocks are read, each tensor once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vrscope.arch.roles import OTHER, TensorRole
from vrscope.checkpoint.source import Checkpoint, StoredBlock, TensorInfo
from vrscope.checkpoint.stream import SERIAL, Companion, Streaming, stream
from vrscope.compiling import rehearse
from vrscope.executors import Executor
from vrscope.progress import Progress, silent
from vrscope.stats.device import summarize_block_on
from vrscope.stats.matrix import MatrixView, matrix_view
from vrscope.stats.spectrum import top_singular_value
from vrscope.stats.statistics import SPECTRAL_STATISTICS, STATISTICS, Statistic
from vrscope.stats.summary import Accumulator, BlockPart, Summary, rehearsal, summarize_block
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

IDENTITY_COLUMNS: tuple[Column, ...] = (
    Column("tensor", "", "Name on disk."),
    Column("role", "", "Name without layer and expert numbers."),
    Column("layer", "", "Layer number from 0; empty outside the layers."),
)
TENSOR_COLUMNS: tuple[Column, ...] = (
    *IDENTITY_COLUMNS,
    Column("kind", "", "linear, head, embed, norm, conv, bias, fixed or other."),
    Column("dtype", "", "Stored element type, as safetensors spells it."),
    Column("shape", "", "Stored dimensions."),
    Column("count", "elements", "Number of elements."),
    Column("size_bytes", "bytes", "Stored size."),
    *(statistic.column for statistic in STATISTICS),
)
SPECTRAL_COLUMNS: tuple[Column, ...] = tuple(statistic.column for statistic in SPECTRAL_STATISTICS)
HISTOGRAM_COLUMNS: tuple[Column, ...] = (
    Column("tensor", "", "Name on disk."),
    Column("edges", "std", "Bounds of the bins, in standard deviations of the tensor from its mean."),
    Column("counts", "elements", "Number of finite weights between each two bounds."),
    Column("below_count", "elements", "Number of finite weights below the first bound."),
    Column("above_count", "elements", "Number of finite weights at or above the last bound."),
)
_HISTOGRAM_SIGMAS = 8.0


@dataclass(frozen=True, slots=True)
class StatOptions:
    """What to measure, and how.

    Attributes
    ----------
    target_std
        The target that `tvr_ratio` compares with; 0.01 is that of the paper's best run (arXiv 2503.17500).
    spectrum
        Whether to add `top_singular_value` and `stable_rank`, which take tens of passes over each matrix.
    block_bytes
        Aimed size of a row block; results do not depend on it.
    device
        "cpu" for the compiled loops, else a device of torch, such as "cuda", where the same is computed: exactly for
        types of 8 and 16 bits, for F32 and F64 up to rounding in float64. The spectrum stays on the CPU.
    """

    target_std: float = 0.01
    spectrum: bool = False
    block_bytes: int = 4 << 20
    device: str = "cpu"


DEFAULTS = StatOptions()


def tensor_columns(options: StatOptions) -> tuple[Column, ...]:
    """Return the columns that `measure_tensors` fills with these options."""
    return TENSOR_COLUMNS + (SPECTRAL_COLUMNS if options.spectrum else ())


def measure_tensors(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    *,
    options: StatOptions = DEFAULTS,
    executor: Executor = SERIAL,
    progress: Progress = silent,
    beside: Companion | None = None,
) -> pd.DataFrame:
    """Return the statistics of every tensor, one row each, in the stored order.

    Integer tensors are listed with empty statistics. The result is the same to the last bit for any executor and, on
    the CPU, any block size. `beside` shares the visit to every block of every float tensor.

    Raises
    ------
    CheckpointError
        If a tensor cannot be read.
    ModelError
        If the device of the options has too little memory.
    """
    import pandas as pd

    from vrscope.stats import kernels

    how = Streaming(executor, progress, "statistics", options.block_bytes)
    how = how if beside is None else replace(how, unit=beside.unit)
    names = [name for name, info in checkpoint.tensors.items() if info.is_float]
    dtypes = {checkpoint.tensors[name].dtype for name in names}
    rehearse(kernels.count_patterns, [partial(rehearsal, dtype) for dtype in sorted(dtypes)], progress)
    tops = _top_singular_values(checkpoint, roles, names, how) if options.spectrum else {}
    statistics = STATISTICS + (SPECTRAL_STATISTICS if options.spectrum else ())
    summaries = summarize(checkpoint, roles, names, how, options, beside)
    values = {
        name: _values(replace(summary, top_singular_value=tops.get(name, math.nan)), statistics)
        for name, summary in summaries
    }
    columns = [column.name for column in tensor_columns(options)]
    blank = [math.nan] * len(statistics)
    rows = [
        [*_identity(info, role_of(roles, info)), *values.get(name, blank)] for name, info in checkpoint.tensors.items()
    ]
    return _typed(pd.DataFrame(rows, columns=columns), statistics)


def histograms(
    checkpoint: Checkpoint,
    names: Iterable[str],
    bins: int = 101,
    *,
    executor: Executor = SERIAL,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Return the distribution of the weights of some tensors, in standard deviations from their own mean.

    Parameters
    ----------
    checkpoint
        Where they are.
    names
        Float tensors; others are passed over.
    bins
        Number of equal bins between -8 and 8 standard deviations.
    executor
        Runs the work.
    progress
        Is told of bytes read.

    Returns
    -------
    One row per tensor with `HISTOGRAM_COLUMNS`; `edges` and `counts` hold lists. A tensor without a positive standard
    deviation has all its finite weights in the bin of 0. For types of 8 and 16 bits counts are exact.

    Raises
    ------
    CheckpointError
        If a tensor cannot be read.
    """
    import pandas as pd

    edges = np.linspace(-_HISTOGRAM_SIGMAS, _HISTOGRAM_SIGMAS, bins + 1)
    chosen = [name for name in names if checkpoint.tensors[name].is_float]
    rows = []
    for name, summary in summarize(checkpoint, {}, chosen, Streaming(executor, progress, "histograms")):
        moments = summary.moments
        if moments.is_constant:
            counts, below, above = np.zeros(bins, np.int64), 0, 0
            counts[bins // 2] = summary.count
        else:
            counts, below, above = summary.histogram.over(moments.mean + edges * moments.std)
        rows.append([name, edges.tolist(), counts.tolist(), below, above])
    return pd.DataFrame(rows, columns=[column.name for column in HISTOGRAM_COLUMNS])


def summarize(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    names: Iterable[str],
    how: Streaming,
    options: StatOptions = DEFAULTS,
    beside: Companion | None = None,
) -> Iterator[tuple[str, Summary]]:
    """Yield name and summary of float tensors, each read once, also for `beside`.

    Raises
    ------
    CheckpointError
        If a tensor cannot be read.
    """

    def view_of(info: TensorInfo) -> MatrixView | None:
        return matrix_view(info, role_of(roles, info))

    summarized = summarize_block if options.device == "cpu" else partial(summarize_block_on, options.device)

    def part_of(info: TensorInfo, block: StoredBlock) -> tuple[BlockPart, Any]:
        return summarized(info, view_of(info), block), beside.visit(info, block) if beside else None

    for name, parts in stream(checkpoint, names, part_of, how):
        info = checkpoint.tensors[name]
        accumulator = Accumulator(info, view_of(info))
        for part, more in parts:
            accumulator.add(part)
            if beside is not None:
                beside.collect(info, more)
        recount = _Recount(checkpoint, name, how.block_bytes)
        yield name, accumulator.summary(recount, options.target_std)


def role_of(roles: Mapping[str, TensorRole], info: TensorInfo) -> TensorRole:
    """Return the role of a tensor, or one that says nothing if `roles` has none."""
    return roles.get(info.name) or TensorRole(info.name, info.name, None, OTHER, ())


@dataclass(frozen=True, slots=True)
class _Recount:
    """Counts the values far from a mean in a pass of its own."""

    checkpoint: Checkpoint
    name: str
    block_bytes: int

    def __call__(self, mean: float, distance: float) -> int:
        """Return how many finite values are more than `distance` away from `mean`."""
        from vrscope.stats import kernels
        from vrscope.stats.encoding import encoding

        code = encoding(self.checkpoint.tensors[self.name].dtype)
        blocks = map(self.checkpoint.read_stored, self.checkpoint.block_places(self.name, self.block_bytes))
        return sum(kernels.count_beyond(code.floats(block.bits).reshape(-1), mean, distance) for block in blocks)


def _top_singular_values(
    checkpoint: Checkpoint, roles: Mapping[str, TensorRole], names: list[str], how: Streaming
) -> dict[str, float]:
    """Return the top singular value of every matrix among `names`."""
    views = {name: matrix_view(checkpoint.tensors[name], role_of(roles, checkpoint.tensors[name])) for name in names}
    matrices = [(name, view) for name, view in views.items() if view is not None]
    total, done, tops = sum(checkpoint.tensors[name].size_bytes for name, _ in matrices), 0, {}

    def work(item: tuple[str, MatrixView]) -> float:
        return top_singular_value(checkpoint, *item, how.block_bytes)

    for (name, _), top in zip(matrices, how.executor.map(work, matrices), strict=True):
        tops[name] = top
        done += checkpoint.tensors[name].size_bytes
        how.progress("singular values", done, total, "bytes")
    return tops


def _values(summary: Summary, statistics: tuple[Statistic, ...]) -> list[float]:
    """Return the value of every statistic of one tensor."""
    return [float(statistic.value(summary)) for statistic in statistics]


def _identity(info: TensorInfo, role: TensorRole) -> list[object]:
    """Return the columns that say which tensor it is."""
    shape = "x".join(map(str, info.shape)) or "scalar"
    return [info.name, role.role, role.layer, role.kind, info.dtype, shape, info.numel, info.size_bytes]


def _typed(frame: pd.DataFrame, statistics: tuple[Statistic, ...]) -> pd.DataFrame:
    """Return `frame` with nullable whole numbers and float statistics."""
    kinds = {statistic.name: "Int64" if statistic.whole else "float64" for statistic in statistics}
    return frame.astype({"layer": "Int64", "count": "int64", "size_bytes": "int64", **kinds})
