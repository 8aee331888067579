"""Write the tables of README.md from the tables of the package; `--check` only says whether they are fresh.

A table stands between `<!-- table: KIND -->` and `<!-- end of table -->`, where KIND is what `vrscope list` takes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from vrscope.listing import listing

README = Path(__file__).resolve().parents[1] / "README.md"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown_table(kind: str) -> str:
    """Return one listing as a Markdown table."""
    headings, rows = listing(kind)
    if kind == "statistics":  # those of weights; `vrscope list statistics` has those of activations too
        rows = [(row[0], *row[2:]) for row in rows if row[1] == "weights"]
        headings = (headings[0], *headings[2:])
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def fresh(text: str) -> str:
    """Return the README's text with every table written anew."""
    return _TABLE.sub(lambda match: match[1] + markdown_table(match[2]) + match[3], text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    stored = README.read_text(encoding="utf-8")
    written = fresh(stored)
    if not parser.parse_args().check:
        README.write_text(written, encoding="utf-8")
    elif stored != written:
        sys.exit("README.md: a table is stale. Run `make readme`.")
