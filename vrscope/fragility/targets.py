"""The tools that a recipe is written for: a table of what each calls the formats, and how each spells a choice.

A tool that has no such format gets its nearest one, and the recipe says so: damage was then measured for another
format than the tool will use. To add a tool, add an entry to `TARGETS`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vrscope.errors import PlanError, UnknownNameError
from vrscope.fragility.gguf_names import gguf_patterns

FULL = "bfloat16"  # not quantized
HIGH_FORMATS = (FULL, "int8", "int8-row")


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a tool has for a format: its own words for it, and whether it computes the numbers that were measured."""

    value: Any
    name: str
    same: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """Which modules get which format.

    Attributes
    ----------
    low, high
        Names of formats; `high` may be `FULL`.
    formats
        Module of the running model to "low" or "high", in the order of the model.
    ragged
        Modules whose inputs the group size of the lower format does not divide.
    kept
        Linear modules that no format quantizes, such as the output head.
    model_type
        As the checkpoint's config names it.
    """

    low: str
    high: str
    formats: Mapping[str, str]
    ragged: tuple[str, ...]
    kept: tuple[str, ...]
    model_type: str

    def modules(self, which: str) -> list[str]:
        """Return the modules of one of the two formats."""
        return [module for module, chosen in self.formats.items() if chosen == which]


@dataclass(frozen=True, slots=True)
class Target:
    """A tool.

    Attributes
    ----------
    name
        As on the command line.
    file
        What its recipe is called.
    schemes
        What it has for each format of vrscope.
    mixes
        Whether it can quantize different layers to different formats; if not, kept layers stay unquantized.
    render
        From a choice and the schemes of its lower and higher format to the text of the file.
    """

    name: str
    file: str
    schemes: Mapping[str, Scheme]
    mixes: bool
    render: Callable[[Choice, Scheme, Scheme | None], str]

    def write(self, choice: Choice) -> tuple[str, list[str]]:
        """Return the text of the recipe, and sentences on what it cannot say."""
        notes = []
        low, high = self.schemes[choice.low], self.schemes.get(choice.high)
        if choice.high != FULL and not self.mixes:
            high = None
            notes.append(
                f"{self.file}: {self.name} has one format per model, so that kept layers stay in the dtype it loads "
                f"instead of {choice.high}: the model is larger than the budget says."
            )
        for name, scheme in ((choice.low, low), (choice.high, high)):
            if scheme is not None and not scheme.same:
                notes.append(
                    f"{self.file}: {self.name} gets {scheme.name} for {name}, its nearest format; damage was measured "
                    f"for {name}."
                )
        return self.render(choice, low, high), notes


def get_target(name: str) -> Target:
    """Return the target of that name.

    Raises
    ------
    UnknownNameError
        If there is none; lists the known ones and suggests the nearest.
    """
    for entry in TARGETS:
        if entry.name == name:
            return entry
    raise UnknownNameError.of("target", name, (entry.name for entry in TARGETS))  # noqa: EM101


def _bitsandbytes(choice: Choice, low: Scheme, high: Scheme | None) -> str:
    # A list of one's own replaces the default one, which holds the output head.
    del high
    skip = [*choice.kept, *choice.modules("high")]
    return json.dumps({**low.value, "llm_int8_skip_modules": skip}, indent=1) + "\n"


def _llm_compressor(choice: Choice, low: Scheme, high: Scheme | None) -> str:
    ignore = [*choice.kept, *(choice.modules("high") if high is None else [])]
    groups = [("low", choice.modules("low"), low)]
    if high is not None:
        groups.append(("high", choice.modules("high"), high))
    lines = ["quant_stage:", "  quant_modifiers:", "    QuantizationModifier:"]
    if choice.ragged and "group_size" in low.value["weights"]:
        lines.append("      bypass_divisibility_checks: true")
    lines += ["      ignore:", *_listed(ignore, 8)] if ignore else ["      ignore: []"]
    lines.append("      config_groups:")
    for name, modules, scheme in groups:
        if modules:
            lines += [f"        {name}:", "          targets:", *_listed(modules, 12)]
            lines += [f"          {key}: {json.dumps(value)}" for key, value in scheme.value.items()]
    return "\n".join(lines) + "\n"


def _listed(names: Sequence[str], indent: int) -> list[str]:
    # A JSON string is a YAML string, whatever characters a name holds.
    return [f"{' ' * indent}- {json.dumps(name)}" for name in names]


def _torchao(choice: Choice, low: Scheme, high: Scheme | None) -> str:
    schemes = {"low": low.value, "high": None if high is None else high.value}
    chosen: dict[str, Any] = {module: schemes[which] for module, which in choice.formats.items()}
    chosen |= dict.fromkeys(choice.kept)
    kind = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": chosen}}
    return json.dumps({"quant_method": "torchao", "quant_type": {"default": kind}}, indent=1) + "\n"


