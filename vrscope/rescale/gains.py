"""Which spaces earned what, as tables: predicted damage before and after per space, and the exponents chosen.

The predicted damage of a space is half the sum, over all weights that read it, of importance times squared rounding
error: the second-order estimate of the KL that quantizing them costs, on text that was held out from choosing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vrscope.arch.binding import Binding
from vrscope.rescale.plan import FREE, POW2, RescalePlan
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd

GAIN_COLUMNS = (
    Column("space", "", "Path of the layer, then the vector of activations that is scaled."),
    Column("rule", "", "What ties the tensors: norm fold, v.o, up.down, fc1.fc2, q.k."),
    Column("layer", "", "Layer number from 0; empty outside the layers."),
    Column("format", "", "Quantization format that the scales were chosen for."),
    Column("method", "", "Whose scales were kept for this space; none: it is left alone."),
    Column("stage", "", "How the scales were found: start, grid, or search (descent over single exponents)."),
    Column(
        "damage_before",
        "nats per token",
        "Predicted KL of quantizing what reads the space, unscaled, on held-out text; of encoders the relative error "
        "squared, without unit.",
    ),
    Column("damage_after", "nats per token", "The same with the scales chosen."),
    Column("removed_share", "share", "Share of the predicted damage that the scales remove; negative: they add to it."),
    Column("reason", "", "Why these scales."),
)
EXPONENT_COLUMNS = (
    Column("space", "", "Path of the layer, then the vector of activations that is scaled."),
    Column("rule", "", "What ties the tensors."),
    Column("layer", "", "Layer number from 0; empty outside the layers."),
    Column("exponent", "log2", "k of the scale 2**k; of a free scale the nearest integer."),
    Column("count", "scales", "Scales of the space that have this exponent."),
)
LAYER_ERROR_COLUMNS = (
    Column("tensor", "", "Linear weight."),
    Column("role", "", "Name without layer and expert numbers."),
    Column("layer", "", "Layer number from 0."),
    Column("format", "", "Quantization format."),
    Column("checkpoint", "", "original or rescaled."),
    Column(
        "relative_output_error",
        "",
        "Root of the summed squared error of the layer's output over the summed square of that output, this weight "
        "alone quantized, on held-out text.",
    ),
)


def gain_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the table "gains", one row per space and format.

    Parameters
    ----------
    rows
        Mappings with the columns of `GAIN_COLUMNS`; `removed_share` is computed, what is missing is left empty.
    """
    import pandas as pd

    names = [column.name for column in GAIN_COLUMNS]
    frame = pd.DataFrame([dict(row) for row in rows]).reindex(columns=names)
    before, after = (frame[name].astype("float64") for name in ("damage_before", "damage_after"))
    frame["damage_before"], frame["damage_after"] = before, after
    frame["removed_share"] = (1 - after / before.where(before > 0)).astype("float64")
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def exponent_table(binding: Binding, plan: RescalePlan) -> pd.DataFrame:
    """Return the table "exponents": how often each exponent occurs in every space that the plan may scale.

    A space that the plan does not list has exponent 0 throughout. Factors of a free plan count as the nearest power of
    two.
    """
    import pandas as pd

    rows = []
    for space in binding.spaces:
        if plan.scales == POW2 and not space.exact:
            continue
        values = plan.spaces.get(space.name)
        if values is None:
            values = np.full(space.size, plan.neutral)
        exponents = np.rint(np.log2(values)) if plan.scales == FREE else values
        found, counts = np.unique(np.asarray(exponents, np.int64), return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        rows += [(space.name, space.rule, space.layer, exponent, count) for exponent, count in pairs]
    frame = pd.DataFrame(rows, columns=[column.name for column in EXPONENT_COLUMNS])
    return frame.astype({"layer": "Int64", "exponent": "int64", "count": "int64"})
