"""Shapes and memory for something of every weight of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def oriented_shapes(
    checkpoint: Checkpoint, roles: Mapping[str, TensorRole], names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of stored tensors seen as `(..., out, in)`, each name once."""
    return {name: tuple(checkpoint.tensors[name].shape[k] for k in roles[name].order) for name in names}


def zeros_together(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return float32 tensors of zeros that lie in one block of memory, and are freed when the last of them is."""
    import torch

    sizes = [math.prod(shape) for shape in shapes.values()]
    block = torch.zeros(sum(sizes))
    return {name: part.view(shapes[name]) for name, part in zip(shapes, torch.split(block, sizes), strict=True)}
