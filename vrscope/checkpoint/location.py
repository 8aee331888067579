"""Find the safetensors files that make up a local checkpoint: from a folder, one file, or an index."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vrscope.checkpoint.header import unique_keys
from vrscope.checkpoint.layout import printable
from vrscope.errors import CheckpointError

EXPECTED = "Expected a folder, a .safetensors file, a .safetensors.index.json file or a hub id such as owner/name."
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FOREIGN_SUFFIXES = (".gguf", ".ggml", ".h5", ".onnx", ".msgpack", ".npz", ".tflite")
_CONVERT = (
    "Convert it once, where you trust its source: "
    "python -c \"from transformers import AutoModel as M; M.from_pretrained('OLD').save_pretrained('NEW')\""
    " (AutoModelForCausalLM for a language model)."
)


@dataclass(frozen=True, slots=True)
class Location:
    """A local checkpoint before its shards are opened.

    Attributes
    ----------
    folder
        Where the shards and the configuration are.
    shards
        File names inside `folder`, sorted.
    index
        File name of the index, None for a single file.
    weight_map
        Tensor name to shard as the index says; empty without an index.
    """

    folder: Path
    shards: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)


def locate(path: Path) -> Location:
    """Return the checkpoint at `path`: a folder, a `.safetensors` file or an index of such files.

    Raises
    ------
    CheckpointError
        If `path` does not exist, is of another format, or does not say which files to read.
    """
    where = printable(path)
    try:
        kind = "folder" if path.is_dir() else "file" if path.is_file() else "other" if path.exists() else ""
        names = [entry.name for entry in path.iterdir()] if kind == "folder" else []
    except (OSError, ValueError) as error:
        message = f"{where}: cannot be read ({printable(error)}). Check the path and its permissions."
        raise CheckpointError(message) from error
    if kind == "folder":
        chosen = choose_weights(names, where)
        return locate(path / chosen)
    if kind == "":
        message = f"{where}: not found. {EXPECTED} Check the spelling."
        raise CheckpointError(message)
    refuse_foreign(path.name, where)
    if kind == "file" and path.name.endswith(".safetensors"):
        return Location(path.parent, (path.name,))
    if kind == "file" and path.name.endswith(".index.json"):
        return _sharded(path)
    message = f"{where}: not a checkpoint. {EXPECTED} Give the folder that holds config.json and the weights."
    raise CheckpointError(message)


def choose_weights(names: Collection[str], where: str) -> str:
    """Return which of the files `names` of a folder holds the weights, or indexes them, as transformers chooses.

    That is `model.safetensors`, else `model.safetensors.index.json`, else the only other index, else the only other
    safetensors file.

    Raises
    ------
    CheckpointError
        If there is none, or several and nothing says which.
    """
    for name in ("model.safetensors", f"model{INDEX_SUFFIX}"):
        if name in names:
            return name
    for suffix in (INDEX_SUFFIX, ".safetensors"):
        found = sorted(name for name in names if name.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(printable(name) for name in found[:8]) + (", ..." if len(found) > 8 else "")
            message = (
                f"{where}: expected model.safetensors or model{INDEX_SUFFIX}, found {len(found)} files and nothing "
                f"that says which belong together: {shown}. Give one of them, or add the missing index."
            )
            raise CheckpointError(message)
    for name in sorted(names):
        refuse_foreign(name, f"{where}, {printable(name)}")
    message = f"{where}: expected safetensors weights, found none. Give the folder that holds model.safetensors."
    raise CheckpointError(message)


def refuse_foreign(name: str, where: str) -> None:
    """Raise a CheckpointError that names the remedy if `name` is a file of another weight format.

    Raises
    ------
    CheckpointError
        For pickles, which run code when opened and so are never opened, and for formats of other programs.
    """
    stem = name.lower().removesuffix(".index.json")
    if stem.endswith(PICKLE_SUFFIXES) and not stem.endswith("training_args.bin"):
        message = f"{where}: expected safetensors, found a pickle, which can run code and is never opened. {_CONVERT}"
        raise CheckpointError(message)
    if stem.endswith(FOREIGN_SUFFIXES):
        suffix = PurePosixPath(stem).suffix
        message = (
            f"{where}: expected safetensors, found {suffix}, which vrscope does not read. "
            "Use the original safetensors checkpoint that it was made from."
        )
        raise CheckpointError(message)


def read_index(path: Path) -> dict[str, str]:
    """Return the weight map of the index file `path`: tensor name to shard, every shard a safe relative name.

    Raises
    ------
    CheckpointError
        If the index is not JSON, has no weight map, or names a file of another format or outside the folder.
    """
    weight_map = read_json_object(path, unique=True).get("weight_map")
    where = printable(path)
    if not isinstance(weight_map, dict) or not weight_map:
        message = f"{where}: expected a weight_map from tensor names to shards, found none. Save the checkpoint again."
        raise CheckpointError(message)
    for name, shard in weight_map.items():
        problem = _unsafe(shard)
        if problem:
            message = (
                f"{where}, {printable(name)}: expected the name of a .safetensors file inside the folder, found "
                f"{printable(shard)}, {problem}. Do not use this checkpoint before you know why."
            )
            raise CheckpointError(message)
        if not shard.endswith(".safetensors"):
            refuse_foreign(shard, f"{where} names {printable(shard)}")
            message = f"{where}: expected .safetensors shards, found {printable(shard)}. Give a safetensors checkpoint."
            raise CheckpointError(message)
    return weight_map


def read_json_object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Return the JSON object in `path`; with `unique`, a repeated key is an error.

    Raises
    ------
    CheckpointError
        If the file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys if unique else None)
    except OSError as error:
        message = f"{printable(path)}: cannot be read ({error.strerror or error}). Check the file and its permissions."
        raise CheckpointError(message) from error
    except (ValueError, RecursionError) as error:
        message = f"{printable(path)}: expected JSON, found something else ({printable(error)}). Repair or replace it."
        raise CheckpointError(message) from error
    if not isinstance(value, dict):
        message = f"{printable(path)}: expected a JSON object, found {type(value).__name__}. Repair or replace it."
        raise CheckpointError(message)
    return value


def _sharded(path: Path) -> Location:
    weight_map = read_index(path)
    shards = tuple(sorted(set(weight_map.values())))
    for shard in shards:
        if not (path.parent / shard).is_file():
            message = (
                f"{printable(path)}: names the shard {printable(shard)}, which is missing. Download or copy it as well."
            )
            raise CheckpointError(message)
    return Location(path.parent, shards, path.name, weight_map)


def _unsafe(shard: Any) -> str:
    """Return why `shard` may not be joined to a folder, "" if it may."""
    if not isinstance(shard, str) or not shard:
        return "not a file name"
    if "\0" in shard or "\\" in shard:
        return "with a character no file name may have"
    if shard.startswith("/") or ".." in PurePosixPath(shard).parts:
        return "a path outside the folder"
    return ""
