"""Weights through a format at the speed of the compiled loops: float32 arrays `(out, in)` in, new arrays out.

Every function gives, element for element, what its counterpart in `vrscope.quant.bnb` or `vrscope.quant.simulated`
gives on the CPU; those stay the reference, and take over for tensors on other devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vrscope.quant import bnb

if TYPE_CHECKING:
    from torch import Tensor

Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Patterns = NDArray[np.unsignedinteger]
FourBit = Literal["nf4", "fp4"]

# As bitsandbytes 0.50 stores and rounds them (QLoRA, arXiv 2305.14314, appendix E; FP4 over its largest magnitude, 12).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_MAGNITUDES = (0.0, 0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1)
_FP4 = (*(-m for m in reversed(_FP4_MAGNITUDES[1:])), 0.0, -0.0, *_FP4_MAGNITUDES[1:])


@lru_cache
def codebook(kind: FourBit) -> tuple[Singles, Singles]:
    """Return the 16 codes, ascending, and the 15 bounds halfway between them, computed in float32."""
    import numpy as np

    code = np.array(_NF4 if kind == "nf4" else _FP4, np.float32)
    return code, (code[:-1] + code[1:]) / np.float32(2)


def through(weight: Tensor, values: Callable[[Singles], Singles], reference: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a float32 tensor after a round trip: by `values` on the CPU, by `reference` on any other device."""
    import torch

    if weight.device.type != "cpu":
        return reference(weight)
    return torch.from_numpy(values(weight.detach().contiguous().numpy()))


def four_bit(weight: Singles, kind: FourBit, nested: bool = False) -> Singles:
    """Return what `bnb.four_bit` returns; of the nested scales bitsandbytes itself makes the 8 bits."""
    import numpy as np

    from vrscope.quant import kernels

    out, flat = np.empty_like(weight), weight.reshape(-1)
    scales = nested_scales(flat) if nested and flat.size else np.empty(0, np.float32)
    code, bounds = codebook(kind)
    kernels.roundtrip_codebook_blocks(flat, bnb.BLOCK, code, bounds, scales, out.reshape(-1))
    return out


def four_bit_errors(bits: Patterns, sums: Doubles, kind: FourBit) -> None:
    """Add the errors of `four_bit` to `sums`, as `kernels.add_codebook_errors` does."""
    from vrscope.quant import kernels

    kernels.add_codebook_errors(bits, bnb.BLOCK, *codebook(kind), sums)


def nested_scales(values: Singles) -> Singles:
    """Return the scales of all blocks of a weight (shape `(n,)`) after double quantization."""
    import numpy as np

    from vrscope.quant import kernels

    scales = np.empty(-(-values.size // bnb.BLOCK), np.float32)
    kernels.block_scales(values, bnb.BLOCK, scales)
    return bnb.requantized_scales(scales)


def int8_rows(weight: Singles) -> Singles:
    """Return what `simulated.int8_per_row` returns."""
    import numpy as np

    from vrscope.quant import kernels

    out = np.empty_like(weight)
    kernels.roundtrip_int8_rows(weight, out)
    return out


def int8_rows_errors(bits: Patterns, sums: Doubles) -> None:
    """Add the errors of `int8_rows` to `sums`, as `kernels.add_int8_row_errors` does."""
    from vrscope.quant import kernels

    kernels.add_int8_row_errors(bits, sums)


def int8_tensor(weight: Singles) -> Singles:
    """Return what `simulated.int8_per_tensor` returns."""
    import numpy as np

    from vrscope.quant import kernels

    out, flat = np.empty_like(weight), weight.reshape(-1)
    kernels.roundtrip_int8_scale(flat, kernels.largest(flat), out.reshape(-1))
    return out


def llm_int8(weight: Singles) -> Singles:
    """Return what `bnb.int8_rows` returns."""
    import torch

    return int8_rows(torch.from_numpy(weight).half().float().numpy())


def int4(weight: Singles, group: int | None) -> Singles:
    """Return what `simulated.int4_per_group` returns."""
    import numpy as np

    from vrscope.quant import kernels

    out = np.empty_like(weight)
    kernels.roundtrip_int4_groups(weight, group or max(1, weight.shape[1]), out)
    return out


def int4_errors(bits: Patterns, sums: Doubles, group: int | None) -> None:
    """Add the errors of `int4` to `sums`, as `kernels.add_int4_group_errors` does."""
    from vrscope.quant import kernels

    kernels.add_int4_group_errors(bits, group or max(1, bits.shape[1]), sums)
