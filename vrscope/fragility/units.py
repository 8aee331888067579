"""What is quantized one at a time: single linear weights of a running model, or those of one layer or one role.

A weight is named as the tensor on disk that holds it, whatever the model calls it. One that the model puts together
from several tensors, such as a stack of experts, keeps the model's name, and the tensors it is made of are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vrscope.activations.capture import SiteMap
from vrscope.arch.roles import TensorRole, roles_from_names
from vrscope.checkpoint.source import Checkpoint, TensorInfo
from vrscope.errors import ModelError
from vrscope.quant.formats import Format
from vrscope.quant.layers import QuantizedWeight, quantized_weights
from vrscope.quant.loading import UNUSED, LoadedModel
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

Grouping = Literal["tensor", "layer", "role"]
GROUPINGS: tuple[Grouping, ...] = ("tensor", "layer", "role")
OUTSIDE = "outside the layers"
LINEAR_COLUMNS: tuple[Column, ...] = (
    Column("tensor", "", "Name of the weight in the checkpoint, or in the running model if it is stored otherwise."),
    Column("module", "", "Name of its module in the running transformers model."),
    Column("unit", "", "The unit of the table of sensitivities that it belongs to."),
    Column("role", "", "Name without layer and expert numbers."),
    Column("layer", "", "Layer number from 0; empty outside the layers."),
    Column("count", "elements", "Number of weights."),
    Column("columns", "elements", "Inputs of the matrix: weights per row."),
    Column("size_bytes", "bytes", "Size in the dtype the checkpoint stores."),
    Column("stacked", "", "Whether it is a stack of experts, which is no linear module of its own."),
    Column("stored", "", "Whether one tensor of the checkpoint, of this name, holds it."),
    Column("parts", "tensors", "Tensors of the checkpoint that hold it: several of joined ones, 0 if not recognised."),
)


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight that formats quantize: the columns of its row in the table "linears", and the weight itself.

    Attributes
    ----------
    tensor, module, role, layer, size_bytes
        As in the table.
    sources
        Names on disk of the tensors that together hold it and nothing else; none if they were not recognised.
    weight
        The weight of the running model.
    """

    tensor: str
    module: str
    role: str
    layer: int | None
    size_bytes: int
    sources: tuple[str, ...]
    weight: QuantizedWeight

    @property
    def stored(self) -> bool:
        """Whether one tensor on disk holds it."""
        return len(self.sources) == 1

    @property
    def parts(self) -> int:
        """Number of tensors on disk that hold it."""
        return len(self.sources)

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.weight.parameter.numel()

    @property
    def columns(self) -> int:
        """Inputs of the matrix."""
        return int(self.weight.parameter.shape[-2 if self.weight.transposed else -1])

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of experts."""
        return self.weight.parameter.ndim == 3


@dataclass(frozen=True, slots=True)
class Unit:
    """What is quantized together while the rest stays as it is."""

    name: str
    linears: tuple[Linear, ...]

    @property
    def weights(self) -> list[QuantizedWeight]:
        """The weights of the running model."""
        return [linear.weight for linear in self.linears]

    @property
    def role(self) -> str:
        """The role that all share, else nothing."""
        roles = {linear.role for linear in self.linears}
        return roles.pop() if len(roles) == 1 else ""

    @property
    def layer(self) -> int | None:
        """The layer that all share, else None."""
        layers = {linear.layer for linear in self.linears}
        return layers.pop() if len(layers) == 1 else None


def find_linears(
    loaded: LoadedModel, checkpoint: Checkpoint, roles: Mapping[str, TensorRole], entry: Format, sites: SiteMap
) -> list[Linear]:
    """Return the weights that a format quantizes and that the output depends on, in the order of the model.

    Parameters
    ----------
    loaded, checkpoint, roles
        A model, what it was made from, and the roles of what is stored.
    entry
        The format.
    sites
        From `find_sites` of these three.

    Raises
    ------
    ModelError
        If there are none.
    """
    found = [weight for weight in quantized_weights(loaded.model) if loaded.causal or not _behind(weight.name)]
    if entry.replaces_layers:  # bitsandbytes has no such layer for stacked experts
        found = [weight for weight in found if weight.parameter.ndim == 2]
    if not found:
        message = (
            f"{loaded.name}: expected linear layers besides the output head, found none that {entry.name} quantizes. "
            "Give another model or --format."
        )
        raise ModelError(message)
    sources = _sources(checkpoint, sites)
    item = _item_bytes(checkpoint)
    guessed = roles_from_names(
        {w.name: TensorInfo(w.name, "F32", tuple(w.parameter.shape[-2:]), "", 0, 0) for w in found}
    )
    linears = []
    for weight in found:
        own = sources.get(id(weight.parameter), ())
        tensor = own[0] if len(own) == 1 else weight.name
        role = roles[tensor] if len(own) == 1 else guessed[weight.name]
        size = sum(checkpoint.tensors[name].size_bytes for name in own) or weight.parameter.numel() * item
        module = weight.name.removesuffix(".weight")
        linears.append(Linear(tensor, module, role.role, role.layer, size, own, weight))
    return linears


def group(linears: Sequence[Linear], by: Grouping) -> list[Unit]:
    """Return the units, in the order in which their first weight stands in the model."""
    members: dict[str, list[Linear]] = {}
    for linear in linears:
        members.setdefault(_unit_name(linear, by), []).append(linear)
    return [Unit(name, tuple(own)) for name, own in members.items()]


def kept_modules(model: Any, linears: Sequence[Linear]) -> list[str]:
    """Return the names of linear modules that stay as they are: the output head, and what nothing measured reads."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    measured = {id(linear.weight.parameter) for linear in linears}
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in measured
    ]


