"""What reads a space: the columns of all linear weights that its scales multiply, ready to be rounded and compared.

The formats that are searched for give every row, or every group of a row, a scale of its own, so the size of a factor
on a writer's rows is invisible to them; only columns are felt. Its sign is felt by code books, whose levels differ on
the two sides of zero: where one is among the targets, rows keep their signs (`may_turn`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.roles import LINEAR
from vrscope.arch.spaces import Space
from vrscope.checkpoint.source import Checkpoint
from vrscope.quant.formats import Format

if TYPE_CHECKING:
    from vrscope.activations.importance import Calibration
    from vrscope.arch.binding import Binding

Singles = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Matrices that read the same scales in the same columns, one below the other.

    Attributes
    ----------
    ids
        Which scale multiplies each column, -1 for none, shape `(columns,)`.
    power
        What the scale's exponent is multiplied by: -1, or -2 behind a squared ReLU.
    weight
        Shape `(rows, columns)`, float32.
    importance, held_out
        Of the same shape.
    slope
        First derivative of the damage by each weight, of the same shape, if that was asked for.
    """

    ids: NDArray[np.int32]
    power: int
    weight: Singles
    importance: Singles
    held_out: Singles
    slope: Singles | None = None


def readers_of(
    space: Space,
    binding: Binding,
    checkpoint: Checkpoint,
    calibration: Calibration,
    slopes: Mapping[str, Singles] | None = None,
) -> list[Reader]:
    """Return everything that reads a space and whose importance is known; one `Reader` per pattern of columns.

    Parameters
    ----------
    space, binding, checkpoint, calibration
        The space, and where to look.
    slopes
        By tensor, oriented as the importance.
    """
    groups: dict[tuple[bytes, int], list[tuple[NDArray[Any], ...]]] = {}
    for term in space.terms:
        role = binding.roles[term.tensor]
        if term.power >= 0 or role.kind != LINEAR or term.tensor not in calibration.importance:
            continue
        index = term.index.transpose(role.order)
        if index.shape[-2] != 1:
            continue  # moves rows as well, which is no column scale
        stored = checkpoint.read(term.tensor).float().numpy().transpose(role.order)
        index = np.broadcast_to(index, (*stored.shape[:-2], 1, stored.shape[-1]))
        tables = [stored, calibration.importance[term.tensor], calibration.held_out[term.tensor]]
        tables += [] if slopes is None else [slopes[term.tensor]]
        for at in product(*map(range, stored.shape[:-2])):
            ids = np.ascontiguousarray(index[at][0])
            if (ids >= 0).any():
                key = (ids.tobytes(), term.power)
                groups.setdefault(key, []).append((ids, *(table[at] for table in tables)))
    found = []
    for (_, power), parts in groups.items():
        arrays = (np.ascontiguousarray(np.concatenate([part[at] for part in parts])) for at in range(1, len(parts[0])))
        found.append(Reader(parts[0][0], power, *arrays))
    return found


def may_turn(space: Space, binding: Binding, formats: Sequence[Format]) -> bool:
    """Return whether scales of a space may be negative when the damage of these formats is to be lowered.

    A row of a weight keeps its sign where a code book would round it differently: that would undo what is chosen for
    the columns of the same weight.
    """
    books = any(entry.levels is not None and entry.levels.kind == "codebook" for entry in formats)
    writes = any(term.power > 0 and binding.roles[term.tensor].kind == LINEAR for term in space.terms)
    return space.signed and not all(entry.odd for entry in formats) and not (books and writes)
