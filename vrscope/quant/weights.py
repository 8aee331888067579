"""What quantization does to each weight by itself: signal-to-noise ratio, relative error, largest error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vrscope.arch.roles import LINEAR, TensorRole
from vrscope.checkpoint.source import Checkpoint, TensorInfo
from vrscope.executors import Executor, default_executor
from vrscope.progress import Progress, silent
from vrscope.quant.formats import Format, ScaleScope
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

SLAB_ELEMENTS = 1 << 20  # of this size a slab and its float64 error stay in the cache of most machines

WEIGHT_ERROR_COLUMNS: tuple[Column, ...] = (
    Column("tensor", "", "Name of the tensor in the checkpoint."),
    Column("role", "", "Its name without layer and expert numbers."),
    Column("layer", "", "Layer number from 0."),
    Column("format", "", "Quantization format."),
    Column("sqnr_db", "dB", "Signal power over quantization error power, 10 log10; infinite if there is no error."),
    Column("relative_error", "", "Frobenius norm of the error over the Frobenius norm of the weight."),
    Column("max_error", "weight", "Largest absolute error of one weight."),
)


def weight_error(
    checkpoint: Checkpoint,
    roles: Mapping[str, TensorRole],
    formats: Sequence[Format],
    *,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Return the table "weight_error": one row per linear weight and format, columns `WEIGHT_ERROR_COLUMNS`.

    Weights are converted to float32 and oriented `(out, in)` first; each expert of a stacked tensor is quantized by
    itself and the errors are pooled. Sums are accumulated in float64. For every thread of `executor` at most one tensor
    and a few float32 copies of one of its matrices are held in memory. While it runs, torch uses one thread per tensor.

    Parameters
    ----------
    checkpoint
        Weights that are not of a float dtype are left out.
    roles
        Of which those of kind "linear" are measured.
    formats
        Entries of `FORMATS`.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read any more.
    """
    import pandas as pd

    chosen = [info for info in checkpoint.tensors.values() if _is_linear(info, roles)]
    total = sum(info.size_bytes for info in chosen)
    rows: list[dict[str, object]] = []
    done = 0

    def measure(info: TensorInfo) -> list[dict[str, object]]:
        return _rows(checkpoint, roles[info.name], formats)

    with _one_thread_each():
        for info, part in zip(chosen, (executor or default_executor()).map(measure, chosen), strict=True):
            rows.extend(part)
            done += info.size_bytes
            progress("weight error", done, total, "bytes")
    frame = pd.DataFrame(rows, columns=[column.name for column in WEIGHT_ERROR_COLUMNS])
    return frame.astype({"layer": "Int64"})


@dataclass(slots=True)
class _Sums:
    """Running sums over the elements of a tensor."""

    signal: float = 0.0
    error: float = 0.0
    largest: float = 0.0

    def add(self, weight: Tensor, dequantized: Tensor) -> None:
        difference = (dequantized - weight).double()
        self.signal += float(weight.double().square_().sum())
        self.largest = _larger(self.largest, float(difference.abs().max()))
        self.error += float(difference.square_().sum())

    def figures(self) -> dict[str, float]:
        if self.error == 0:
            return {"sqnr_db": math.inf, "relative_error": 0.0, "max_error": self.largest}
        ratio = self.error / self.signal if self.signal else math.inf
        sqnr = -10 * math.log10(ratio) if ratio else math.inf
        return {"sqnr_db": sqnr, "relative_error": math.sqrt(ratio), "max_error": self.largest}


def _larger(first: float, second: float) -> float:
    """Return the larger of two numbers, NaN if either is NaN."""
    return second if math.isnan(second) or second > first else first


def _is_linear(info: TensorInfo, roles: Mapping[str, TensorRole]) -> bool:
    role = roles.get(info.name)
    return role is not None and role.kind == LINEAR and info.is_float and info.numel > 0 and len(info.shape) >= 2


def _rows(checkpoint: Checkpoint, role: TensorRole, formats: Sequence[Format]) -> list[dict[str, object]]:
    """Return the rows of one tensor, one per format."""
    stored = checkpoint.read(role.tensor)
    sums = [_Sums() for _ in formats]
    for matrix in matrices(stored, role.dims):
        for entry, running in zip(formats, sums, strict=True):
            for slab in _slabs(matrix, entry.scope):
                weight = slab.float().contiguous()
                running.add(weight, entry.roundtrip(weight))
    return [
        {"tensor": role.tensor, "role": role.role, "layer": role.layer, "format": entry.name, **running.figures()}
        for entry, running in zip(formats, sums, strict=True)
    ]


def matrices(stored: Tensor, dims: Sequence[str]) -> Iterator[Tensor]:
    """Yield the `(out, in)` matrices of a stored tensor, as views: one, or one per expert.

    Parameters
    ----------
    stored
        Two or more dimensions.
    dims
        What each dimension is, as in `TensorRole`: two of them "out" and "in".
    """
    import numpy as np

    other = [position for position, kind in enumerate(dims) if kind not in {"out", "in"}]
    ordered = stored.permute(*other, dims.index("out"), dims.index("in"))
    for index in np.ndindex(*ordered.shape[:-2]):
        yield ordered[index]


def _slabs(matrix: Tensor, scope: ScaleScope) -> Iterator[Tensor]:
    """Cut a matrix into runs of rows that no scale crosses; the whole matrix if every scale depends on all of it."""
    rows, columns = matrix.shape
    if scope.kind == "tensor" or scope.nested:
        yield matrix
        return
    unit = (scope.size or 1) // math.gcd(scope.size or 1, columns) if scope.kind == "block" else 1
    step = max(unit, SLAB_ELEMENTS // columns // unit * unit)
    for first in range(0, rows, step):
        yield matrix[first : first + step]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from starting threads of its own inside the executor's; both at once are slower than either."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
