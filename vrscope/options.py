"""Options that several commands share, and the value that carries how a command should answer.

Every option that is left out arrives as None and is dropped by `given`, so each default stands once, in `vrscope.api`;
help texts name it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vrscope import console
from vrscope.gate import Rule, RuleError, check_names, parse_rule

if TYPE_CHECKING:
    from vrscope.progress import Progress
    from vrscope.rescale.plan import RescalePlan
    from vrscope.tables import Report

Command = Callable[..., Any]
EXIT_RULE_BROKEN = 3
POSITIVE = click.FloatRange(min=0, min_open=True)
_METHOD_FIELDS = frozenset(  # of MethodOptions
    (
        "target", "alpha", "granularity", "norm", "scales", "target_std", "depth_scaled", "raw", "seed", "limit",
        "approximate", "allow_shrink", "rounds",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Output:
    """How a command answers: as JSON, not at all unless something is wrong, and which rules end it with status 3."""

    as_json: bool
    quiet: bool
    rules: tuple[Rule, ...] = ()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield what takes progress and shows it where somebody looks."""
        with console.progress_display(self.quiet) as shown:
            yield console.Starting(shown)

    def finish(self, report: Report, everything: bool = False, wrote: Sequence[Path] = ()) -> None:
        """Show a report and the files written, then end with status 3 if a rule is broken."""
        from vrscope.tables import to_json
        from vrscope.views import show_report

        if self.as_json:
            console.say(to_json(report))
        elif not self.quiet:
            show_report(report, everything)
            self.wrote(wrote)
        self._check(report)

    def finish_rescale(self, plan: RescalePlan, out: Path) -> None:
        """Say what was written and what it computes."""
        import json

        from vrscope.views import show_rescale

        if self.as_json:
            fields = {"out": str(out), "equivalent": plan.equivalent, "method": plan.method, "changed": plan.changed}
            console.say(json.dumps({**fields, "settings": dict(plan.settings)}, indent=1))
        elif not self.quiet:
            show_rescale(plan.equivalent, plan.changed)
            self.wrote([out])

    def wrote(self, paths: Sequence[Path]) -> None:
        """Name the files written, one a line, unless the answer is JSON or nothing."""
        if not (self.as_json or self.quiet):
            for path in paths:
                console.say(f"wrote {console.escape(str(path))}")

    def _check(self, report: Report) -> None:
        broken = False
        for rule in self.rules:
            try:
                rows = rule.broken_rows(report.tables)
            except RuleError as error:
                raise click.BadParameter(str(error), param_hint="--fail-on") from error
            if len(rows):
                broken = True
                first = ", ".join(f"{name}={value}" for name, value in _identity(rows, rule).items())
                console.complain(f"--fail-on {rule.text}: {len(rows)} row(s), the first with {first}")
        if broken:
            raise click.exceptions.Exit(EXIT_RULE_BROKEN)


def _identity(rows: Any, rule: Rule) -> dict[str, Any]:
    """Return what names the first row (its texts), and the value the rule looked at."""
    first = rows.iloc[0].to_dict()
    names = [name for name, value in first.items() if isinstance(value, str)][:3]
    return {name: first[name] for name in dict.fromkeys((*names, rule.column))}


class Names(click.ParamType[Any]):
    """Comma-separated names from one of the tables; a wrong one is a usage error that names the right ones."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the names, each once."""
        if not isinstance(value, str):
            return value
        from vrscope.errors import UnknownNameError

        names = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
        if not names:
            self.fail("no name is given. See `vrscope list`.", param, ctx)
        for name in names:
            try:
                self.look_up(name)
            except UnknownNameError as error:
                self.fail(str(error), param, ctx)
        return names

    def look_up(self, name: str) -> None:
        """Raise an error that lists the right names if this is none of them."""
        from vrscope.quant.formats import get_format

        get_format(name)


class _RuleType(click.ParamType[Any]):
    """A rule of `--fail-on`, on one of the tables that the command fills."""

    name = "rule"

    def __init__(self, tables: tuple[str, ...]) -> None:
        self.tables = tables

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, Rule):
            return value
        try:
            rule = parse_rule(value)
            check_names(rule, self.tables)  # now, not after minutes of work
        except RuleError as error:
            self.fail(str(error), param, ctx)
        return rule


def example(*lines: str, title: str = "Example") -> str:
    """Return an epilog that shows commands as they are typed."""
    return "\b\n" + "\n".join((f"{title}:", *(f"  {line}" for line in lines)))


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were on the command line."""
    return {name: value for name, value in settings.items() if value is not None}


def output(*tables: str) -> Callable[[Command], Command]:
    """Add `--json` and `--quiet`, and `--fail-on` if the command fills `tables`; the command gets one `output`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*arguments: Any, as_json: bool, quiet: bool, fail_on: tuple[Rule, ...] = (), **rest: Any) -> Any:
            return command(*arguments, output=Output(as_json, quiet, tuple(fail_on)), **rest)

        shared = [
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
            click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors (and JSON, if asked for)."),
        ]
        if tables:
            rule = click.option(
                "--fail-on",
                type=_RuleType(tables),
                multiple=True,
                metavar="RULE",
                help="Exit with status 3 if a row satisfies TABLE.COLUMN OP NUMBER, or "
                f"TABLE[COLUMN=TEXT].COLUMN OP NUMBER. Tables: {', '.join(tables)}. May be repeated.",
            )
            shared.append(rule)
        return _apply(shared, wrapped)

    return decorate


