"""The command line: each command parses, calls one function of `vrscope.api`, and shows or writes what came back.

Exit status: 0 done; 1 refused, with one line on standard error; 2 wrong usage; 3 a rule of `--fail-on` was broken;
130 interrupted; 141 the reader of the output went away. Anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vrscope import __version__, console, options, recipe_options
from vrscope.errors import VrscopeError
from vrscope.options import Output, example, given

EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141
_MODEL = "HuggingFaceTB/SmolLM2-135M"
_PATH = click.Path(path_type=Path)


class _InOrder(click.Group):
    """A group whose help lists its commands in the order in which they are written."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("vrscope demo", f"vrscope run {_MODEL} -o out", title="Start here"),
)
@click.version_option(__version__, prog_name="vrscope", message="%(prog)s %(version)s")
def commands() -> None:
    """Analyze a checkpoint, rescale it without changing its function, measure what quantization costs.

    MODEL is a folder, a .safetensors file, a model.safetensors.index.json, or a model id of the Hugging Face hub.
    """


@commands.command(epilog=example("vrscope demo"))
@click.option("-o", "--out", type=_PATH, default=Path("vrscope-demo"), show_default=True, help="Folder to write.")
@options.force
@options.output()
def demo(out: Path, force: bool, output: Output) -> None:
    """Do the whole job on the small model that comes with vrscope."""
    from vrscope import api

    with output.progress() as progress:
        report = api.demo(out, force=force, progress=progress)
    output.finish(report, wrote=[out / "report.html"])


@commands.command(epilog=example(f"vrscope run {_MODEL} -o out", f"vrscope run {_MODEL} -o out --granularity channel"))
@options.model
@click.option("-o", "--out", type=_PATH, required=True, help="Folder for report.html, the results and rescaled/.")
@options.method_options
@options.formats
@options.text_options
@options.calibration_options
@options.revision
@options.families
@options.force
@options.everything
@options.output(
    *("damage", "weight_error", "tensors", "depth_law", "spaces", "approximate", "matrices", "reach", "gains"),
    *("exponents", "layer_error"),
    *("activations", "residual", "outlier_dimensions", "experts"),
)
def run(model: str, out: Path, everything: bool, output: Output, **settings: Any) -> None:
    """Do the main job: analyze, plan, rescale, measure, report."""
    from vrscope import api

    with output.progress() as progress:
        report = api.run(model, out, progress=progress, **given(settings))
    output.finish(report, everything, wrote=[out / "report.html"])


@commands.command(epilog=example(f"vrscope analyze {_MODEL} -o stats", f"vrscope analyze {_MODEL} --per head"))
@options.model
@click.option("-o", "--out", type=_PATH, help="Folder for the page, CSV and JSON; without it, print only.")
@click.option("--weights-only", is_flag=True, help="Leave the activations out; runs no model.")
@options.analysis_options
@options.dtype
@click.option("--per", type=click.Choice(["channel", "head"]), help="Add tables of channels, or of heads.")
@click.option("--spectral", is_flag=True, help="Add the top singular value and the stable rank; takes longer.")
@click.option("--target-std", type=options.POSITIVE, help="What `tvr_ratio` compares with. Default: 0.01.")
@options.more_formats
@options.revision
@options.families
@options.force
@options.everything
@options.output(
    *("tensors", "depth_law", "channels", "heads", "weight_error"),
    *("activations", "residual", "outlier_dimensions", "experts"),
)
def analyze(model: str, out: Path | None, force: bool, everything: bool, output: Output, **settings: Any) -> None:
    """Describe weights and activations, layer by layer."""
    from vrscope import api

    if out:
        api.require_free(out, force)
    with output.progress() as progress:
        report = api.analyze(model, progress=progress, **given(settings))
        written = api.save(report, out, force=force) if out else []
    output.finish(report, everything, wrote=written)


