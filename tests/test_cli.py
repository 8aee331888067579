"""The command line: exit status, one-line errors, help with examples, and options that all reach the library."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest

import vrscope
from vrscope import api, cli, options
from vrscope.demo import demo_model
from vrscope.errors import CheckpointError, UnknownNameError, VerificationError
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.plan import RescalePlan
from vrscope.tables import Report, from_json

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = cli.commands.commands
REPORT = Report(
    "measure",
    {"model": "m"},
    ({"level": "good", "text": "all is\nwell"}, {"level": "bad", "text": "[red]nf4 hurts"}),
    {
        "damage": pd.DataFrame(
            {
                "checkpoint": ["original", "original"],
                "format": ["none", "nf4"],
                "kl": [0.0, 0.25],
                "kl_sem": [0.0, 0.01],
                "cosine": [float("nan")] * 2,
            }
        )
    },
)
PLAN = RescalePlan("llama", "wisca", {"norm": "l1"}, "pow2", {}, "f" * 64)
RAW = dataclasses.replace(PLAN, method="tvr", zeroed=("model.bias",))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit status, output and errors."""
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*arguments: str, code: str = "", **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own; `code` may put something into its way first."""
    program = f"{code}\nimport sys\nfrom vrscope.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False, **settings)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, mock.Mock]:
    """Put stand-ins that keep the real signatures in the place of the functions that work."""
    fakes = {}
    values = {"plan_and_describe": (PLAN, REPORT), "rescale": PLAN, "save": [Path("out/results.json")]}
    for name in (
        "analyze",
        "plan_and_describe",
        "rescale",
        "verify",
        "measure",
        "run",
        "demo",
        "save",
        "sensitivity",
        "recipe",
    ):
        fakes[name] = mock.create_autospec(getattr(api, name), return_value=values.get(name, REPORT))
        monkeypatch.setattr(api, name, fakes[name])
    return fakes


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, name, "--help")
    assert (code, err) == (0, "")
    examples = re.findall(r"^ +vrscope (.+)$", out.partition("Example:")[2], re.MULTILINE)
    assert examples
    for example in examples:
        first, *arguments = shlex.split(example)
        assert first == name
        with COMMANDS[first].make_context(first, arguments):
            pass


def test_the_help_lists_every_command_with_a_whole_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    listed = re.findall(r"^  ([\w-]+) +(\S.*)$", out.partition("Commands:")[2].partition("Start here")[0], re.MULTILINE)
    assert [name for name, _ in listed] == list(COMMANDS)
    assert all(text.endswith(".") and not text.endswith("...") for _, text in listed)


def test_help_comes_at_once() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert process("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("OMP_WAIT_POLICY", None, "passive"),
        ("OMP_WAIT_POLICY", "active", "active"),
        ("GOMP_SPINCOUNT", None, "20000"),
        ("GOMP_SPINCOUNT", "7", "7"),
    ],
)
def test_idle_threads_sleep_soon_unless_told_otherwise_before_torch_is_loaded(
    name: str, own: str | None, expected: str
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {} if own is None else {name: own}
    code = f"import os, sys, vrscope.__main__; print(os.environ[{name!r}], 'torch' in sys.modules)"
    done = process("--version", code=code, env=environment)
    assert done.stdout.split()[:2] == [expected, "False"]


FAULTS = """
import resource, threading
import numpy as np
from vrscope.__main__ import keep_freed_memory
keep_freed_memory()
def work():
    for _ in range(200):
        np.ones(1 << 20, np.uint8)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told how long to keep freed memory")
def test_freed_memory_is_kept_for_the_next_block_unless_told_otherwise() -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    told = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    kept, returned = (process("--version", code=FAULTS, env=plain | own).stdout.split()[0] for own in ({}, told))
    assert int(kept) < 2000  # 256 pages, each time anew: 51,200
    assert int(returned) > 20_000


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--version") == (0, f"vrscope {vrscope.__version__}\n", "")


# Options and the library


def accepted(function: Callable[..., Any]) -> dict[str, Any]:
    """Return parameters and defaults of a library function, method options included."""
    parameters = inspect.signature(function).parameters
    names = {name: parameter.default for name, parameter in parameters.items()}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names.update({field.name: field.default for field in dataclasses.fields(MethodOptions)})
    return names