def method_options(command: Command) -> Command:
    """Add the options that choose scales: the same for `plan`, `rescale` and `run`.

    An option that the chosen method does not use is a usage error: it would do nothing.
    """

    @functools.wraps(command)
    def checked(*arguments: Any, **settings: Any) -> Any:
        _check_method(given(settings))
        return command(*arguments, **settings)

    return _apply(
        [
            click.option(
                "--method",
                metavar="NAME",
                callback=_known_method,
                help="See `vrscope list methods`. Default: auto for run, else wisca.",
            ),
            click.option(
                "--granularity",
                type=click.Choice(["tensor", "head", "channel"]),
                help="wisca: what shares one scale. Default: channel.",
            ),
            click.option(
                "--norm",
                type=click.Choice(["frobenius", "l1", "max"]),
                help="wisca: what is balanced. Default: frobenius.",
            ),
            click.option(
                "--scales",
                type=click.Choice(["pow2", "free"]),
                help="Powers of two keep the function bit for bit; free factors round. Default: pow2.",
            ),
            click.option(
                "--format",
                "target",
                type=Names(),
                metavar="NAMES",
                help="auto, awq: formats to lower the damage of, comma-separated. Default: nf4,int4-g64.",
            ),
            click.option(
                "--alpha", type=click.FloatRange(0, 1), help="smoothquant: how much range moves. Default: 0.5."
            ),
            click.option(
                "--rounds",
                type=click.IntRange(0, 16),
                help="auto, awq: rounds of refinement on the rounded model; 0: none. Default: 1.",
            ),
            click.option("--limit", type=click.IntRange(0, 30), help="Largest exponent of two. Default: 6."),
            click.option("--target-std", type=POSITIVE, help="tvr: standard deviation to reach. Default: 0.01."),
            click.option("--depth-scaled", is_flag=True, default=None, help="tvr: target / sqrt(layer), from 1."),
            click.option(
                "--raw",
                is_flag=True,
                default=None,
                help="tvr: the formula of the paper, for training on. NOT the same function.",
            ),
            click.option("--seed", type=int, help="random: seed of the exponents. Default: 0."),
            click.option(
                "--approximate",
                is_flag=True,
                default=None,
                help="tvr, random: also enlarge what norms undo up to their eps. Equal up to eps, not to the bit.",
            ),
            click.option(
                "--allow-shrink",
                is_flag=True,
                default=None,
                help="With --approximate: also shrink such inputs, to an eighth at least; eps then counts for more.",
            ),
        ],
        checked,
    )


def text_options(command: Command, where: str = "Where models run. Default: auto.") -> Command:
    """Add the options of everything that runs a model on text; `where` is the help of `--device`."""
    return _apply(
        [
            click.option(
                "--text",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="UTF-8 text to measure on. Default: a sample that ships with vrscope.",
            ),
            click.option("--tokens", type=click.IntRange(min=2), metavar="N", help="Tokens of it to use."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help=where),
        ],
        command,
    )


def analysis_options(command: Command) -> Command:
    """Add the options of `analyze`, which may run a model on text, and statistics of weights on a GPU."""
    where = "Where models run; cuda: weight statistics too, which auto leaves to the CPU. Default: auto."
    return text_options(command, where)


def calibration_options(command: Command) -> Command:
    """Add the options of `run` that say what a method that calibrates runs the model on."""
    return _apply(
        [
            click.option(
                "--calibration-text",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="auto, awq, smoothquant: text to choose the scales on. Without it, --text behind its --tokens.",
            ),
            click.option(
                "--calibration-tokens", type=click.IntRange(min=2), metavar="N", help="Tokens of it. Default: 2048."
            ),
        ],
        command,
    )


def _known_method(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    from vrscope.errors import UnknownNameError
    from vrscope.rescale.methods import get_method

    try:
        get_method(value)
    except UnknownNameError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    return value


def _check_method(chosen: Mapping[str, Any]) -> None:
    if not chosen.keys() & _METHOD_FIELDS:
        return
    from vrscope.rescale.methods import get_method

    method = get_method(chosen.get("method") or _default_method())
    for name in sorted(chosen.keys() & _METHOD_FIELDS):
        if name not in method.uses:
            used = ", ".join(_flag(name) for name in method.uses)
            message = f"{_flag(name)} does nothing for method {method.name!r}, which uses {used}."
            raise click.UsageError(message)
    if "allow_shrink" in chosen and "approximate" not in chosen:
        message = "--allow-shrink does nothing without --approximate: exact scales shrink anyway."
        raise click.UsageError(message)


def _default_method() -> str:
    """Return the default of the library function that the command at hand calls."""
    from vrscope import api

    function = getattr(api, str(click.get_current_context().info_name))
    return str(inspect.signature(function).parameters["method"].default)


def _flag(name: str) -> str:
    if name == "target":
        return "--format"
    return "--" + name.replace("_", "-")


def _apply(decorators: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """Apply decorators so that help lists them in the order written."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


model = click.argument("model", metavar="MODEL")
force = click.option("--force", is_flag=True, help="Replace what is already there.")
revision = click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model id.")
families = click.option(
    "--families",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file that declares more architectures; see docs/families.md.",
)
everything = click.option("--all", "everything", is_flag=True, help="Print long tables whole.")
dtype = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="What models compute in. Default: float32."
)
formats = click.option(
    "--formats",
    type=Names(),
    metavar="NAMES",
    help="Comma-separated; see `vrscope list formats`. Default: int8,int8-row,nf4,fp4,int4-g64.",
)
more_formats = click.option(
    "--formats",
    type=Names(),
    metavar="NAMES",
    help="Add the error of the weights in these formats, comma-separated; see `vrscope list formats`.",
)
