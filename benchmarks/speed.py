"""How fast vrscope is, and how much memory it takes, beside what else reads or copies a checkpoint.

    python benchmarks/speed.py --gb 1 4 16 --moe 30000 [--rounds 3] [--scratch DIR] [--naive-gb 4] [-o table.md]

Makes synthetic checkpoints in a scratch folder, one at a time, and deletes them. Every command runs as a process of its
own, start-up included, with the files in the page cache; the commands take turns, so that a busy machine slows all of
them. Reported are the median rate with the least and the largest, ratios taken within each round, the largest resident
memory, and the share of a pass that only reads. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
FORMATS = "int8-row,int4-g128,nf4"


@dataclass
class Command:
    """One thing to measure: a process, or a function that runs in this one."""

    name: str
    words: list[str] | Callable[[], None]
    against: str | None = None  # what its rate is compared with
    out: Path | None = None  # what it writes, removed before each run
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Run once and note wall seconds, processor seconds and peak memory."""
        if self.out is not None:
            shutil.rmtree(self.out, ignore_errors=True)
        started = time.perf_counter()
        if callable(self.words):
            self.words()
            self.seconds.append(time.perf_counter() - started)
            return
        with subprocess.Popen(self.words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            said = process.stderr.read().decode() if process.stderr else ""
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(self.words)}: exit {process.returncode}\n{said}")
        self.seconds.append(time.perf_counter() - started)
        self.cpu.append(usage.ru_utime + usage.ru_stime)
        self.peak_mb.append(usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20))


def main() -> int:
    """Measure every size asked for and print the table."""
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
    lines = [f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, {given.rounds} rounds.", ""]
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="vrscope-speed-") as name:
        scratch = Path(name)
        for size in given.gb:
            lines += _measure_llama(scratch, size, given)
        if given.moe:
            lines += _measure_moe(scratch, given)
    if given.blocks and importlib.util.find_spec("bitsandbytes"):
        lines += _measure_blocks(given)
    text = "\n".join(lines) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def _measure_llama(scratch: Path, size: float, given: argparse.Namespace) -> list[str]:
    """Make a Llama of `size` GB, measure all commands on it, and return its table."""
    _require_space(scratch, 3.1 * size)
    folder = _make(scratch / "llama", "llama", size * 1e9)
    plan, rescaled, copied = scratch / "plan.json", scratch / "rescaled", scratch / "copied"
    _run("plan", str(folder), "--method", "wisca", "-o", str(plan), "-q")
    slow = size <= given.naive_gb
    commands = [
        Command("read only", lambda: _read_all(folder)),
        Command("analyze", _vrscope("analyze", folder, "--weights-only", "-q"), "naive script"),
        Command(
            f"analyze --formats {FORMATS}",
            _vrscope("analyze", folder, "--weights-only", "-q", "--formats", FORMATS),
            "naive script",
        ),
        Command("plan --method wisca", _vrscope("plan", folder, "--method", "wisca", "-q")),
        Command("cp -r", ["cp", "-r", str(folder), str(copied)], out=copied),
        Command("rescale --plan", _vrscope("rescale", folder, rescaled, "--plan", plan, "-q"), "cp -r", rescaled),
        Command("verify", _vrscope("verify", folder, rescaled, "-q")),
    ]
    if slow:
        commands.append(Command("naive script", [sys.executable, str(HERE / "naive.py"), str(folder)]))
        commands += _lens(folder, given.lens)
    table = _table(f"Llama, {size:g} GB bfloat16", folder, _take_turns(commands, given.rounds))
    for path in (folder, rescaled, copied):
        shutil.rmtree(path, ignore_errors=True)
    return table


