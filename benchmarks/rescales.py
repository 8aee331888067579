"""What each rescale does to the damage of each format, and whether the logits stay equal in every bit.

    python benchmarks/rescales.py MODEL [--text FILE] [--tokens 2048] [--formats nf4,int8-row,int4-g64] [-o table.md]
        [--calibration-text FILE] [--calibration-tokens 2048] [--only "awq, int4-g64;awq, nf4"]

Methods that calibrate do so on the calibration text, which should not be the text measured on. Every rescale is written
to a temporary folder, run in float32 and bfloat16 against the original, and measured on the same tokens in one run.
Prints Markdown: mean KL in nats with its standard error, ratio to the original. `make readme` copies what is between
the `summary` marks of benchmarks/results/damage.md into the README; that file is written by

    python benchmarks/rescales.py SMOLLM2 --text WIKITEXT2-TEST --calibration-text WIKITEXT2-VALID -o THAT-FILE
        --formats int4-g64,nf4,w8a8,int8 --only "awq, int4-g64;awq, nf4;smoothquant, 0.5;auto, int4-g64 and nf4"
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vrscope
from vrscope.provenance import provenance

RESCALES = {
    "wisca, tensor": ("wisca", {"granularity": "tensor"}),
    "wisca, head": ("wisca", {"granularity": "head"}),
    "wisca, channel": ("wisca", {"granularity": "channel"}),
    "wisca, channel, l1": ("wisca", {"granularity": "channel", "norm": "l1"}),
    "wisca, channel, free scales": ("wisca", {"granularity": "channel", "scales": "free"}),
    "tvr, preserving": ("tvr", {}),
    "cle": ("cle", {}),
    "smoothquant, 0.5": ("smoothquant", {}),
    "awq, int4-g64": ("awq", {"target": ["int4-g64"]}),
    "awq, nf4": ("awq", {"target": ["nf4"]}),
    "auto, int4-g64 and nf4": ("auto", {"target": ["int4-g64", "nf4"]}),
    "random": ("random", {}),
    "tvr, raw (not equivalent)": ("tvr", {"raw": True}),
}


def main() -> int:
    """Measure every rescale of one model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--formats", default="nf4,int8-row,int4-g64")
    parser.add_argument("--only", help="names of rescales, separated by semicolons")
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    formats = given.formats.split(",")
    wanted = given.only.split(";") if given.only else list(RESCALES)
    unknown = sorted(set(wanted) - set(RESCALES))
    if unknown:
        parser.error(f"--only: expected some of {'; '.join(RESCALES)}, found {unknown[0]!r}.")
    original: Any = None
    shown: dict[str, list[str]] = {}
    lines = [
        "| rescale | seconds to plan and write | scales changed | logits float32 / bfloat16 | unquantized KL | "
        + f"{' | '.join(formats)} |",
        "|" + "---|" * (5 + len(formats)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        outs = {}
        for name in wanted:
            method, options = RESCALES[name]
            outs[name] = Path(folder) / str(len(outs))
            on = {"text": given.calibration_text, "tokens": given.calibration_tokens}
            started = time.monotonic()
            plan = vrscope.rescale(given.model, outs[name], method=method, **on, **options)
            seconds = time.monotonic() - started
            if plan.equivalent == "not equivalent":
                changed, logits = len(plan.affine), "not equivalent"
            else:
                proof = vrscope.verify(given.model, outs[name], logits=True, text=given.text, tokens=128).tables[
                    "proof"
                ]
                changed, logits = plan.changed, " / ".join(proof["result"][1:])
            damage = vrscope.measure(given.model, outs[name], formats=formats, text=given.text, tokens=given.tokens)
            rows = damage.tables["damage"].set_index(["checkpoint", "format"])
            original = rows if original is None else original
            cells = [_cell(rows, "rescaled", "none")]
            shown[_options(method, options)] = [_short(rows, "rescaled", entry) for entry in formats]
            for entry in formats:
                ratio = rows.loc[("rescaled", entry), "kl"] / rows.loc[("original", entry), "kl"]
                cells.append(f"{_cell(rows, 'rescaled', entry)} ({ratio:.6f} of the original)")
            lines.append(f"| {name} | {seconds:.0f} | {changed:,} | {logits} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr)
    shown = {"none": [_short(original, "original", entry) for entry in formats]} | shown
    summary = [f"| {' | '.join(cells)} |" for cells in (["rescale", *formats], ["---"] * (1 + len(formats)))]
    summary += [f"| {' | '.join((name, *cells))} |" for name, cells in shown.items()]
    known = provenance(0.0)
    facts = f"{known['machine']}, {known['cores']} cores; {known['date'][:10]}; vrscope {known['vrscope']}"
    facts += "".join(f", {name} {version}" for name, version in known["versions"].items())
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    head = [
        "# Damage by rescale",
        "",
        f"`python benchmarks/rescales.py {shlex.join(words)}`",
        "",
        facts + ".",
        "",
    ]
    lines = [*head, "<!-- summary -->", *summary, "<!-- end of summary -->", "", *lines]
    text = "\n".join(lines) + "\n"
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def _options(method: str, options: dict[str, Any]) -> str:
    """Return a rescale as the options of a command."""
    words = ["--method", method]
    for name, value in options.items():
        flag = "--format" if name == "target" else f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, ",".join(value) if isinstance(value, list) else str(value)]
    return f"`{' '.join(words)}`"


def _short(rows: Any, checkpoint: str, name: str) -> str:
    """Return mean and standard error, to the first digit of the error."""
    row = rows.loc[(checkpoint, name)]
    digits = max(3, -math.floor(math.log10(row["kl_sem"]))) if row["kl_sem"] > 0 else 3
    return f"{row['kl']:.{digits}f} ± {row['kl_sem']:.{digits}f}"


def _cell(rows: Any, checkpoint: str, name: str) -> str:
    row = rows.loc[(checkpoint, name)]
    return f"{row['kl']:.5f} ± {row['kl_sem']:.5f}"


if __name__ == "__main__":
    sys.exit(main())
