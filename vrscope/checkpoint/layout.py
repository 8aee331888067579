"""The values of the checkpoint layer: where a tensor lies in its file, and a block of its rows.

`vrscope.checkpoint.source` re-exports them; everything above this layer imports them from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vrscope.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# Bits of every element type of the safetensors format; a type that is not here is listed, and its size is not checked.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

# Types that torch can hold as they are stored; the others can be listed and copied, not read.
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a shard's header says about one tensor.

    Attributes
    ----------
    name
        Name in the header, as it is stored.
    dtype
        Element type in the spelling of safetensors, for example "BF16".
    shape
        Stored shape.
    shard
        File name inside the checkpoint's folder.
    start, end
        Bytes of the tensor, counted from the start of the shard file; `end` is one past the last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a tensor of shape ()."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return self.end - self.start

    @property
    def is_float(self) -> bool:
        """Whether the elements are floats that vrscope analyses."""
        return self.dtype in FLOAT_DTYPES

    @property
    def rows(self) -> int:
        """Rows of the matrix view: `shape[0]` from two dimensions on, else 1."""
        return self.shape[0] if len(self.shape) >= 2 else 1

    @property
    def columns(self) -> int:
        """Columns of the matrix view: all dimensions but the first, or all elements of a vector or scalar."""
        return math.prod(self.shape[1:]) if len(self.shape) >= 2 else self.numel


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Some consecutive rows of a tensor's matrix view.

    Attributes
    ----------
    first_row
        Row of the matrix view that `values[0]` is.
    values
        Array of shape `(n_rows, columns)` in the stored dtype; for a vector `(1, n)`, a stretch of its elements.
    first_column
        Column that `values[:, 0]` is: 0 unless a vector was cut.
    """

    first_row: int
    values: torch.Tensor
    first_column: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.values.shape[0], self.values.shape[1]


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A row block as its stored bits, for loops that need no torch.

    Attributes
    ----------
    first_row, first_column
        As in `RowBlock`.
    bits
        Unsigned integers as wide as the stored type, shape `(n_rows, columns)`.
    info
        The tensor.
    """

    first_row: int
    bits: NDArray[np.unsignedinteger]
    first_column: int
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bits.shape[0], self.bits.shape[1]

    @property
    def values(self) -> torch.Tensor:
        """The same memory as a tensor of the stored dtype."""
        import torch

        return torch.from_numpy(self.bits.view(f"int{8 * self.bits.itemsize}")).view(torch_dtype(self.info))


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """Return the torch dtype that holds the elements of `info` as they are stored.

    Raises
    ------
    CheckpointError
        If torch has no such dtype.
    """
    import torch

    dtype = getattr(torch, TORCH_NAMES.get(info.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        message = (
            f"{printable(info.name)} ({printable(info.shard)}): stored as {printable(info.dtype)}; expected one of "
            f"{', '.join(TORCH_NAMES)}. Such a tensor is listed and copied, but its values cannot be read."
        )
        raise CheckpointError(message)
    return dtype


def printable(text: object, limit: int = 200) -> str:
    """Return `text` on one line for a message: control characters escaped, the middle of an overlong name left out."""
    try:
        shown = str(text)
    except RecursionError:
        shown = f"a deeply nested {type(text).__name__}"
    if len(shown) > limit:
        shown = f"{shown[: limit // 2]}...{shown[-limit // 2 :]}"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)
