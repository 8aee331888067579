"""How the bits of each stored float type become bins of a histogram, and bins become values again.

A bin is the top bits of the stored pattern, sign included. Types of 8 and 16 bits have one bin per pattern, so their
histogram is the tensor itself, up to order. Wider types share bins: 256 per power of two for F32, 128 for F64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Safetensors name: bits of a value, bits dropped to make a bin, pattern of the largest finite magnitude.
_LAYOUTS = {
    "F64": (64, 45, 0x7FEF_FFFF_FFFF_FFFF),
    "F32": (32, 15, 0x7F7F_FFFF),
    "F16": (16, 0, 0x7BFF),
    "BF16": (16, 0, 0x7F7F),
    "F8_E4M3": (8, 0, 0x7E),
    "F8_E5M2": (8, 0, 0x7B),
}
_MANTISSA_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}


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
    def largest(self) -> float:
        """Largest finite magnitude."""
        return float(self.floats(np.array([self.limit], self.unsigned))[0])

    @property
    def smallest_normal(self) -> float:
        """Smallest magnitude with all its mantissa bits."""
        return float(self.floats(np.array([1 << _MANTISSA_BITS[self.dtype]], self.unsigned))[0])

    @property
    def unsigned(self) -> np.dtype[np.unsignedinteger]:
        """The numpy type of the stored bits."""
        return np.dtype(f"uint{self.width}")

    def floats(self, bits: NDArray[np.unsignedinteger]) -> NDArray[np.floating]:
        """Return the values of stored bits, same shape: float64 for F64, else float32, which is exact."""
        if self.width >= 32:
            return bits.view(np.dtype(f"float{self.width}"))
        if self.dtype == "BF16":  # the upper half of a float32
            wide = bits.astype(np.uint32)
            wide <<= np.uint32(16)
            return wide.view(np.float32)
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
    """Return the value of every pattern of an 8- or 16-bit type."""
    patterns = np.arange(1 << _LAYOUTS[dtype][0], dtype=np.uint32)
    if dtype == "BF16":
        wide: NDArray[np.float32] = (patterns << np.uint32(16)).view(np.float32)
        return wide
    if dtype in {"F16", "F8_E5M2"}:  # the latter is the upper half of the former
        shift = np.uint32(0 if dtype == "F16" else 8)
        half: NDArray[np.float32] = (patterns << shift).astype(np.uint16).view(np.float16).astype(np.float32)
        return half
    field, fraction = (patterns >> np.uint32(3)) & np.uint32(15), patterns & np.uint32(7)
    magnitude = np.where(field > 0, np.ldexp(8.0 + fraction, field.astype(np.int32) - 10), np.ldexp(fraction, -9))
    magnitude[(patterns & np.uint32(0x7F)) == 0x7F] = np.nan  # the only pattern that is no number
    values: NDArray[np.float32] = np.where(patterns < 128, magnitude, -magnitude).astype(np.float32)
    return values
