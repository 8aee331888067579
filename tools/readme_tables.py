"""Write the tables of README.md and docs/ from those of the package; `--check` only says whether they are fresh.

A table stands between `<!-- table: KIND -->` and `<!-- end of table -->`, where KIND is what `vrscope list` takes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from vrscope.listing import listing

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "statistics.md")
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown_table(kind: str) -> str:
    """Return one listing as a Markdown table."""
    headings, rows = listing(kind)
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def fresh(text: str) -> str:
    """Return a page's text with every table written anew."""
    return _TABLE.sub(lambda match: match[1] + markdown_table(match[2]) + match[3], text)


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
