"""What each tensor of a checkpoint is: its role, layer, orientation and heads.

With a binding the roles are those its family declares; without one (an architecture vrscope does not know) they are
read off the names, which is good enough to group statistics and never enough to rescale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vrscope.checkpoint.source import TensorInfo

LINEAR, HEAD, EMBED, NORM, CONV, BIAS, FIXED, OTHER = (
    "linear",
    "head",
    "embed",
    "norm",
    "conv",
    "bias",
    "fixed",
    "other",
)


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """How one dimension of a stored tensor divides into heads.

    Attributes
    ----------
    part
        The space the rows or columns belong to: "q", "k", "v" or the attention output.
    unit
        "head" or "kv group".
    count
        Number of heads or groups.
    dim
        The dimension of the stored tensor that is split.
    index
        Array of shape `(shape[dim],)`: the head of each row or column, -1 for rows of other parts of a fused tensor.
    """

    part: str
    unit: str
    count: int
    dim: int
    index: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TensorRole:
    """What one tensor is.

    Attributes
    ----------
    tensor
        Name on disk.
    role
        Name without layer and expert numbers, for example "self_attn.q_proj".
    layer
        Layer number from 0, None outside the layers.
    kind
        "linear", "head" (the output head), "embed", "norm", "conv", "bias", "fixed" or "other" (not declared).
    dims
        What each stored dimension is: "out", "in", or the name of an axis such as "x" (experts).
        `("in", "out")` is GPT-2's transposed storage.
    heads
        The ways its rows or columns divide into heads; empty for most.
    """

    tensor: str
    role: str
    layer: int | None
    kind: str
    dims: tuple[str, ...]
    heads: tuple[HeadSplit, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions of a linear weight in the order `(..., out, in)`, others such as experts in front."""
        last = (self.dims.index("out"), self.dims.index("in"))
        return (*(dim for dim in range(len(self.dims)) if dim not in last), *last)


def roles_from_names(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorRole]:
    """Return roles guessed from names and shapes alone, for statistics of an undeclared architecture."""
    return {name: _guess(info) for name, info in tensors.items()}


def _guess(info: TensorInfo) -> TensorRole:
    stem, _, leaf = info.name.rpartition(".")
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", info.name)
    layer = int(numbers[0]) if numbers else None
    body = re.split(r"(?:^|\.)\d+\.", info.name, maxsplit=1)[-1] if numbers else info.name
    role = re.sub(r"\.\d+(?=\.)", "", body).removesuffix(".weight")
    if leaf in {"bias", "beta"}:
        kind = BIAS
    elif len(info.shape) <= 1:
        kind = NORM if re.search(r"norm|ln_|gamma", stem + leaf, re.IGNORECASE) else OTHER
    elif re.search(r"embed|wte|wpe", stem):
        kind = EMBED
    elif re.search(r"(lm_head|embed_out)$", stem):
        kind = HEAD
    else:
        kind = LINEAR if leaf == "weight" and len(info.shape) == 2 else OTHER
    dims = ("out", "in") if len(info.shape) == 2 else ("out",) if len(info.shape) == 1 else ()
    return TensorRole(info.name, role, layer, kind, dims)
