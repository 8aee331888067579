"""What quantization does to each weight by itself: signal-to-noise ratio, relative error, largest error.

`WeightErrors` adds this up over row blocks, alone (`weight_error`) or beside another pass over the same checkpoint.
Weights are converted to float32 and oriented `(out, in)` first; each expert of a stacked tensor is quantized by itself
and the errors are pooled. Sums are taken in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from vrscope.arch.roles import LINEAR, TensorRole
from vrscope.checkpoint.source import Checkpoint, StoredBlock, TensorInfo
from vrscope.checkpoint.stream import Streaming, stream
from vrscope.compiling import rehearse
from vrscope.executors import Executor, default_executor
from vrscope.progress import Progress, silent
from vrscope.quant.formats import Format
from vrscope.tables import Column

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

SLAB_ELEMENTS = 1 << 17  # what a slab rounds to stays in the second-level cache of most machines
BLOCK_BYTES = 4 << 20

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

    Memory holds a few row blocks per thread of `executor`; whole tensors if a format's scales depend on all of a weight
    or the weight is stored transposed. The result is the same for any number of threads. While it runs, torch uses one
    thread per block.

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
    errors = WeightErrors(checkpoint, roles, formats)
    errors.rehearse(progress)
    how = Streaming(executor or default_executor(), progress, "weight error", BLOCK_BYTES, errors.unit)
    with one_thread_each(errors.formats):
        for name, parts in stream(checkpoint, errors.names, errors.visit, how):
            for part in parts:
                errors.collect(checkpoint.tensors[name], part)
    return errors.table()


class WeightErrors:
    """Adds up the errors of some formats over the row blocks of a checkpoint's linear weights.

    A `Companion`: what `visit` returns for each block is merged by `collect` in the stored order.
    """

    def __init__(self, checkpoint: Checkpoint, roles: Mapping[str, TensorRole], formats: Sequence[Format]) -> None:
        self.names = [info.name for info in checkpoint.tensors.values() if _is_linear(info, roles)]
        self._roles = {name: roles[name] for name in self.names}
        self.formats = tuple(formats)
        self._sums: dict[str, NDArray[np.float64]] = {}

    def rehearse(self, progress: Progress) -> None:
        """Compile the loops of the formats if this machine has not done it yet."""
        import numpy as np

        from vrscope.quant import kernels

        samples = [np.zeros((2, 64), kind) for kind in (np.uint16, np.uint32)]
        steps: list[Callable[[], object]] = [partial(kernels.signal, bits) for bits in samples]
        for number in range(len(self.formats)):
            steps += [partial(_add_slab, bits, self.formats, [number], _no_sums(number + 1)) for bits in samples]
        rehearse(kernels.add_errors, steps, progress)

    def unit(self, info: TensorInfo) -> int:
        """Return how many stored rows must stay together: those that share a scale, or are parts of one matrix."""
        role = self._roles.get(info.name)
        if role is None or not self.formats or not {"out", "in"} & set(role.dims[:1]):
            return 1  # not measured, or each row of a stack holds whole matrices
        if role.dims != ("out", "in") or any(entry.scope.whole for entry in self.formats):
            return info.rows
        return _unit(info.columns, self.formats)

    def visit(self, info: TensorInfo, block: StoredBlock) -> NDArray[np.float64] | None:
        """Return the sums over one block, shape `(formats, 3)`; None for tensors that are not measured."""
        if info.name not in self._roles:
            return None
        sums = _no_sums(len(self.formats))
        stored = block.bits.reshape(-1, *info.shape[1:])
        for matrix in matrices(stored, self._roles[info.name].dims):
            _add(matrix, info, self.formats, sums)
        return sums

    def collect(self, info: TensorInfo, part: NDArray[np.float64] | None) -> None:
        """Merge the sums of the next block of a tensor."""
        if part is not None:
            held = self._sums.setdefault(info.name, _no_sums(len(self.formats)))
            held[:, :2] += part[:, :2]
            for mine, theirs in zip(held, part, strict=True):
                mine[2] = _larger(mine[2], theirs[2])

    def table(self) -> pd.DataFrame:
        """Return the table "weight_error" of all that was collected."""
        import pandas as pd

        rows = [
            {"tensor": name, "role": role.role, "layer": role.layer, "format": entry.name, **_figures(*sums)}
            for name, role in self._roles.items()
            for entry, sums in zip(self.formats, self._sums[name].tolist(), strict=True)
        ]
        frame = pd.DataFrame(rows, columns=[column.name for column in WEIGHT_ERROR_COLUMNS])
        return frame.astype({"layer": "Int64"})


def _no_sums(formats: int) -> NDArray[np.float64]:
    import numpy as np

    return np.zeros((formats, 3))


def _figures(signal: float, error: float, largest: float) -> dict[str, float]:
    """Return the columns that sums of squares of weights and errors, and the largest error, make."""
    if error == 0:
        return {"sqnr_db": math.inf, "relative_error": 0.0, "max_error": largest}
    ratio = error / signal if signal else math.inf
    sqnr = -10 * math.log10(ratio) if ratio else math.inf
    return {"sqnr_db": sqnr, "relative_error": math.sqrt(ratio), "max_error": largest}


def _larger(first: float, second: float) -> float:
    """Return the larger of two numbers, NaN if either is NaN."""
    return second if math.isnan(second) or second > first else first


def _is_linear(info: TensorInfo, roles: Mapping[str, TensorRole]) -> bool:
    role = roles.get(info.name)
    return role is not None and role.kind == LINEAR and info.is_float and info.numel > 0 and len(info.shape) >= 2


def matrices(stored: NDArray[Any], dims: Sequence[str]) -> Iterator[NDArray[Any]]:
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
    ordered = stored.transpose(*other, dims.index("out"), dims.index("in"))
    for index in np.ndindex(*ordered.shape[:-2]):
        yield ordered[index]


def _patterns(info: TensorInfo, stored: NDArray[Any]) -> NDArray[np.unsignedinteger]:
    """Return what compiled loops read: the bits of BF16, or those of the weights as float32; contiguous, same shape."""
    import numpy as np

    held = np.ascontiguousarray(stored)
    if info.dtype in {"BF16", "F32"}:
        return held
    values: NDArray[np.float32] = StoredBlock(0, held, 0, info).values.float().numpy()
    return values.view(np.uint32)


def _add(matrix: NDArray[Any], info: TensorInfo, formats: Sequence[Format], sums: NDArray[np.float64]) -> None:
    """Add the errors of a matrix `(out, in)` to `sums`: slab by slab, or at once where scales depend on all of it."""
    from vrscope.quant import kernels

    rows, columns = matrix.shape
    unit = _unit(columns, formats)
    step = max(unit, SLAB_ELEMENTS // columns // unit * unit)
    sliced = [number for number, entry in enumerate(formats) if not entry.scope.whole]
    whole = [number for number, entry in enumerate(formats) if entry.scope.whole]
    for first in range(0, rows, step):
        bits = _patterns(info, matrix[first : first + step])
        sums[:, kernels.SIGNAL] += kernels.signal(bits)
        _add_slab(bits, formats, sliced, sums)
    if whole:
        _add_slab(_patterns(info, matrix), formats, whole, sums)


def _add_slab(
    bits: NDArray[np.unsignedinteger], formats: Sequence[Format], which: Sequence[int], sums: NDArray[np.float64]
) -> None:
    """Add the errors of some formats over a few rows; weights are dequantized one slab at a time at most."""
    from vrscope.quant import kernels

    weight: NDArray[np.float32] | None = None
    for number in which:
        entry = formats[number]
        if entry.errors is not None:
            entry.errors(bits, sums[number])
        else:
            weight = kernels.singles(bits) if weight is None else weight
            kernels.add_errors(weight.reshape(-1), entry.of_array(weight).reshape(-1), sums[number])


def _unit(columns: int, formats: Sequence[Format]) -> int:
    """Return how many rows of a matrix end where a block of every format ends."""
    sizes = [entry.scope.size or 1 for entry in formats if entry.scope.kind == "block"]
    return math.lcm(*(size // math.gcd(size, columns) for size in sizes))


@contextmanager
def one_thread_each(formats: Sequence[Format]) -> Iterator[None]:
    """Keep torch from starting threads of its own inside the executor's; both at once are slower than either.

    Without effect on formats that do not need torch, so that it is not imported for them.
    """
    with_torch = any(entry.values is None or entry.activations or entry.scope.nested for entry in formats)
    if not with_torch and "torch" not in sys.modules:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
