"""The damage of a recipe, measured: the model with each weight in the format that the recipe gives it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from vrscope.errors import PlanError
from vrscope.fragility.measure import Bench, Explain, no_idea
from vrscope.progress import Progress, silent
from vrscope.quant.formats import Format
from vrscope.quant.layers import quantized, quantized_weights
from vrscope.quant.loading import LoadedModel
from vrscope.quant.spool import Spool
from vrscope.quant.text import TextSample

if TYPE_CHECKING:
    import pandas as pd


def check_recipe(
    loaded: LoadedModel,
    sample: TextSample,
    kept: Mapping[str, bool],
    formats: tuple[Format, Format],
    progress: Progress = silent,
    explain: Explain = no_idea,
) -> pd.DataFrame:
    """Return what three models lose: all weights in the lower format, by the recipe, and all in the higher one.

    Parameters
    ----------
    loaded
        The model that the sensitivities are of.
    sample
        Text to measure on.
    kept
        Module to whether the recipe keeps it in the higher format.
    formats
        The lower and the higher one.
    progress
        Is told of the models.
    explain
        As of `Bench.of`.

    Returns
    -------
    DataFrame
        Three rows with the columns "measured", "measured_sem", "change" and "change_sem" of the table
        "recipe_summary".

    Raises
    ------
    PlanError
        If the model lacks one of the modules.
    """
    import pandas as pd

    choices: Sequence[Mapping[str, bool]] = (dict.fromkeys(kept, False), kept, dict.fromkeys(kept, True))
    rows, first = [], None
    with Spool() as spool:
        bench = Bench.of(loaded, sample, spool, (), explain)
        for number, choice in enumerate(choices):
            progress("measuring the recipe", number, len(choices), "models")
            with mixed(loaded, choice, formats):
                damage = bench.damage()
            first = damage if first is None else first
            row = {}
            for name, values in (("measured", damage), ("change", damage - first)):
                row[name] = float(values.mean())
                row[f"{name}_sem"] = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else np.nan
            rows.append(row)
    progress("measuring the recipe", len(choices), len(choices), "models")
    return pd.DataFrame(rows)


@contextmanager
def mixed(loaded: LoadedModel, kept: Mapping[str, bool], formats: tuple[Format, Format]) -> Iterator[None]:
    """Quantize each module to the lower format, or to the higher one if it is kept, while inside.

    Raises
    ------
    PlanError
        If the model lacks one of the modules.
    """
    weights = {weight.name.removesuffix(".weight"): weight for weight in quantized_weights(loaded.model)}
    unknown = [module for module in kept if module not in weights]
    if unknown:
        message = (
            f"{loaded.name}: expected a linear module {unknown[0]!r} as in the recipe, found none. "
            "Give the model that the sensitivities were measured on."
        )
        raise PlanError(message)
    low, high = formats
    with (
        quantized(loaded.model, low, [weights[module] for module, keep in kept.items() if not keep]),
        quantized(loaded.model, high, [weights[module] for module, keep in kept.items() if keep]),
    ):
        yield
