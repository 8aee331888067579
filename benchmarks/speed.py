"""How fast vrscope is, and how much memory it takes, beside what else reads or copies a checkpoint.

    python benchmarks/speed.py [--gb 1 4 16] [--moe 30000] [--rounds 3] [--lens PATH] [--scratch DIR] [-o speed.md]

Makes synthetic checkpoints in a scratch folder, one at a time, and deletes them, also when it is interrupted. Every
command runs as a process of its own, start-up included. The commands take turns, each round from another one on, so
that a busy machine slows all of them, and the checkpoint is read before each, so that its files are in the page cache
where memory allows. Everything has run once before anything is timed. Reported are medians with the least and the
largest, ratios taken within each round, and the largest resident memory of a process. Prints Markdown; `make readme`
copies the part between the `summary` marks of benchmarks/results/speed.md into the README.

weightlens needs an environment of its own: `python -m venv lens && lens/bin/pip install weightlens==0.3.0`, then
`--lens lens/bin/lens`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from measured import Command, markdown, ratios, spread, take_turns

from vrscope.provenance import provenance

HERE = Path(__file__).parent
DEMO = HERE.parent / "vrscope" / "demo" / "model"
FORMATS = "int8-row,int4-g128,nf4"
MEMORY, NAIVE, LENS, COPY, SYNCED = "memory read", "naive script", "weightlens", "cp -r", "cp -r, synced"


@dataclass
class Case:
    """One checkpoint, and the commands measured on it."""

    title: str
    size_bytes: int
    commands: list[Command]
    named: dict[str, Command] = field(init=False)

    def __post_init__(self) -> None:
        self.named = {command.name: command for command in self.commands}

    def table(self) -> list[str]:
        """Return the lines of its Markdown table."""
        headings = ("what", "command", "seconds", "GB/s", "times as fast as", f"of {MEMORY}", "processor s", "peak MB")
        rows = []
        for command in self.commands:
            rates = [self.size_bytes / seconds / 1e9 for seconds in command.seconds]
            others = [self.named[name] for name in command.against if name in self.named]
            against = "; ".join(f"{spread(ratios(command, other), '.2f')} {other.name}" for other in others)
            share = spread(ratios(command, self.named[MEMORY]), ".3f")
            cells = (command.name, f"`{command.line}`", spread(command.seconds, ".2f"), spread(rates, ".3g"), against)
            rows.append((*cells, share, f"{statistics.median(command.cpu):.1f}", f"{max(command.peak_mb):.0f}"))
        return [f"### {self.title}", "", *markdown(headings, rows, 2)]


def main() -> int:
    """Measure what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="*", default=[1, 4, 16])
    parser.add_argument("--moe", type=int, default=30000, help="tensors of the mixture of experts; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints; default: a temporary one")
    parser.add_argument("--naive-gb", type=float, default=4, help="largest checkpoint for the naive script and lens")
    parser.add_argument("--lens", default=shutil.which("lens"), help="weightlens' command, if it is installed")
    parser.add_argument("--blocks", type=int, default=64, help="megabytes for the 4-bit engines; 0: leave them out")
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    if given.lens and not shutil.which(given.lens):
        parser.error(f"--lens {given.lens}: expected weightlens' program, found none. Install weightlens==0.3.0.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder goes
    try:
        with tempfile.TemporaryDirectory(dir=given.scratch, prefix="vrscope-speed-") as name:
            _measure(Path(name), given)
    except KeyboardInterrupt:
        print("interrupted; the scratch folder is removed", file=sys.stderr)
        return 130
    return 0


def _measure(scratch: Path, given: argparse.Namespace) -> None:
    """Measure everything; what is known so far is written after each checkpoint."""
    sizes = sorted(given.gb)
    _require_space(scratch, 2.2 * max(sizes, default=0.5))
    facts = _facts(given)
    started = _start_up(scratch, given.rounds)
    _warm_up(scratch, given)
    llamas: list[Case] = []
    rest: list[Case] = []
    engines: list[str] = []

    def write() -> None:
        body = [line for case in (*llamas, *rest) for line in case.table()]
        summary = ["<!-- summary -->", *_summary(llamas, rest, started), "<!-- end of summary -->", ""]
        text = "\n".join([*facts, *summary, *_growth(llamas), *_start_table(started), *body, *engines])
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(f"{text.rstrip()}\n", encoding="utf-8")
        if engines or not given.out:
            print(text)

    for size in sizes:
        llamas.append(_measure_llama(scratch, size, given))
        write()
    if given.moe:
        rest.append(_measure_moe(scratch, given))
    engines = _measure_blocks(given) if given.blocks and importlib.util.find_spec("bitsandbytes") else [""]
    write()


def _facts(given: argparse.Namespace) -> list[str]:
    """Return what the reader must know of the machine and of how it was measured."""
    known = provenance(0.0)
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    sizes = " ".join(f"{size:g}" for size in sorted(given.gb))
    words = f"python benchmarks/speed.py --gb {sizes} --moe {given.moe} --rounds {given.rounds}"
    words += f" --naive-gb {given.naive_gb:g} --blocks {given.blocks}{' --lens LENS' if given.lens else ''}"
    return [
        "# Speed and memory",
        "",
        f"`{words}`",
        "",
        f"{known['machine']}; {known['cores']} cores, {memory:.0f} GB of memory, load {os.getloadavg()[0]:.1f} at the "
        f"start; {known['date'][:10]}; rounds: {given.rounds}. vrscope {_commit() or known['vrscope']}, {versions}"
        f"{_lens_version(given.lens)}. Medians (least to largest).",
        "",
        f"*{MEMORY}* adds up every 8 bytes of the mapped files on all cores: what reading weights from memory costs at "
        "least. *buffer read* copies the files into 4 MiB buffers that stay in the caches and looks at nothing.",
        "",
    ]


def _commit() -> str:
    """Return the commit of this repository, or nothing."""
    words = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return (
        subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    )


def _lens_version(lens: str | None) -> str:
    """Return which weightlens it is, asked of the Python beside it."""
    python = Path(shutil.which(lens) or lens).parent / "python" if lens else None
    if python is None or not python.exists():
        return ""
    code = "import importlib.metadata as m; print(m.version('weightlens'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return f", weightlens {done.stdout.strip()}" if done.returncode == 0 else ""


def _warm_up(scratch: Path, given: argparse.Namespace) -> None:
    """Run everything once on a small checkpoint, so that nothing timed compiles or is read from a cold disk."""
    folder = _make(scratch / "small", "llama", 2e8)
    for command in _commands(folder, scratch, given, True):
        print(f"warm-up: {command.name}", file=sys.stderr, flush=True)
        command.run()
    _clear(scratch)


def _measure_llama(scratch: Path, size: float, given: argparse.Namespace) -> Case:
    """Make a Llama of `size` GB and measure all commands on it."""
    _require_space(scratch, 2.2 * size)
    folder = _make(scratch / "llama", "llama", size * 1e9)
    commands = take_turns(
        _commands(folder, scratch, given, size <= given.naive_gb), given.rounds, lambda: _into_cache(folder)
    )
    case = Case(f"Llama, {size:g} GB bfloat16", _size(folder), commands)
    _clear(scratch)
    return case


def _measure_moe(scratch: Path, given: argparse.Namespace) -> Case:
    """Make a mixture of experts of many small tensors and measure its analysis."""
    _require_space(scratch, 2e-5 * given.moe)
    folder = _make(scratch / "moe", "moe", given.moe)
    commands = [c for c in _commands(folder, scratch, given, True) if c.name in {MEMORY, "analyze", NAIVE, LENS}]
    take_turns(commands, given.rounds, lambda: _into_cache(folder))
    case = Case(f"Mixture of experts, {given.moe:,} tensors", _size(folder), commands)
    _clear(scratch)
    return case


def _commands(folder: Path, scratch: Path, given: argparse.Namespace, slow: bool) -> list[Command]:
    """Return what is measured on one checkpoint; `slow` adds the naive script and weightlens."""
    rescaled, copied, plan = scratch / "rescaled", scratch / "copied", scratch / "plan.json"
    others = (NAIVE, LENS)

    def python(script: str, *words: str) -> tuple[str, list[str]]:
        line = " ".join(["python", f"benchmarks/{script}", *words, "MODEL"])
        return line, [sys.executable, str(HERE / script), *words, str(folder)]

    copy = f"cp -r '{folder}' '{copied}'"
    commands = [
        Command(MEMORY, *python("roofline.py", "sum"), timed_by_itself=True),
        Command("buffer read", *python("roofline.py", "copy"), timed_by_itself=True),
        Command("analyze", *_vrscope("analyze MODEL --weights-only -q", MODEL=folder), others),
        Command(
            "analyze, formats", *_vrscope(f"analyze MODEL --weights-only -q --formats {FORMATS}", MODEL=folder), others
        ),
        Command("plan", *_vrscope("plan MODEL --method wisca -o PLAN -q", MODEL=folder, PLAN=plan)),
    ]
    if slow:
        commands.append(Command(NAIVE, *python("naive.py")))
    if slow and given.lens:
        words = ["analyze", str(folder / "model.safetensors.index.json"), "--num-workers", "auto"]
        line = "lens analyze MODEL/model.safetensors.index.json --num-workers auto"
        commands.append(Command(LENS, line, [given.lens, *words]))
    rescale = _vrscope("rescale MODEL OUT --plan PLAN -q", MODEL=folder, OUT=rescaled, PLAN=plan)
    return [
        *commands,
        Command(COPY, "cp -r MODEL COPY", ["sh", "-c", copy], out=copied),
        Command(SYNCED, "cp -r MODEL COPY && sync COPY/*", ["sh", "-c", f"{copy} && sync '{copied}'/*"], out=copied),
        Command("rescale", *rescale, (COPY, SYNCED), rescaled, keep=True),
        Command("verify", *_vrscope("verify MODEL OUT -q", MODEL=folder, OUT=rescaled)),
    ]


def _vrscope(line: str, **names: Path) -> tuple[str, list[str]]:
    """Return a command as it is typed, with names for its folders, and as it is run."""
    words = [str(names.get(word, word)) for word in line.split()]
    return f"vrscope {line}", [sys.executable, "-m", "vrscope", *words]


def _start_up(scratch: Path, rounds: int) -> list[Command]:
    """Measure what does not depend on the size of a checkpoint: start-up, and the first use on a machine."""
    out = scratch / "tiny"
    tiny = {"DEMO": DEMO, "OUT": out}
    lines = ("--help", "list families", "analyze DEMO --weights-only -q")
    compiling = (lines[2], f"{lines[2]} --formats {FORMATS}", "rescale DEMO OUT --method wisca -q")
    commands = [Command(line, *_vrscope(line, **tiny)) for line in lines]
    for line in compiling:
        for fresh in (False, True):
            name = f"{line}{', nothing compiled' if fresh else ''}"
            if fresh or line != lines[2]:
                commands.append(Command(name, *_vrscope(line, **tiny), out=out, fresh_cache=fresh))
    for command in commands:
        if not command.fresh_cache:
            command.run()
            command.seconds.clear()
    return take_turns(commands, rounds)


def _start_table(commands: list[Command]) -> list[str]:
    """Return the table of start-up and first use."""
    rows = [
        (
            f"`{command.line}`",
            "an empty `NUMBA_CACHE_DIR`" if command.fresh_cache else "compiled before",
            spread(command.seconds, ".2f"),
            f"{max(command.peak_mb):.0f}",
        )
        for command in commands
    ]
    return ["### Start-up, on the included model", "", *markdown(("command", "loops", "seconds", "peak MB"), rows, 2)]


def _growth(cases: list[Case]) -> list[str]:
    """Return the table of memory by size, and of seconds per GB between one size and the next."""
    rows = []
    sizes = [case.size_bytes / 1e9 for case in cases]
    for name in ("analyze", "analyze, formats", "plan", "rescale", "verify"):
        commands = [case.named[name] for case in cases]
        seconds = [statistics.median(command.seconds) for command in commands]
        peaks = [f"{max(command.peak_mb):.0f}" for command in commands]
        steps = zip(pairwise(seconds), pairwise(sizes), strict=True)
        rows.append((name, *peaks, *(f"{(d - c) / (b - a):.2f}" for (c, d), (a, b) in steps)))
    heads = ["command", *(f"peak MB, {size:.1f} GB" for size in sizes)]
    heads += [f"s per GB from {a:.1f} to {b:.1f} GB" for a, b in pairwise(sizes)]
    return ["### Memory and cost by size", "", *markdown(heads, rows)] if cases else []


def _summary(llamas: list[Case], rest: list[Case], started: list[Command]) -> list[str]:
    """Return the few rows that the README shows."""
    cases = [*llamas, *rest]

    def row(title: str, cell: Callable[[Case], str]) -> tuple[str, ...]:
        return title, *(cell(case) for case in cases)

    def rate(name: str) -> Callable[[Case], str]:
        def cell(case: Case) -> str:
            command = case.named.get(name)
            return spread([case.size_bytes / s / 1e9 for s in command.seconds], ".3g") if command else ""

        return cell

    def times(name: str, other: str) -> Callable[[Case], str]:
        def cell(case: Case) -> str:
            both = case.named.get(name), case.named.get(other)
            return spread(ratios(*both), ".2f" if other == COPY else ".1f") if all(both) else ""

        return cell

    def peaks(case: Case) -> str:
        return " / ".join(f"{max(case.named[n].peak_mb):.0f}" for n in ("analyze", "rescale") if n in case.named)

    titles = ["", *(case.title.removesuffix(" bfloat16").replace("Mixture of experts", "MoE") for case in cases)]
    seconds = " / ".join(f"{statistics.median(command.seconds):.2f}" for command in started[:3])
    rows = [
        row("`analyze`, seconds", lambda case: spread(case.named["analyze"].seconds, ".1f")),
        row("`analyze`, GB/s", rate("analyze")),
        row("… times a naive script", times("analyze", NAIVE)),
        row("… times weightlens", times("analyze", LENS)),
        row("`rescale`, GB/s", rate("rescale")),
        row("… times `cp -r`", times("rescale", COPY)),
        row("peak MB, `analyze` / `rescale`", peaks),
        ("seconds for `--help` / `list families` / `analyze` of the included model", seconds, *[""] * (len(cases) - 1)),
    ]
    return markdown(titles, [cells for cells in rows if any(cells[1:])])[:-1]


def _measure_blocks(given: argparse.Namespace) -> list[str]:
    """Return the table of the 4-bit engines."""
    words = [sys.executable, str(HERE / "blocks.py"), str(given.blocks), str(given.rounds)]
    rates = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    rows = []
    for name, found in rates.items():
        against = [a / b for a, b in zip(found, rates[f"bitsandbytes {name.split()[1]}"], strict=True)]
        rows.append((name, spread([rate / 1e6 for rate in found], ".0f"), spread(against, ".1f")))
    title = f"### 4-bit blocks of 64: `python benchmarks/blocks.py {given.blocks} {given.rounds}`"
    return [title, "", *markdown(("engine", "MB/s", "times bitsandbytes"), rows)]


def _make(folder: Path, kind: str, size: float) -> Path:
    """Make a checkpoint in another process: what this one holds would count as memory of its children."""
    print(f"making {kind} {size:g}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, str(HERE / "synthetic.py"), kind, str(folder), str(size)], check=True)
    return folder


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _into_cache(folder: Path) -> None:
    """Read all files once."""
    buffer = bytearray(4 << 20)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _clear(scratch: Path) -> None:
    for path in scratch.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _require_space(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes + 2:
        sys.exit(f"{folder}: {gigabytes + 2:.0f} GB are needed, {free:.0f} GB are free. Choose another --scratch.")


if __name__ == "__main__":
    sys.exit(main())