def _measure_moe(scratch: Path, given: argparse.Namespace) -> list[str]:
    """Make a mixture of experts of many small tensors, measure its analysis, and return its table."""
    _require_space(scratch, 1.0)
    folder = _make(scratch / "moe", "moe", given.moe)
    commands = [
        Command("read only", lambda: _read_all(folder)),
        Command("analyze", _vrscope("analyze", folder, "--weights-only", "-q")),
    ]
    table = _table(f"Mixture of experts, {given.moe:,} tensors", folder, _take_turns(commands, given.rounds))
    shutil.rmtree(folder)
    return table


def _measure_blocks(given: argparse.Namespace) -> list[str]:
    """Return the table of the 4-bit engines."""
    words = [sys.executable, str(HERE / "blocks.py"), str(given.blocks), str(given.rounds)]
    rates = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    lines = ["### 4-bit blocks of 64", "", "| engine | MB/s | times bitsandbytes |", "|---|---:|---:|"]
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates[f"bitsandbytes {name.split()[1]}"], strict=True)]
        lines.append(f"| {name} | {_spread([rate / 1e6 for rate in found], '.0f')} | {_spread(ratios, '.1f')} |")
    return [*lines, ""]


def _make(folder: Path, kind: str, size: float) -> Path:
    """Make a checkpoint in another process: what this one holds would count as memory of its children."""
    subprocess.run([sys.executable, str(HERE / "synthetic.py"), kind, str(folder), str(size)], check=True)
    return folder


def _vrscope(*words: object) -> list[str]:
    return [sys.executable, "-m", "vrscope", *map(str, words)]


def _run(*words: str) -> None:
    subprocess.run(_vrscope(*words), check=True)


def _lens(folder: Path, lens: str | None) -> Iterator[Command]:
    if lens:
        shards = " ".join(f"'{path}'" for path in sorted(folder.glob("*.safetensors")))
        yield Command(
            "weightlens", ["sh", "-c", f"for shard in {shards}; do '{lens}' analyze \"$shard\" || exit; done"]
        )


def _take_turns(commands: list[Command], rounds: int) -> list[Command]:
    for number in range(rounds):
        for command in commands:
            print(f"round {number + 1}: {command.name}", file=sys.stderr, flush=True)
            command.run()
    return commands


def _read_all(folder: Path) -> None:
    """Read all shards on all cores into small buffers: the bytes per second that nothing can beat."""
    step = 4 << 20

    def read(part: tuple[Path, int]) -> None:
        path, first = part
        buffer = bytearray(step)
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            for _ in range(16):
                file.readinto(buffer)

    parts = [
        (path, first) for path in folder.glob("*.safetensors") for first in range(0, path.stat().st_size, 16 * step)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, parts))


def _table(title: str, folder: Path, commands: list[Command]) -> list[str]:
    """Return the lines of a Markdown table."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    named = {command.name: command for command in commands}
    lines = [
        f"### {title}",
        "",
        "| command | seconds | GB/s | against | of read only | processor seconds | peak memory (MB) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for command in commands:
        rates = [size / seconds / 1e9 for seconds in command.seconds]
        other = named.get(command.against or "")
        against = "" if other is None else f"{_ratios(command, other)} x {other.name}"
        cells = [
            command.name,
            _spread(command.seconds, ".1f"),
            _spread(rates, ".2f"),
            against,
            _ratios(command, named["read only"]),
            f"{statistics.median(command.cpu):.1f}" if command.cpu else "",
            f"{max(command.peak_mb):.0f}" if command.peak_mb else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _ratios(command: Command, other: Command) -> str:
    """Return how many times as fast as another a command was, round by round."""
    return _spread([b / a for a, b in zip(command.seconds, other.seconds, strict=True)], ".2f")


def _spread(values: list[float], style: str) -> str:
    """Return median (least to largest)."""
    return f"{statistics.median(values):{style}} ({min(values):{style}} to {max(values):{style}})"


def _require_space(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes + 2:
        sys.exit(f"{folder}: {gigabytes + 2:.0f} GB are needed, {free:.0f} GB are free. Choose another --scratch.")


if __name__ == "__main__":
    sys.exit(main())
