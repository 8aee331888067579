"""The table of quantization formats: what each is, over what its scale is constant, and how to round-trip a weight.

To add a format, add one entry to `FORMATS`; the command line, the tables and the tests of the scaling law follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from vrscope.errors import UnknownNameError
from vrscope.quant import bnb, roundtrip, simulated

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Singles = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Patterns = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class ScaleScope:
    """Which elements of an `(out, in)` weight share one float scale.

    Rounding to nearest with a scale that follows the data is blind to any factor that is constant over each of these
    sets: quantize(s * w) = s * quantize(w).

    Attributes
    ----------
    kind
        "tensor": all elements. "row": one output channel. "group": `size` consecutive inputs of one row, the last
        group of a row possibly shorter. "block": `size` consecutive elements of the flattened weight, rows running on
        into each other.
    size
        Elements per group or block, None for tensor and row.
    nested
        The scales are themselves quantized relative to their mean over the tensor, so that only a factor constant over
        the whole tensor is invisible.
    """

    kind: Literal["tensor", "row", "group", "block"]
    size: int | None = None
    nested: bool = False

    @property
    def whole(self) -> bool:
        """Whether every scale depends on the whole tensor."""
        return self.kind == "tensor" or self.nested

    def feels(self, row_factors: NDArray[Any], column_factors: NDArray[Any]) -> bool:
        """Return whether `w[i, j] * row_factors[i] * column_factors[j]` can be rounded differently from w.

        Parameters
        ----------
        row_factors, column_factors
            Shapes `(out,)` and `(in,)`; powers of two, or any factors whose products are to be compared exactly.
        """
        import numpy as np

        rows_vary, columns_vary = np.ptp(row_factors) != 0, np.ptp(column_factors) != 0
        if self.whole:
            return bool(rows_vary or columns_vary)
        if self.kind == "row":
            return bool(columns_vary)
        size, width = self.size or 1, column_factors.size
        if self.kind == "group" or width % size == 0:
            starts = np.arange(0, width, size)
            return bool(
                (np.maximum.reduceat(column_factors, starts) != np.minimum.reduceat(column_factors, starts)).any()
            )
        factors = np.multiply.outer(row_factors, column_factors).reshape(-1)
        starts = np.arange(0, factors.size, size)
        return bool((np.maximum.reduceat(factors, starts) != np.minimum.reduceat(factors, starts)).any())


@dataclass(frozen=True, slots=True)
class Levels:
    """The values that a unit of weights can take after rounding, for searches that round single units.

    Attributes
    ----------
    kind
        "integer": a scale and an integer zero point, range including 0. "symmetric": integers up to `top` on both
        sides, scale from the largest magnitude. "codebook": `book` times the largest magnitude.
    top
        Largest integer.
    book
        Name of the code book.
    """

    kind: Literal["integer", "symmetric", "codebook"]
    top: int = 0
    book: Literal["", "nf4", "fp4"] = ""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store the weights of linear layers.

    Attributes
    ----------
    name
        As on the command line.
    meaning
        One sentence.
    bits_per_weight
        Including the scales and zero points of a group or block; scales per row or tensor are not counted.
    engine
        Whose code makes the numbers: "bitsandbytes", or "simulated" here.
    scope
        Which weights share a scale.
    activations
        Whether the layer's inputs are quantized as well.
    roundtrip
        Maps a float32 weight `(out, in)` to its dequantized self, float32, same shape.
    values
        The same for numpy arrays, by compiled loops; None if there are none.
    reference
        The same by the engine itself: on the CPU equal to `roundtrip` in every element, and slower. Models are run with
        what this gives. None if `roundtrip` is that.
    errors
        Adds what `values` costs to sums, as `kernels.add_codebook_errors` does, and writes no dequantized weights; None
        if there are no such loops.
    odd
        Whether minus a weight always rounds to minus what the weight rounds to, so that signs change nothing. Code
        books do not, not even one that is the same on both sides of zero: what lies on a bound goes down.
    levels
        What a unit of `scope` rounds to, nested scales, quantized inputs and the float16 steps of LLM.int8 aside.
    inputs
        Maps the float32 inputs `(tokens, in)` of one call of a layer to their dequantized selves; None if they stay as
        they are, or the engine has a layer of its own that quantizes them.
    """

    name: str
    meaning: str
    bits_per_weight: float
    engine: Literal["bitsandbytes", "simulated"]
    scope: ScaleScope
    activations: bool
    roundtrip: Callable[[Tensor], Tensor]
    values: Callable[[Singles], Singles] | None = None
    reference: Callable[[Tensor], Tensor] | None = None
    errors: Callable[[Patterns, Doubles], None] | None = None
    odd: bool = False
    levels: Levels | None = None
    inputs: Callable[[Tensor], Tensor] | None = None

    @property
    def replaces_layers(self) -> bool:
        """Whether a model has to run the engine's own layers, since rounding weights and inputs is not all they do."""
        return self.activations and self.inputs is None

    def of_array(self, weight: Singles) -> Singles:
        """Return the round trip of a contiguous float32 array `(out, in)`, as a new one."""
        if self.values is not None:
            return self.values(weight)
        import torch

        dequantized: Singles = self.roundtrip(torch.from_numpy(weight)).numpy()
        return dequantized

    def by_engine(self, weight: Tensor) -> Tensor:
        """Return the round trip of a float32 tensor `(out, in)` by the engine that the format names."""
        return (self.reference or self.roundtrip)(weight)