def linear_table(units: Sequence[Unit]) -> pd.DataFrame:
    """Return the table "linears": one row per weight, columns `LINEAR_COLUMNS`."""
    import pandas as pd

    names = [column.name for column in LINEAR_COLUMNS]
    rows = [[unit.name if n == "unit" else getattr(linear, n) for n in names] for unit, linear in _members(units)]
    return pd.DataFrame(rows, columns=names).astype({"layer": "Int64"})


def _members(units: Sequence[Unit]) -> Iterator[tuple[Unit, Linear]]:
    for unit in units:
        for linear in unit.linears:
            yield unit, linear


def _unit_name(linear: Linear, by: Grouping) -> str:
    if by == "tensor":
        return linear.tensor
    if by == "role":
        return linear.role
    return OUTSIDE if linear.layer is None else f"layer {linear.layer}"


def _behind(name: str) -> bool:
    return name.startswith(UNUSED)


def _sources(checkpoint: Checkpoint, sites: SiteMap) -> dict[int, tuple[str, ...]]:
    """Return, by id of a parameter, the tensors on disk that together hold all of it and nothing besides."""
    held: dict[int, dict[str, int]] = {}
    sizes: dict[int, int] = {}
    for running, own in sites.held:
        key, (rows, columns) = id(running.parameter), running.matrix().shape
        sizes[key] = running.parameter.numel()
        for site in own:
            count = len(range(*site.outputs.indices(rows))) * columns
            parts = held.setdefault(key, {})
            parts[site.tensor] = parts.get(site.tensor, 0) + count
    return {
        key: tuple(parts)
        for key, parts in held.items()
        if sum(parts.values()) == sizes[key]
        and all(count == checkpoint.tensors[name].numel for name, count in parts.items())
    }


def _item_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes per element in which the checkpoint stores most of its float weights."""
    counts: dict[int, int] = {}
    for info in checkpoint.tensors.values():
        if info.is_float and info.numel:
            width = info.size_bytes // info.numel
            counts[width] = counts.get(width, 0) + info.numel
    return max(counts, key=lambda width: counts[width], default=4)