@pytest.mark.parametrize(
    "name", ["demo", "run", "analyze", "plan", "rescale", "verify", "measure", "sensitivity", "recipe"]
)
def test_every_option_is_a_parameter_of_the_library_and_names_its_default(name: str) -> None:
    known = accepted(getattr(api, name))
    if name == "plan":
        assert accepted(api.plan_and_describe).items() >= known.items()
        known.update(accepted(api.describe))
    if name in {"analyze", "measure"}:
        known.update(accepted(api.save))
    shown_only = {"as_json", "quiet", "fail_on", "everything", *(() if "out" in known else ("out",))}
    for parameter in COMMANDS[name].params:
        if parameter.name in shown_only:
            continue
        assert parameter.name in known
        stated = re.search(r"Default: (.+)\.$", getattr(parameter, "help", None) or "")
        default = known[parameter.name]
        if stated and parameter.name not in {"text", "method"}:
            spelled = ",".join(default) if isinstance(default, tuple) else str(default)
            assert stated[1] == spelled, parameter.name


def test_the_method_options_are_all_there() -> None:
    fields = {field.name for field in dataclasses.fields(MethodOptions)}
    for name in ("plan", "rescale", "run"):
        assert fields <= {parameter.name for parameter in COMMANDS[name].params}


@pytest.mark.parametrize(
    ("line", "function", "expected"),
    [
        (
            "run m -o o --method wisca --granularity head --tokens 99",
            "run",
            {"method": "wisca", "granularity": "head", "tokens": 99},
        ),
        ("run m -o o --formats int8,nf4,int8", "run", {"formats": ("int8", "nf4")}),
        ("analyze m", "analyze", {}),
        (
            "analyze m --per head --spectral --target-std 0.02 --revision v1",
            "analyze",
            {"per": "head", "revision": "v1"},
        ),
        ("plan m --method tvr --raw", "plan_and_describe", {"method": "tvr", "raw": True}),
        ("plan m --formats nf4 --revision v1", "plan_and_describe", {"formats": ("nf4",), "revision": "v1"}),
        ("rescale m o --method random --seed 7 --force", "rescale", {"method": "random", "seed": 7, "force": True}),
        ("rescale m o --plan p.json --invert", "rescale", {"plan": Path("p.json"), "invert": True}),
        ("verify a b --logits --tokens 64", "verify", {"logits": True, "tokens": 64}),
        ("measure a b c --weights-only --dtype bfloat16", "measure", {"weights_only": True, "dtype": "bfloat16"}),
        ("demo -o d --force", "demo", {"force": True}),
        (
            "sensitivity m -o o --format fp4 --by role --resume",
            "sensitivity",
            {"format": "fp4", "by": "role", "resume": True},
        ),
        ("sensitivity m -o o --tokens 99 --statistics s", "sensitivity", {"tokens": 99, "statistics": Path("s")}),
        (
            "recipe r -o o --budget-bits 5 --for bitsandbytes,llama.cpp --high int8 --low nf4 --fuse",
            "recipe",
            {"budget_bits": 5.0, "targets": ("bitsandbytes", "llama.cpp"), "high": "int8", "low": "nf4", "fuse": True},
        ),
        ("recipe r s -o o --budget-kl 0.1 --check --model m --tokens 64", "recipe", {"check": True, "model": "m"}),
    ],
)
def test_options_reach_the_library(
    line: str,
    function: str,
    expected: dict[str, Any],
    library: dict[str, mock.Mock],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = answer(capsys, *line.split())
    assert (code, err) == (0, "")
    (call,) = library[function].call_args_list
    assert expected.items() <= call.kwargs.items()


def test_what_is_left_out_is_left_to_the_library(
    library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(capsys, "run", "m", "-o", "o")[0] == 0
    assert set(library["run"].call_args.kwargs) <= {"progress", "force"}


# Exit status


@pytest.mark.parametrize(
    "line",
    [
        "",
        "colour",
        "run m",
        "run m -o o --colour red",
        "analyze",
        "analyze m --per layer",
        "analyze m --fail-on tensors.kl",
        "analyze m --fail-on damage.kl>1",
        "plan m --method wisco",
        "plan m --method wisca --target-std 0.1",
        "plan m --seed 1",
        "plan m --limit 99",
        "rescale m o --plan p.json --norm l1",
        "measure m --formats nf5",
        "measure m --formats ,",
        "measure m --tokens 0",
        "list colours",
        "report -o x.html",
    ],
)
def test_wrong_usage_ends_with_2_and_touches_nothing(
    line: str, library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answer(capsys, *line.split())
    assert (code, out) == (2, "")
    assert "Usage: vrscope" in err
    assert not any(fake.called for fake in library.values())


@pytest.mark.parametrize("error", [CheckpointError("a\nb\x1b[0m"), UnknownNameError("x"), VerificationError("differs")])
def test_a_refusal_ends_with_1_and_one_line(
    error: Exception, library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]
) -> None:
    library["verify"].side_effect = error
    code, out, err = answer(capsys, "verify", "a", "b")
    assert (code, out) == (1, "")
    assert err.startswith("vrscope: ") and err.count("\n") == 1 and "\x1b" not in err


def test_a_bug_shows_its_traceback(library: dict[str, mock.Mock]) -> None:
    library["analyze"].side_effect = ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        cli.main(["analyze", "m"])


@pytest.mark.parametrize("rule", ["damage.kl>0.2", "damage[format=nf4].kl>=0.25"])
def test_a_broken_rule_ends_with_3_after_the_result(
    rule: str, library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answer(capsys, "measure", "m", "--fail-on", "damage.kl>9", "--fail-on", rule)
    assert code == options.EXIT_RULE_BROKEN == 3
    assert "nf4" in out
    assert err == f"vrscope: --fail-on {rule}: 1 row(s), the first with checkpoint=original, format=nf4, kl=0.25\n"


def test_a_rule_that_holds_ends_with_0(library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "measure", "m", "--fail-on", "damage.kl>0.25")[0] == 0


def test_a_rule_on_an_unknown_column_is_wrong_usage(
    library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = answer(capsys, "measure", "m", "--fail-on", "damage.kll>0.25")
    assert code == 2 and "kll" in err and "kl_sem" in err
    assert not library["measure"].called, "found before any work"


def test_an_interrupt_ends_with_130_and_one_line() -> None:
    patch = (
        "import os, signal, time\nfrom vrscope import api\n"
        "def analyze(*a, **k):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "api.analyze = analyze"
    )
    done = process("analyze", "m", code=patch)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "vrscope: interrupted\n")


@pytest.mark.parametrize(
    "patch",
    [
        "from vrscope import api\ndef analyze(*a, **k):\n    exec('raise KeyboardInterrupt')\napi.analyze = analyze",
        "class Finder:\n    def find_spec(self, name, *rest):\n        if name == 'vrscope.cli':\n"
        "            raise KeyboardInterrupt\nimport sys\nsys.meta_path.insert(0, Finder())",
    ],
    ids=["inside exec", "while importing"],
)
def test_an_interrupt_ends_with_130_wherever_it_comes(patch: str) -> None:
    program = f"{patch}\nimport sys\nfrom vrscope.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", program, "analyze", "m"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "vrscope: interrupted\n")


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("analyze model --weights-only -o out", "statistics"),
        ("plan model -o out", "reading weights"),
        ("rescale model out --plan plan.json", "writing"),
        ("rescale model balanced --plan plan.json --force", "writing"),
        ("verify model balanced", "proving"),
    ],
)
def test_an_interrupt_at_work_leaves_everything_as_it_was(work: Path, line: str, stage: str) -> None:
    patch = (
        "import contextlib, os, signal\nfrom vrscope import console\n"
        "def tell(stage, done, total, unit):\n"
        f"    if stage == {stage!r} and done and unit == 'bytes':\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "console.progress_display = lambda quiet: contextlib.nullcontext(tell)"
    )
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    program = f"{patch}\nimport os, sys\nos.chdir({str(work)!r})\nfrom vrscope.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", program, *shlex.split(line)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "vrscope: interrupted\n")
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a plan, and the checkpoint that the plan makes."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(demo_model(), folder / "model")
    vrscope.plan(folder / "model").save(folder / "plan.json")
    vrscope.rescale(folder / "model", folder / "balanced", plan=folder / "plan.json")
    return folder


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading = subprocess.Popen(
        [sys.executable, "-m", "vrscope", "list", "formats", "--json"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONUNBUFFERED": "1", "PATH": ""},
    )
    assert reading.stdout is not None and reading.stderr is not None
    reading.stdout.close()
    assert reading.wait(60) == 141
    assert reading.stderr.read() == b""
    reading.stderr.close()


def test_a_terminal_that_knows_only_ascii_is_no_error() -> None:
    done = process("verify", "naïve\udc80", "b", env={"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONUTF8": "1"})
    assert done.returncode == 1 and "na\\xefve" in done.stderr and done.stderr.count("\n") == 1
    done = process("list", "formats", env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert done.returncode == 0 and "nf4" in done.stdout


# What is printed


def test_json_is_the_result_and_nothing_else(library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, "measure", "m", "--json")
    assert (code, err) == (0, "")
    assert from_json(out).tables["damage"]["kl"].tolist() == [0.0, 0.25]
    code, out, _ = answer(capsys, "rescale", "m", "o", "--json")
    assert code == 0 and json.loads(out)["equivalent"] == "bit-equal"


@pytest.mark.parametrize(
    "line", ["measure m", "rescale m o", "plan m", "verify a b", "run m -o o", "analyze m", "sensitivity m -o o"]
)
def test_quiet_prints_nothing(line: str, library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, *line.split(), "--quiet") == (0, "", "")


def test_findings_and_figures_are_shown_escaped_and_empty_columns_are_not(
    library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = answer(capsys, "measure", "m")
    assert "+ all is\\nwell" in out and "! [red]nf4 hurts" in out
    assert "0.2500 ± 0.01" in out
    assert "cosine" not in out


def test_raw_tvr_is_labelled_not_equivalent_wherever_it_is_shown(
    library: dict[str, mock.Mock], capsys: pytest.CaptureFixture[str]
) -> None:
    library["rescale"].return_value = RAW
    raw = dataclasses.replace(REPORT, provenance={"equivalent": "not equivalent"})
    library["plan_and_describe"].return_value = PLAN, raw
    for line in ("rescale m o --method tvr --raw", "plan m --method tvr --raw"):
        _, out, _ = answer(capsys, *line.split())
        assert "NOT EQUIVALENT" in out


@pytest.mark.parametrize("kind", ["families", "formats", "statistics", "methods"])
def test_lists_are_the_same_as_text_and_as_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = answer(capsys, "list", kind)
    code, out, _ = answer(capsys, "list", kind, "--json")
    rows = json.loads(out)
    assert code == 0 and rows
    for row in rows:
        assert next(iter(row.values())) in text


# The real thing, on the demo model


def test_the_commands_work_together_on_a_real_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(REPOSITORY / "vrscope" / "demo" / "model")
    plan, balanced, back = tmp_path / "plan.json", tmp_path / "balanced", tmp_path / "back"
    code, out, _ = answer(capsys, "plan", model, "--granularity", "channel", "-o", str(plan))
    assert code == 0 and "nf4" in out and f"wrote {plan}" in out
    code, out, _ = answer(capsys, "rescale", model, str(balanced), "--plan", str(plan))
    assert code == 0 and "bit for bit" in out
    code, out, _ = answer(capsys, "verify", model, str(balanced))
    assert code == 0 and "bit-equal" in out
    code, _, err = answer(capsys, "rescale", model, str(balanced), "--plan", str(plan))
    assert code == 1 and "--force" in err
    code, _, err = answer(
        capsys, "rescale", str(balanced), str(back), "--plan", str(balanced / "vrscope_plan.json"), "--invert"
    )
    assert (code, err) == (0, "")
    assert (back / "model.safetensors").read_bytes() == (Path(model) / "model.safetensors").read_bytes()
    code, out, _ = answer(
        capsys, "measure", model, str(balanced), "--weights-only", "--formats", "nf4", "-o", str(tmp_path / "m")
    )
    assert code == 0 and "SQNR" in out
    code, out, _ = answer(capsys, "report", str(tmp_path / "m" / "results.json"), "-o", str(tmp_path / "again.html"))
    assert code == 0 and (tmp_path / "again.html").read_text().startswith("<!")


def test_heads_channels_and_spectra_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(REPOSITORY / "vrscope" / "demo" / "model")
    _, out, _ = answer(capsys, "analyze", model, "--per", "head", "--spectral")
    assert "Heads: of " in out and "kv group" in out and "stable rank" in out
    _, few, _ = answer(capsys, "analyze", model, "--per", "channel")
    _, every, _ = answer(capsys, "analyze", model, "--all")
    assert "Channels: of " in few
    assert few.count(".down_proj.weight ") < every.count(".down_proj.weight ")


def test_bad_input_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04K\x01.")
    broken = tmp_path / "results.json"
    broken.write_text("{")
    for line in (
        f"analyze {tmp_path}/absent/model",
        f"analyze {pickle}",
        f"rescale {tmp_path} {tmp_path}/out",
        f"report {broken} -o {tmp_path}/x.html",
        f"verify {tmp_path} {tmp_path}",
    ):
        code, out, err = answer(capsys, *line.split())
        assert (code, out) == (1, "") and err.startswith("vrscope: ") and err.count("\n") == 1, line
