"""bitsandbytes itself: its 4-bit blocks, its int8 rows and its LLM.int8 layer, without its warnings.

Nothing here imitates bitsandbytes; where its API leaves a choice, the choice is the one that gives its own figures on
every backend.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

BLOCK = 64
SCALE_BLOCK = 256
OUTLIER_THRESHOLD = 6.0
CAST_LOGGER = "bitsandbytes.autograd._functions"
CPU_LOGGER = "bitsandbytes.backends.cpu.ops"


def four_bit(weight: Tensor, kind: Literal["nf4", "fp4"], nested: bool = False) -> Tensor:
    """Return the weight after bitsandbytes' 4-bit quantization in blocks of 64 consecutive elements.

    NF4 and FP4 are those of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    Parameters
    ----------
    weight
        float32, `(out, in)`.
    kind
        The code book.
    nested
        Also quantize the block scales, to 8 bits in blocks of 256 ("double quantization").
    """
    import torch

    if not weight.numel():
        return weight.clone()
    functional = _functional()
    # Flat and of even length: blocks are the same, and bitsandbytes then never takes its torch.compile path for odd
    # widths, which costs seconds per shape. A zero at the end of an incomplete block changes no scale.
    flat = weight.reshape(-1)
    even = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).contiguous()
    codes, state = functional.quantize_4bit(even, blocksize=BLOCK, quant_type=kind, compress_statistics=nested)
    values: Tensor = functional.dequantize_4bit(codes, state)
    return values.reshape(-1)[: flat.numel()].reshape(weight.shape)


def requantized_scales(scales: NDArray[Any]) -> NDArray[Any]:
    """Return block scales after double quantization: 8 bits in blocks of 256, relative to their mean.

    Parameters
    ----------
    scales
        float32, `(blocks,)`: the scales of one whole weight.
    """
    import torch

    functional = _functional()
    held = torch.from_numpy(scales)
    mean = held.mean()
    codes, state = functional.quantize_blockwise(held - mean, blocksize=SCALE_BLOCK)
    values: NDArray[Any] = (functional.dequantize_blockwise(codes, state) + mean).numpy()
    return values


def int8_rows(weight: Tensor) -> Tensor:
    """Return the float32 weight `(out, in)` as LLM.int8 stores it: cast to float16, then int8 with a scale per row."""
    import torch

    if not weight.numel():
        return weight.clone()
    functional = _functional()
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    values: Tensor = functional.int8_vectorwise_dequant(codes, absmax)
    return values.float()


def int8_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return bitsandbytes' LLM.int8 layer with threshold 6.0, ready for inference on the device of `weight`.

    Parameters
    ----------
    weight
        `(out, in)`, any float dtype; bitsandbytes casts it to float16 and keeps int8 only.
    bias
        `(out,)` or None.
    """
    import torch

    _functional()
    from bitsandbytes import nn as bnb_nn

    rows, columns = weight.shape
    # On "meta" nothing is initialised; the parameters that matter replace what is there.
    layer: nn.Module = bnb_nn.Linear8bitLt(
        columns, rows, bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    cpu_weight = weight.detach().to("cpu")  # only a move away from the CPU makes bitsandbytes quantize
    layer.weight = bnb_nn.Int8Params(cpu_weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back, while inside, bitsandbytes' message that inputs are cast to float16, which it gives on every call."""
    with _without(CAST_LOGGER, "inputs will be cast"):
        yield


def _functional() -> Any:
    """Return bitsandbytes' functions, imported without its advice to install kernels that nothing here would call."""
    with _without(CPU_LOGGER, "kernels-community"):
        from bitsandbytes import functional
    return functional


@contextmanager
def _without(name: str, words: str) -> Iterator[None]:
    """Hold back messages of a logger that hold these words while inside."""

    def other(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logger = logging.getLogger(name)
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
