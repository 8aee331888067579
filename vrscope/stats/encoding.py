"""How the bits of each stored float type become bins of a histogram, and bins become values again.

A bin is the top bits of the stored pattern, sign included. Types of 8 and 16 bits have one bin per pattern, so their
histogram is the tensor itself, up to order. Wider types share bins: 256 per power of two for F32, 128 for F64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# Safetensors name: bits of a value, bits dropped to make a bin, pattern of the largest finite magnitude.
_LAYOUTS = {
    "F64": (64, 45, 0x7FEF_FFFF_FFFF_FFFF),
    "F32": (32, 15, 0x7F7F_FFFF),
    "F16": (16, 0, 0x7BFF),
    "BF16": (16, 0, 0x7F7F),
    "F8_E4M3": (8, 0, 0x7E),
    "F8_E5M2": (8, 0, 0x7B),
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """The bit layout of one stored float type.

    Attributes
    ----------
    dtype
        Its safetensors name.
    width
        Bits of a value.
    shift
        Low bits dropped to make a bin; 0 means that every bin is one value.
    limit
        Pattern of the largest finite magnitude. Patterns above it, sign apart, are infinity or NaN.
    lower, upper
        Bounds of the finite bins of one sign, ascending from 0, float64, shape `(n,)`; equal where `shift` is 0.
    infinity
        Pattern of infinity, None if the type has none.
    """

    dtype: str
    width: int
    shift: int
    limit: int
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    infinity: int | None

    @property
    def bins(self) -> int:
        """Number of bins over both signs, NaN and infinity included."""
        return 1 << (self.width - self.shift)

    @property
    def unsigned(self) -> np.dtype[np.unsignedinteger]:
        """The numpy type of the stored bits."""
        return np.dtype(f"uint{self.width}")

    def bits(self, values: torch.Tensor) -> NDArray[np.unsignedinteger]:
        """Return the stored bits of a contiguous tensor of this type, same shape, no copy."""
        import torch

        signed = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[self.width]
        bits: NDArray[np.unsignedinteger] = values.contiguous().view(signed).numpy().view(self.unsigned)
        return bits

    def floats(self, bits: NDArray[np.unsignedinteger]) -> NDArray[np.floating]:
        """Return the values of stored bits, same shape: float64 for F64, else float32, which is exact."""
        if self.width >= 32:
            return bits.view(np.dtype(f"float{self.width}"))
        table = _decoded(self.dtype)
        values: NDArray[np.float32] = table[bits]
        return values


@lru_cache
def encoding(dtype: str) -> Encoding:
    """Return the bit layout of a float type by its safetensors name; `dtype` is one of `FLOAT_DTYPES`."""
    width, shift, limit = _LAYOUTS[dtype]
    if shift == 0:
        lower = upper = _decoded(dtype)[: limit + 1].astype(np.float64)
    else:
        kind = np.dtype(f"uint{width}")
        patterns = np.arange((limit >> shift) + 1, dtype=kind) << kind.type(shift)
        largest = kind.type(limit)
        starts = np.append(patterns[1:], largest)
        lower = patterns.view(f"float{width}").astype(np.float64)
        upper = starts.view(f"float{width}").astype(np.float64)
    infinity = None if dtype == "F8_E4M3" else limit + 1
    return Encoding(dtype, width, shift, limit, lower, upper, infinity)


@lru_cache
def _decoded(dtype: str) -> NDArray[np.float32]:
    """Return the value of every pattern of an 8- or 16-bit type, as torch decodes it."""
    import torch

    kinds = {
        "F16": (torch.int16, torch.float16),
        "BF16": (torch.int16, torch.bfloat16),
        "F8_E4M3": (torch.int8, torch.float8_e4m3fn),
        "F8_E5M2": (torch.int8, torch.float8_e5m2),
    }
    signed, kind = kinds[dtype]
    width = 8 * kind.itemsize
    patterns = torch.arange(1 << width, dtype=torch.int32).to(signed)
    decoded: NDArray[np.float32] = patterns.view(kind).to(torch.float32).numpy()
    return decoded
