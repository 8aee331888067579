"""The text the demo model is trained on: documentation that every Python carries, read from the running interpreter.

Out come documents by name, and their division into a training and a held-out part; `train.py` and the tests use it.
"""

from __future__ import annotations

import ast
import zlib
from pathlib import Path

HELDOUT_ONE_IN = 20  # documents
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})


def gather_topics() -> dict[str, str]:
    """Return the language reference's topics of this Python, by name."""
    from pydoc_data import topics

    return {f"topic {name}": text for name, text in sorted(topics.topics.items())}


def gather_docstrings() -> dict[str, str]:
    """Return the docstrings of each standard library module of this Python, joined, by module path.

    The sources are parsed, never imported; files that do not parse are left out.
    """
    library = Path(ast.__file__).parent
    documents = {}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders)]
        if any(texts):
            documents[relative.as_posix()] = "\n\n".join(filter(None, texts))
    return documents


def split_documents(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents; no paragraph stands in both.

    About one document in 20 is held out, chosen by a checksum of its name, so that a document more or less in another
    Python leaves the others where they are. The topics repeat each other: a paragraph counts only where it is met
    first.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    met: set[str] = set()
    for name, text in documents.items():
        kept = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in met:
                met.add(key)
                kept.append(paragraph.rstrip())
        if kept:
            heldout = zlib.crc32(name.encode()) % HELDOUT_ONE_IN == 0
            parts[heldout].append("\n\n".join(kept).strip("\n") + "\n")
    return parts