@commands.command(epilog=example(f"vrscope plan {_MODEL} --method wisca --granularity channel -o plan.json"))
@options.model
@click.option("-o", "--out", type=_PATH, help="File for the plan; without it, print only.")
@options.method_options
@options.formats
@options.text_options
@options.revision
@options.families
@options.everything
@options.output()
def plan(model: str, out: Path | None, everything: bool, output: Output, **settings: Any) -> None:
    """Choose the scales, and say what they can and cannot change."""
    from vrscope import api

    with output.progress() as progress:
        scales, report = api.plan_and_describe(model, progress=progress, **given(settings))
    if out:
        scales.save(out)
    output.finish(report, everything, wrote=[out] if out else [])


@commands.command(
    epilog=example(f"vrscope rescale {_MODEL} balanced", f"vrscope rescale {_MODEL} balanced --plan plan.json")
)
@options.model
@click.argument("out", type=_PATH)
@click.option("--plan", type=_PATH, metavar="FILE", help="What `vrscope plan -o` wrote, instead of method options.")
@click.option("--invert", is_flag=True, help="Undo the plan: restores the tensors of the original byte for byte.")
@options.method_options
@options.text_options
@options.revision
@options.families
@options.force
@options.output()
def rescale(model: str, out: Path, plan: Path | None, output: Output, **settings: Any) -> None:
    """Write the rescaled checkpoint, whole or not at all."""
    from vrscope import api

    chosen = given(settings)
    extra = sorted(chosen.keys() - {"force", "invert", "revision", "families"})
    if plan and extra:
        message = f"a plan holds its own settings; leave out --{extra[0].replace('_', '-')}."
        raise click.BadParameter(message, param_hint="--plan")
    with output.progress() as progress:
        applied = api.rescale(model, out, plan=plan, progress=progress, **chosen)
    output.finish_rescale(applied, out)


@commands.command(epilog=example(f"vrscope verify {_MODEL} balanced", f"vrscope verify {_MODEL} balanced --logits"))
@click.argument("a", metavar="MODEL")
@click.argument("b", metavar="OTHER")
@click.option("--plan", type=_PATH, metavar="FILE", help="The plan, if OTHER does not carry it.")
@click.option("--logits", is_flag=True, help="Also run both models on text and compare their outputs bit for bit.")
@options.text_options
@options.revision
@options.families
@options.output()
def verify(a: str, b: str, output: Output, **settings: Any) -> None:
    """Prove that two checkpoints are one function.

    Ends with status 1 if they are not.
    """
    from vrscope import api

    with output.progress() as progress:
        report = api.verify(a, b, progress=progress, **given(settings))
    output.finish(report)


@commands.command("check-family", epilog=example("vrscope check-family tiny-model --families my.toml"))
@options.model
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the model runs. Default: auto.")
@click.option("--approximate", is_flag=True, help="Test also the spaces that norms undo up to their eps.")
@options.revision
@options.families
@options.output()
def check_family(model: str, output: Output, **settings: Any) -> None:
    """Test the declaration of a family on a checkpoint.

    Every space is scaled by random powers of two of both signs and the model is run before and after, in float32 and
    bfloat16. Ends with status 1 if a bit differs, and names the spaces that break.
    """
    from vrscope import api

    with output.progress() as progress:
        report = api.check_family(model, progress=progress, **given(settings))
    output.finish(report)


@commands.command(epilog=example(f"vrscope measure {_MODEL} balanced --formats int8,nf4"))
@options.model
@click.argument("others", metavar="[OTHER]...", nargs=-1)
@click.option("-o", "--out", type=_PATH, help="Folder for the page, CSV and JSON; without it, print only.")
@options.formats
@options.text_options
@options.dtype
@click.option("--weights-only", is_flag=True, help="Error of the weights alone; runs no model.")
@options.revision
@options.force
@options.everything
@options.output("damage", "weight_error")
def measure(model: str, others: tuple[str, ...], output: Output, **settings: Any) -> None:
    """Measure what quantization costs, side by side on one text."""
    from vrscope import api

    out, everything, force = (settings.pop(name) for name in ("out", "everything", "force"))
    if out:
        api.require_free(out, force)
    with output.progress() as progress:
        report = api.measure(model, *others, progress=progress, **given(settings))
        written = api.save(report, out, force=force) if out else []
    output.finish(report, everything, wrote=written)