def _llama_cpp(choice: Choice, low: Scheme, high: Scheme | None) -> str:
    types = {"low": low.value, "high": "bf16" if high is None else high.value}
    # Every tensor is named, as llama-quantize would raise the precision of some by rules of its own.
    flags = [
        f"--tensor-type {shlex.quote(f'{pattern}={types[which]}')}"
        for module, which in choice.formats.items()
        for pattern in gguf_patterns(choice.model_type, module)
    ]
    lines = ["#!/bin/sh", "# sh llama-cpp.sh MODEL-BF16.gguf OUT.gguf", 'exec "${LLAMA_QUANTIZE:-llama-quantize}"']
    return " \\\n  ".join(["\n".join(lines), *flags, f'"$1" "$2" {low.value.upper()}']) + "\n"


def _weights(bits: int, strategy: str, group: int | None = None, *, symmetric: bool = True) -> dict[str, Any]:
    """Return quantization arguments of compressed-tensors."""
    size = {} if group is None else {"group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **size}


def _bnb_4bit(kind: str, *, nested: bool = False, same: bool = True) -> Scheme:
    words = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    return Scheme(words | {"bnb_4bit_compute_dtype": "bfloat16"}, kind, same)


def _ao(kind: str, version: int, name: str, *, same: bool = False, **fields: Any) -> Scheme:
    return Scheme({"_type": kind, "_version": version, "_data": fields}, name, same)


def _compressed(name: str, weights: Mapping[str, Any], *, same: bool = False, inputs: str = "") -> Scheme:
    rounded = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": inputs, "dynamic": True}
    return Scheme({"weights": dict(weights), **({"input_activations": rounded} if inputs else {})}, name, same)


_GROUPS = (32, 64, 128)
_INT4_G64 = _compressed("int4 in groups of 64", _weights(4, "group", 64, symmetric=False))
_AO_G64 = _ao("Int4WeightOnlyConfig", 2, "int4 in groups of 64", group_size=64)
_AO_INT8 = _ao("Int8WeightOnlyConfig", 2, "int8 per row", same=True)
_NF4_STAND_IN = _bnb_4bit("nf4", same=False)
_LLM_INT8 = {"load_in_8bit": True}

TARGETS: tuple[Target, ...] = (
    Target(
        "bitsandbytes",
        "bitsandbytes.json",
        {
            "nf4": _bnb_4bit("nf4"),
            "nf4-dq": _bnb_4bit("nf4", nested=True),
            "fp4": _bnb_4bit("fp4"),
            "int8": Scheme(_LLM_INT8, "LLM.int8", same=True),
            **dict.fromkeys(("int8-row", "int8-tensor", "w8a8"), Scheme(_LLM_INT8, "LLM.int8")),
            **dict.fromkeys((*(f"int4-g{size}" for size in _GROUPS), "int4-row"), _NF4_STAND_IN),
        },
        mixes=False,
        render=_bitsandbytes,
    ),
    Target(
        "llm-compressor",
        "llm-compressor.yaml",
        {
            **{
                f"int4-g{size}": _compressed("int4", _weights(4, "group", size, symmetric=False), same=True)
                for size in _GROUPS
            },
            "int4-row": _compressed("int4 per row", _weights(4, "channel", symmetric=False), same=True),
            "int8-row": _compressed("int8 per row", _weights(8, "channel"), same=True),
            "int8-tensor": _compressed("int8 per tensor", _weights(8, "tensor"), same=True),
            "int8": _compressed("W8A8 without outlier columns", _weights(8, "channel"), inputs="token"),
            "w8a8": _compressed("W8A8", _weights(8, "channel"), same=True, inputs="tensor"),
            **dict.fromkeys(("nf4", "nf4-dq", "fp4"), _INT4_G64),
        },
        mixes=True,
        render=_llm_compressor,
    ),
    Target(
        "torchao",
        "torchao.json",
        {
            **{
                f"int4-g{size}": _ao("Int4WeightOnlyConfig", 2, f"its own int4 in groups of {size}", group_size=size)
                for size in _GROUPS
            },
            "int4-row": _ao("Int4WeightOnlyConfig", 2, "int4 in groups of 128", group_size=128),
            "int8-row": _AO_INT8,
            "int8-tensor": _ao("Int8WeightOnlyConfig", 2, "int8 per row"),
            "int8": _ao("Int8DynamicActivationInt8WeightConfig", 2, "W8A8 without outlier columns"),
            "w8a8": _ao("Int8DynamicActivationInt8WeightConfig", 2, "W8A8 with a scale per token"),
            **dict.fromkeys(("nf4", "nf4-dq", "fp4"), _AO_G64),
        },
        mixes=True,
        render=_torchao,
    ),
    Target(
        "llama.cpp",
        "llama-cpp.sh",
        {
            **dict.fromkeys(("nf4", "nf4-dq", "fp4"), Scheme("iq4_nl", "IQ4_NL")),
            **dict.fromkeys((*(f"int4-g{size}" for size in _GROUPS), "int4-row"), Scheme("q4_1", "Q4_1")),
            **dict.fromkeys(("int8", "w8a8", "int8-row", "int8-tensor"), Scheme("q8_0", "Q8_0")),
        },
        mixes=True,
        render=_llama_cpp,
    ),
)


def check_high(name: str) -> str:
    """Return the name of a higher format if it is one.

    Raises
    ------
    PlanError
        If it is not.
    """
    if name not in HIGH_FORMATS:
        message = f"high: expected {', '.join(HIGH_FORMATS)}, found {name!r}. Choose one of them with --high."
        raise PlanError(message)
    return name
