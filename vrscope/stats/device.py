"""What one row block contributes to the statistics, computed by torch on a device such as a GPU.

Counts and largest magnitudes are those of `summarize_block` exactly; moments of F32 and F64 agree up to rounding in
float64. Every thread of the executor uses a stream of its own and page-locked memory, so that the copies of one block
overlap with the work on another.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vrscope.checkpoint.source import StoredBlock, TensorInfo
from vrscope.stats.encoding import Encoding, encoding
from vrscope.stats.matrix import MatrixView
from vrscope.stats.summary import CHUNK, BlockPart

if TYPE_CHECKING:
    import torch

_OWN = threading.local()


def summarize_block_on(device: str, info: TensorInfo, view: MatrixView | None, block: StoredBlock) -> BlockPart:
    """Return what `block` contributes to the summary of its tensor, as `summarize_block` does on the CPU.

    Parameters
    ----------
    device
        Of torch, such as "cuda".
    info, view, block
        As in `summarize_block`.
    """
    import torch

    code = encoding(info.dtype)
    flat = block.bits.reshape(-1)
    first = block.first_row * info.columns + block.first_column
    start = min(-first % CHUNK, flat.size) if code.shift else 0
    stop = start + (flat.size - start) // CHUNK * CHUNK if code.shift else 0
    signed = torch.from_numpy(flat.view(f"int{code.width}"))
    with _stream(device), torch.no_grad():
        if torch.device(device).type == "cuda":
            signed = signed.pin_memory()
        bits = signed.to(device, non_blocking=True)
        counts = torch.bincount(_patterns(bits, code), minlength=code.bins).cpu().numpy().astype(np.uint32)
        row, row_top, column_top = 0, np.zeros(0, code.unsigned), np.zeros((0, 0), code.unsigned)
        if view is not None:
            row = first // view.columns
            row_top, column_top = _tops(bits, code, view)
        chunks = _moments(bits[start:stop], code)
    values = code.floats(flat) if code.shift else code.floats(flat[:0])
    return BlockPart(counts, row_top, column_top, row, values[:start].copy(), chunks, values[stop:].copy())


def _stream(device: str) -> AbstractContextManager[object]:
    """Return a context in which work is queued on this thread's own stream of the device."""
    import torch

    if torch.device(device).type != "cuda":
        return nullcontext()
    if not hasattr(_OWN, "stream"):
        _OWN.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    context: AbstractContextManager[object] = torch.cuda.stream(_OWN.stream)
    return context


def _patterns(bits: torch.Tensor, code: Encoding) -> torch.Tensor:
    """Return the bin of every value, int64: its upper bits, sign included."""
    return (bits.long() >> code.shift) & (code.bins - 1)


def _magnitudes(bits: torch.Tensor, code: Encoding) -> torch.Tensor:
    """Return the patterns without their sign, int64."""
    return bits.long() & ((1 << (code.width - 1)) - 1)


def _tops(
    bits: torch.Tensor, code: Encoding, view: MatrixView
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]:
    """Return the largest finite magnitudes of rows and of the columns of each matrix, as patterns plus one."""
    magnitude = _magnitudes(bits, code)
    raised = (magnitude + 1).where(magnitude <= code.limit, 0).view(-1, view.columns)
    per = view.rows if view.matrices > 1 else raised.shape[0]
    rows = raised.amax(1).cpu().numpy().astype(code.unsigned)
    columns = raised.view(-1, per, view.columns).amax(1).cpu().numpy().astype(code.unsigned)
    return rows, columns


def _moments(bits: torch.Tensor, code: Encoding) -> NDArray[np.float64]:
    """Return running moments of every stretch of `CHUNK` F32 or F64 values, shape `(n, 10)`; none for other types."""
    import torch

    from vrscope.stats import kernels

    if not code.shift or not bits.numel():
        return np.zeros((0, kernels.MOMENT_FIELDS))
    magnitude = _magnitudes(bits, code).view(-1, CHUNK)
    finite = magnitude <= code.limit
    stored = bits.view(torch.float32 if code.width == 32 else torch.float64).view(-1, CHUNK)
    values = stored.double().where(finite, 0.0)
    count = finite.sum(1)
    absmax = values.abs().amax(1)
    lowest = kernels.EMPTY_EXPONENT
    exponent = torch.where(absmax > 0, torch.frexp(absmax).exponent.clamp(lowest, -lowest), lowest)
    scaled = values * torch.exp2(-exponent.double())[:, None]
    origin = scaled.gather(1, finite.long().argmax(1, keepdim=True))  # makes equal values have no spread at all
    some = count.clamp(min=1)[:, None]
    mean = origin + (scaled - origin).where(finite, 0.0).sum(1, keepdim=True) / some
    away = (scaled - mean).where(finite, 0.0)
    square = away * away
    infinite = (magnitude == code.limit + 1).sum(1)
    fields = {
        kernels.COUNT: count,
        kernels.MEAN: mean[:, 0],
        kernels.M2: square.sum(1),
        kernels.M3: (square * away).sum(1),
        kernels.M4: (square * square).sum(1),
        kernels.EXPONENT: exponent,
        kernels.ABSMAX: absmax,
        kernels.ZEROS: (magnitude == 0).sum(1),
        kernels.NANS: CHUNK - count - infinite,
        kernels.INFS: infinite,
    }
    kept = (kernels.ZEROS, kernels.NANS, kernels.INFS)  # these count also where nothing is finite
    columns = [fields[place].double().where((count > 0) | (place in kept), 0.0) for place in range(len(fields))]
    moments: NDArray[np.float64] = torch.stack(columns, 1).cpu().numpy()
    return moments