@commands.command(epilog=example(f"vrscope sensitivity {_MODEL} -o fragile --format nf4 --resume"))
@options.model
@click.option("-o", "--out", type=_PATH, required=True, help="Folder for the page, the results, and finished units.")
@recipe_options.format_
@click.option("--by", type=click.Choice(["tensor", "layer", "role"]), help="What is one unit. Default: tensor.")
@options.text_options
@options.dtype
@click.option("--statistics", type=_PATH, metavar="RESULTS", help="Results of `analyze` to correlate as well.")
@click.option("--resume", is_flag=True, help="Go on with the finished units in the folder.")
@options.revision
@options.families
@options.force
@options.everything
@options.output("sensitivity", "correlation")
def sensitivity(model: str, out: Path, everything: bool, output: Output, **settings: Any) -> None:
    """Rank linear weights by the damage of quantizing each alone."""
    from vrscope import api

    with output.progress() as progress:
        report = api.sensitivity(model, out, progress=progress, **given(settings))
        written = api.save(report, out, force=settings["force"] or settings["resume"])
    output.finish(report, everything, wrote=written)


@commands.command(
    epilog=example(
        "vrscope recipe fragile -o recipe --budget-bits 5.0",
        "vrscope recipe fragile -o recipe --budget-kl 0.05 --for bitsandbytes,llama.cpp --check",
    )
)
@click.argument("results", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--out", type=_PATH, required=True, help="Folder for the recipes, the page and the results.")
@recipe_options.budget_options
@click.option("--check", is_flag=True, help="Measure the mixed model, and the one with no weight kept.")
@click.option("--model", metavar="MODEL", help="For --check, if the model is not where it was.")
@options.text_options
@options.dtype
@options.force
@options.everything
@options.output("recipe_summary")
def recipe(
    results: tuple[Path, ...], out: Path, force: bool, everything: bool, output: Output, **settings: Any
) -> None:
    """Choose which weights to keep in higher precision.

    RESULTS are what `vrscope sensitivity` wrote: for the lower format, and if measured for the higher one too.
    """
    from vrscope import api

    api.require_free(out, force)
    with output.progress() as progress:
        report = api.recipe(*results, out=out, force=force, progress=progress, **given(settings))
        written = api.save(report, out, force=force)
    output.finish(report, everything, wrote=[*(out / file for file in report.provenance.get("files", ())), *written])


@commands.command(epilog=example("vrscope report vrscope-demo/results.json -o again.html"))
@click.argument("results", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--out", type=_PATH, required=True, help="The page to write.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def report(results: tuple[Path, ...], out: Path, quiet: bool) -> None:
    """Draw the page again from saved results.

    RESULTS are results.json files, or folders that hold one.
    """
    from vrscope import api
    from vrscope.report.html import write

    merged = api.merge_reports([api.load_report(path) for path in results])
    write(merged, out)
    Output(as_json=False, quiet=quiet).wrote([out])


@commands.command("list", epilog=example("vrscope list formats"))
@click.argument("kind", type=click.Choice(["families", "formats", "statistics", "methods"]))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list on standard output.")
def list_(kind: str, as_json: bool) -> None:
    """Print what is supported."""
    from vrscope.listing import listing
    from vrscope.views import show_listing

    headings, rows = listing(kind)
    if as_json:
        console.say(json.dumps([dict(zip(headings, row, strict=True)) for row in rows], indent=1))
    else:
        show_listing(headings, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Parameters
    ----------
    arguments
        What follows the program's name; the process's own arguments by default.
    """
    if "_VRSCOPE_COMPLETE" in os.environ:  # the shell asks for completions
        commands.main(prog_name="vrscope")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    try:
        with commands.make_context("vrscope", list(sys.argv[1:] if arguments is None else arguments)) as context:
            commands.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VrscopeError as error:
        console.complain(str(error))
        return EXIT_REFUSED
    except (KeyboardInterrupt, click.Abort):
        console.complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return EXIT_BROKEN_PIPE
    return 0


def _drop_output() -> None:
    """Point standard output at nothing, so that the interpreter does not complain when it flushes at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
