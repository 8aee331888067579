"""What one row block contributes to the statistics, computed by torch on a device such as a GPU.

Counts and largest magnitudes are those of `summarize_block` exactly; moments of F32 and F64 agree up to rounding in
float64. Only operations that are exact or rounded once, element by element, are used, and sums are taken in a fixed
order, so that every device of torch gives the same bits, with any number of threads. Every thread of the executor uses
a stream of its own and page-locked memory, so that the copies of one block can overlap with the work on another.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.checkpoint.source import StoredBlock, TensorInfo
from vrscope.errors import ModelError
from vrscope.stats.encoding import Encoding, encoding
from vrscope.stats.matrix import MatrixView
from vrscope.stats.summary import CHUNK, BlockPart

if TYPE_CHECKING:
    import torch

_OWN = threading.local()
_TOGETHER = 256  # stretches whose moments are taken at once: about 60 MB on the device, however large the block
_FLOAT64_BIAS, _FLOAT64_MANTISSA = 1023, 52


def summarize_block_on(device: str, info: TensorInfo, view: MatrixView | None, block: StoredBlock) -> BlockPart:
    """Return what `block` contributes to the summary of its tensor, as `summarize_block` does on the CPU.

    Takes about four times the memory of the block on the device, and up to 60 MB more for F32 and F64.

    Parameters
    ----------
    device
        Of torch, such as "cuda".
    info, view, block
        As in `summarize_block`.

    Raises
    ------
    ModelError
        If the device has too little memory.
    """
    import torch

    code = encoding(info.dtype)
    flat = block.bits.reshape(-1)
    first = block.first_row * info.columns + block.first_column
    start = min(-first % CHUNK, flat.size) if code.shift else 0
    stop = start + (flat.size - start) // CHUNK * CHUNK if code.shift else 0
    try:
        with _stream(device), torch.no_grad():
            bits = _copied(flat.view(f"int{code.width}"), device)
            counts = _counts(bits, code)
            row, row_top, column_top = 0, np.zeros(0, code.unsigned), np.zeros((0, 0), code.unsigned)
            if view is not None:
                row = first // view.columns
                row_top, column_top = _tops(bits, code, view)
            chunks = _moments(bits[start:stop], code)
    except torch.OutOfMemoryError as error:
        needed = f"{4 * flat.nbytes / 1e6:,.0f} MB"
        message = f"{info.name}: expected about {needed} free on {device}, found less. Free some, or use --device cpu."
        raise ModelError(message) from error
    values = code.floats(flat) if code.shift else code.floats(flat[:0])
    return BlockPart(counts, row_top, column_top, row, values[:start].copy(), chunks, values[stop:].copy())


def _stream(device: str) -> AbstractContextManager[object]:
    """Return a context in which work is queued on this thread's own stream of the device."""
    import torch

    if torch.device(device).type != "cuda":
        return nullcontext()
    streams = vars(_OWN)
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    context: AbstractContextManager[object] = torch.cuda.stream(streams[device])
    return context


def _copied(values: NDArray[np.signedinteger], device: str) -> torch.Tensor:
    """Return `values` on the device.

    torch hands the page-locked copy to nobody else before the stream is done with it.
    """
    import torch

    here = torch.from_numpy(values)
    if torch.device(device).type != "cuda":
        return here
    return here.pin_memory().to(device, non_blocking=True)


def _widened(bits: torch.Tensor) -> torch.Tensor:
    """Return a copy of the bits in integers that also hold every pattern without a sign, plus one."""
    import torch

    return bits.to({1: torch.int16, 2: torch.int32}.get(bits.element_size(), bits.dtype), copy=True)


def _counts(bits: torch.Tensor, code: Encoding) -> NDArray[np.uint32]:
    """Return how many values fall into each bin: their upper bits, sign included."""
    import torch

    patterns = _widened(bits).bitwise_right_shift_(code.shift).bitwise_and_(code.bins - 1)
    return torch.bincount(patterns, minlength=code.bins).int().cpu().numpy().view(np.uint32)  # fits: bits are kept


def _tops(
    bits: torch.Tensor, code: Encoding, view: MatrixView
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]:
    """Return the largest finite magnitudes of rows and of the columns of each matrix, as patterns plus one."""
    raised = _magnitudes(bits, code)
    raised = raised.masked_fill_(raised > code.limit, -1).add_(1).view(-1, view.columns)
    per = view.rows if view.matrices > 1 else raised.shape[0]
    rows = raised.amax(1).cpu().numpy().astype(code.unsigned)
    columns = raised.view(-1, per, view.columns).amax(1).cpu().numpy().astype(code.unsigned)
    return rows, columns


def _magnitudes(bits: torch.Tensor, code: Encoding) -> torch.Tensor:
    """Return the patterns without their sign."""
    return _widened(bits).bitwise_and_((1 << (code.width - 1)) - 1)


def _moments(bits: torch.Tensor, code: Encoding) -> NDArray[np.float64]:
    """Return running moments of every stretch of `CHUNK` F32 or F64 values, shape `(n, 10)`; none for other types."""
    from vrscope.stats import kernels

    if not bits.numel():
        return np.zeros((0, kernels.MOMENT_FIELDS))
    rows = bits.view(-1, CHUNK)
    parts = (rows[first : first + _TOGETHER] for first in range(0, rows.shape[0], _TOGETHER))
    return np.concatenate([_moments_of(part, code).cpu().numpy() for part in parts])


def _moments_of(bits: torch.Tensor, code: Encoding) -> torch.Tensor:
    """Return running moments of each row of `bits`, shape `(n, 10)`, float64."""
    import torch

    from vrscope.stats import kernels

    magnitude = _magnitudes(bits, code)
    finite = magnitude <= code.limit
    values = bits.view(torch.float32 if code.width == 32 else torch.float64).double().where(finite, 0.0)
    count = finite.sum(1)
    absmax = values.abs().amax(1)
    lowest = kernels.EMPTY_EXPONENT
    exponent = torch.where(absmax > 0, torch.frexp(absmax).exponent.clamp(lowest, -lowest), lowest)
    scaled = values * _power_of_two(-exponent)[:, None]
    origin = scaled.gather(1, finite.byte().argmax(1, keepdim=True))  # makes equal values have no spread at all
    some = count.clamp(min=1)[:, None]
    mean = origin + _sum((scaled - origin).where(finite, 0.0))[:, None] / some
    away = (scaled - mean).where(finite, 0.0)
    square = away * away
    m2, m3, m4 = _sum(torch.stack((square, square * away, square * square)))
    infinite = (magnitude == code.limit + 1).sum(1)
    fields = {
        kernels.COUNT: count,
        kernels.MEAN: mean[:, 0],
        kernels.M2: m2,
        kernels.M3: m3,
        kernels.M4: m4,
        kernels.EXPONENT: exponent,
        kernels.ABSMAX: absmax,
        kernels.ZEROS: (magnitude == 0).sum(1),
        kernels.NANS: CHUNK - count - infinite,
        kernels.INFS: infinite,
    }
    kept = (kernels.ZEROS, kernels.NANS, kernels.INFS)  # these count also where nothing is finite
    columns = [fields[place].double().where((count > 0) | (place in kept), 0.0) for place in range(len(fields))]
    return torch.stack(columns, 1)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2 to whole exponents within +-1000, float64, put together from its bits: exp2 need not be exact."""
    import torch

    return (exponent.long() + _FLOAT64_BIAS).bitwise_left_shift_(_FLOAT64_MANTISSA).view(torch.float64)


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Return sums over the last dimension, of `CHUNK` elements, by halves: a device's own order may vary."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
