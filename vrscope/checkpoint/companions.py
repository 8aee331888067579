"""Choose which files of a checkpoint go along with its weights: everything but weights of other formats or copies."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from vrscope.checkpoint.location import FOREIGN_SUFFIXES, PICKLE_SUFFIXES
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import CheckpointError

_WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, *FOREIGN_SUFFIXES)
_SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}  # histories and download states, which hold old weights again
# What belongs to a single safetensors file in a folder of many things.
_SIBLING = re.compile(
    r"(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|merges|spiece|sentencepiece.*"
    r"|preprocessor_config|processor_config|chat_template)\.(json|jinja|txt|model)"
)


def companion_files(source: Checkpoint, without: Collection[str]) -> tuple[str, ...]:
    """Return the files to copy along with the weights of `source`, as names relative to its folder, sorted.

    Weights of any format that are not this checkpoint's own are left out, as are their indexes, the names in
    `without`, and what is no regular file. Links to files count as files; links to folders are not followed. The
    weights of further modules that modules.json of a sentence encoder names are kept, as they are no copies.

    Raises
    ------
    CheckpointError
        If a folder cannot be listed.
    """
    if source.index is None and Path(source.name).name == source.shards[0]:
        names = [entry.name for entry in source.folder.iterdir() if _SIBLING.fullmatch(entry.name)]
    else:
        names = list(_walk(source.folder))
    modules = _module_folders(source.folder)
    kept = []
    for name in names:
        parent, leaf = str(PurePosixPath(name).parent), PurePosixPath(name).name
        foreign_weights = leaf.lower().removesuffix(".index.json").endswith(_WEIGHT_SUFFIXES)
        if name in (*source.shards, *without) or not (source.folder / name).is_file():
            continue
        if name == source.index or not foreign_weights or parent in modules:
            kept.append(name)
    return tuple(sorted(kept))


def _walk(folder: Path) -> list[str]:
    def stop(error: OSError) -> None:
        message = f"{error.filename}: cannot be listed ({error.strerror}). Check its permissions."
        raise CheckpointError(message) from error

    names = []
    for place, folders, files in os.walk(folder, onerror=stop):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in files]
    return names


def _module_folders(folder: Path) -> set[str]:
    """Return the subfolders that hold further modules of a sentence encoder."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return {module["path"] for module in modules} - {"", "."}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()
