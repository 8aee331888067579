"""Memory for something of every weight of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def zeros_together(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return float32 tensors of zeros that lie in one block of memory, and are freed when the last of them is.

    For a block this large numpy asks the system for huge pages: a fault per 2 MB where there would be one per 4 kB.
    """
    import torch

    sizes = [math.prod(shape) for shape in shapes.values()]
    block = torch.from_numpy(np.zeros(sum(sizes), np.float32))
    return {name: part.view(shapes[name]) for name, part in zip(shapes, torch.split(block, sizes), strict=True)}
