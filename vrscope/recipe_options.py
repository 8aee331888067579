"""Options of `vrscope sensitivity` and `vrscope recipe`: one format, a budget, and the tools to write for."""

from __future__ import annotations

import functools
from typing import Any

import click

from vrscope.options import POSITIVE, Command, Names


class _Targets(Names):
    """Comma-separated tools that recipes are written for."""

    def look_up(self, name: str) -> None:
        """Raise an error that lists the right names if this is none of them."""
        from vrscope.fragility.targets import get_target

        get_target(name)


class _Name(Names):
    """The name of one format."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = super().convert(value, param, ctx)
        return (
            names
            if isinstance(names, str)
            else names[0]
            if len(names) == 1
            else self.fail("give one name.", param, ctx)
        )


_BUDGET = (
    click.option("--budget-bits", type=POSITIVE, metavar="BITS", help="Mean bits per linear weight."),
    click.option("--budget-bytes", type=POSITIVE, metavar="N", help="Bytes of the whole model."),
    click.option("--budget-gb", type=POSITIVE, metavar="GB", help="The same in 10^9 bytes."),
    click.option("--budget-kl", type=POSITIVE, metavar="NATS", help="Sum of single damages; the size follows."),
    click.option("--low", type=_Name(), help="Lower format, if several were measured; the smallest unless given."),
    click.option(
        "--high",
        type=click.Choice(["bfloat16", "int8", "int8-row"]),
        help="What kept weights stay in. Default: bfloat16.",
    ),
    click.option(
        "--for",
        "targets",
        type=_Targets(),
        metavar="NAMES",
        help="Comma-separated tools to write for. Default: bitsandbytes,llm-compressor,torchao,llama.cpp.",
    ),
    click.option("--fuse", is_flag=True, help="Keep q, k, v together, and gate and up, as vLLM joins them."),
)


def budget_options(command: Command) -> Command:
    """Add the budgets of a recipe, of which exactly one is to be given, and what they are spent on."""
    kinds = ("bits", "bytes", "gb", "kl")

    @functools.wraps(command)
    def checked(*arguments: Any, **settings: Any) -> Any:
        stated = [kind for kind in kinds if settings[f"budget_{kind}"] is not None]
        if len(stated) != 1:
            message = f"give one budget: {', '.join(f'--budget-{kind}' for kind in kinds)}."
            raise click.UsageError(message)
        return command(*arguments, **settings)

    for option in reversed(_BUDGET):
        checked = option(checked)
    return checked


format_ = click.option("--format", type=_Name(), metavar="NAME", help="See `vrscope list formats`. Default: nf4.")