def _looped(
    values: Callable[[Singles], Singles],
    reference: Callable[[Tensor], Tensor],
    errors: Callable[[Patterns, Doubles], None] | None = None,
) -> dict[str, Any]:
    """Return the functions of a format that has compiled loops and a reference."""
    tensors = partial(roundtrip.through, values=values, reference=reference)
    return {"roundtrip": tensors, "values": values, "reference": reference, "errors": errors}


def _int4(group: int | None) -> Format:
    # A float32 scale and a 4-bit zero point per group, as simulated.
    part = f"group of {group} inputs" if group else "row"
    return Format(
        f"int4-g{group}" if group else "int4-row",
        f"Asymmetric 4-bit integers with a scale and an integer zero point per {part}, rounded to nearest.",
        4 + 36 / group if group else 4.0,
        "simulated",
        ScaleScope("group", group) if group else ScaleScope("row"),
        activations=False,
        **_looped(
            partial(roundtrip.int4, group=group),
            partial(simulated.int4_per_group, group=group),
            partial(roundtrip.int4_errors, group=group),
        ),
        levels=Levels("integer", 15),
    )


FORMATS: tuple[Format, ...] = (
    Format(
        "int8",
        "LLM.int8: 8-bit rows and 8-bit activations per token; inputs of 6.0 or more stay in floating point.",
        8.0,
        "bitsandbytes",
        ScaleScope("row"),
        activations=True,
        **_looped(roundtrip.llm_int8, bnb.int8_rows),
        odd=True,
        levels=Levels("symmetric", 127),
    ),
    Format(
        "w8a8",
        "Symmetric 8-bit integers: weights with a scale per output channel, inputs with one per call of a layer.",
        8.0,
        "simulated",
        ScaleScope("row"),
        activations=True,
        **_looped(roundtrip.int8_rows, simulated.int8_per_row, roundtrip.int8_rows_errors),
        odd=True,
        levels=Levels("symmetric", 127),
        inputs=simulated.int8_per_tensor,
    ),
    Format(
        "int8-row",
        "Symmetric 8-bit integers with one scale per output channel, rounded to nearest.",
        8.0,
        "simulated",
        ScaleScope("row"),
        activations=False,
        **_looped(roundtrip.int8_rows, simulated.int8_per_row, roundtrip.int8_rows_errors),
        odd=True,
        levels=Levels("symmetric", 127),
    ),
    Format(
        "int8-tensor",
        "Symmetric 8-bit integers with one scale per tensor, rounded to nearest.",
        8.0,
        "simulated",
        ScaleScope("tensor"),
        activations=False,
        **_looped(roundtrip.int8_tensor, simulated.int8_per_tensor),
        odd=True,
    ),
    Format(
        "nf4",
        "4-bit NormalFloat in blocks of 64 elements, the 4-bit format of QLoRA.",
        4.5,
        "bitsandbytes",
        ScaleScope("block", bnb.BLOCK),
        activations=False,
        **_looped(
            partial(roundtrip.four_bit, kind="nf4"),
            partial(bnb.four_bit, kind="nf4"),
            partial(roundtrip.four_bit_errors, kind="nf4"),
        ),
        levels=Levels("codebook", book="nf4"),
    ),
    Format(
        "nf4-dq",
        "NF4 whose block scales are themselves quantized to 8 bits (double quantization).",
        4 + 8 / 64 + 32 / (64 * 256),
        "bitsandbytes",
        ScaleScope("block", bnb.BLOCK, nested=True),
        activations=False,
        **_looped(partial(roundtrip.four_bit, kind="nf4", nested=True), partial(bnb.four_bit, kind="nf4", nested=True)),
        levels=Levels("codebook", book="nf4"),
    ),
    Format(
        "fp4",
        "4-bit floating point in blocks of 64 elements.",
        4.5,
        "bitsandbytes",
        ScaleScope("block", bnb.BLOCK),
        activations=False,
        **_looped(
            partial(roundtrip.four_bit, kind="fp4"),
            partial(bnb.four_bit, kind="fp4"),
            partial(roundtrip.four_bit_errors, kind="fp4"),
        ),
        levels=Levels("codebook", book="fp4"),
    ),
    _int4(32),
    _int4(64),
    _int4(128),
    _int4(None),
)


def get_format(name: str) -> Format:
    """Return the format of that name.

    Raises
    ------
    UnknownNameError
        If there is none; lists the known ones and suggests the nearest.
    """
    for entry in FORMATS:
        if entry.name == name:
            return entry
    raise UnknownNameError.of("format", name, (entry.name for entry in FORMATS))  # noqa: EM101
