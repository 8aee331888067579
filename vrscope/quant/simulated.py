"""Round-to-nearest int8 and int4 weights, simulated in float32: quantize, dequantize, return the result.

Input and output are weights `(out, in)`. The arithmetic is the customary one, operation by operation, so that results
equal those of bitsandbytes (int8) and of torch's fake quantization (int4) to the last bit. Blocks whose magnitude is
near the ends of float32 are first moved by a power of two, which is exact, so that nothing overflows or loses bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALL, LARGE = 2.0**-90, 2.0**100  # between these, no intermediate result leaves float32's normal range


def int8_per_row(weight: Tensor) -> Tensor:
    """Return the weight after symmetric int8 with one scale per row.

    With a = max |w| of the row: `code = round(w * (127 / a))`, half to even, and `w' = code * a * (1 / 127)`. This is
    the row quantization of LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) without its cast to float16.

    Parameters
    ----------
    weight
        float32, `(out, in)`.
    """
    return _int8(weight) if weight.numel() else weight.clone()


def int8_per_tensor(weight: Tensor) -> Tensor:
    """Return the weight after symmetric int8 with one scale for the whole `(out, in)` float32 tensor."""
    return _int8(weight.reshape(1, -1)).reshape(weight.shape) if weight.numel() else weight.clone()


def int4_per_group(weight: Tensor, group: int | None) -> Tensor:
    """Return the weight after asymmetric int4 with one scale and one zero point per group of inputs of one row.

    The range always includes 0: `low = min(w, 0)`, `high = max(w, 0)`, `scale = (high - low) / 15`,
    `zero = round(-low / scale)` in 0..15, `code = clamp(round(w / scale) + zero, 0, 15)`,
    `w' = (code - zero) * scale`; all rounding is half to even. This is the usual weight-only int4 of GPTQ and AWQ
    (arXiv 2210.17323, 2306.00978) rounded to nearest, with a float32 scale.

    Parameters
    ----------
    weight
        float32, `(out, in)`.
    group
        Inputs per group; the last group of a row may be shorter. None: the whole row.
    """
    import torch

    if not weight.numel():
        return weight.clone()
    rows, columns = weight.shape
    size = min(group or columns, columns)
    whole = columns - columns % size
    body = _int4(weight[:, :whole].reshape(-1, size)).reshape(rows, whole)
    return body if whole == columns else torch.cat([body, _int4(weight[:, whole:])], dim=1)


def _int8(blocks: Tensor) -> Tensor:
    """Quantize each row of `blocks` with one scale."""
    blocks, shift = _centred(blocks)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    factor = 127.0 / absmax.where(absmax != 0, 1.0)
    codes = (blocks * factor).round_().add_(0.0)  # an integer has no negative zero
    return _moved(codes.mul_(absmax).mul_(1.0 / 127.0), shift)


def _int4(blocks: Tensor) -> Tensor:
    """Quantize each row of `blocks` with one scale and one zero point."""
    blocks, shift = _centred(blocks)
    low = blocks.amin(dim=1, keepdim=True).clamp_(max=0.0)
    scale = (blocks.amax(dim=1, keepdim=True).clamp_(min=0.0) - low).div_(15.0)
    scale = scale.where(scale != 0, 1.0)
    zero = (-low / scale).round_().clamp_(0.0, 15.0)
    codes = (blocks / scale).round_().add_(zero).clamp_(0.0, 15.0)
    return _moved(codes.sub_(zero).mul_(scale), shift)


def _centred(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """Move rows to a magnitude in 0.5..1 if any is extreme; the second value undoes it, None if nothing was done."""
    import torch

    absmax = blocks.abs().amax(dim=1, keepdim=True)
    usual = (absmax == 0) | ((absmax > SMALL) & (absmax < LARGE)) | ~absmax.isfinite()
    if bool(usual.all()):
        return blocks, None
    exponent = torch.where(usual, 0, torch.frexp(absmax).exponent)
    return _moved(blocks, -exponent), exponent


def _moved(blocks: Tensor, exponent: Tensor | None) -> Tensor:
    """Return `blocks * 2**exponent`, in two steps because 2**exponent alone may not be a float32."""
    import torch

    if exponent is None:
        return blocks
    half = exponent // 2
    one = torch.ones_like(exponent, dtype=blocks.dtype)
    return blocks * torch.ldexp(one, half) * torch.ldexp(one, exponent - half)
