"""Write the tables of README.md and docs/ from those of the package; `--check` only says whether they are fresh.

A table stands between `<!-- table: KIND -->` and `<!-- end of table -->`, where KIND is what `vrscope list` takes.
What a benchmark found stands between `<!-- results: NAME -->` and `<!-- end of results -->`, and is what stands between
`<!-- summary -->` and `<!-- end of summary -->` in benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from vrscope.listing import listing

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = tuple(REPOSITORY / page for page in ("README.md", "docs/families.md", "docs/statistics.md"))
RESULTS = REPOSITORY / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_RESULTS = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
_SUMMARY = re.compile(r"<!-- summary -->\n(.+?)<!-- end of summary -->", re.DOTALL)


def markdown_table(kind: str) -> str:
    """Return one listing as a Markdown table."""
    headings, rows = listing(kind)
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def summary(name: str) -> str:
    """Return what a page shows of the results of one benchmark."""
    path = RESULTS / f"{name}.md"
    parts = _SUMMARY.findall(path.read_text(encoding="utf-8"))
    if len(parts) != 1:
        sys.exit(
            f"{path}: expected one summary between its marks, found {len(parts)}. Run the benchmark again with -o."
        )
    return str(parts[0])


def fresh(text: str) -> str:
    """Return a page's text with every table, and what it shows of benchmarks, written anew."""
    text = _TABLE.sub(lambda match: match[1] + markdown_table(match[2]) + match[3], text)
    return _RESULTS.sub(lambda match: match[1] + summary(match[2]) + match[3], text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    check = parser.parse_args().check
    for page in PAGES:
        stored = page.read_text(encoding="utf-8")
        written = fresh(stored)
        if not check:
            page.write_text(written, encoding="utf-8")
        elif stored != written:
            sys.exit(f"{page.name}: a table is stale. Run `make readme`.")
