"""Fetch a checkpoint from a model hub: its configuration, tokenizer, index and the shards the index names, no more.

huggingface-hub does the work and obeys its own settings (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN); every
failure becomes one `CheckpointError`. Without a connection a checkpoint that is in its cache is used.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import NoReturn

from vrscope.checkpoint.layout import printable
from vrscope.checkpoint.location import (
    EXPECTED,
    FOREIGN_SUFFIXES,
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    choose_weights,
    read_index,
)
from vrscope.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_FILE_SUFFIXES = (".json", ".safetensors", ".txt", *PICKLE_SUFFIXES, *FOREIGN_SUFFIXES)
# Besides weights: configuration, tokenizer, licence, and the pooling settings of sentence encoders.
_SMALL_FILE = re.compile(
    r"[^/]+\.(json|jinja|txt|model|vocab|spm|tiktoken|py)|(LICENSE|NOTICE)[^/]*|\d+_\w+/config\.json"
)


def is_hub_id(model: str) -> bool:
    """Return whether `model` can only be meant as a hub id: "name" or "owner/name", and no file's name."""
    return bool(_HUB_ID.fullmatch(model)) and not model.lower().endswith(_FILE_SUFFIXES)


def fetch(repository: str, revision: str | None) -> Path:
    """Download what is needed of a hub checkpoint into the hub's cache and return the file that names its weights.

    Parameters
    ----------
    repository
        For example "owner/name".
    revision
        Branch, tag or commit; None for the main branch.

    Returns
    -------
    Path
        The only safetensors file or the index, inside the snapshot's folder.

    Raises
    ------
    CheckpointError
        If the hub does not know it, refuses it or cannot be reached, or if it holds no safetensors weights.
    """
    from huggingface_hub import HfApi

    try:
        files = [sibling.rfilename for sibling in HfApi().model_info(repository, revision=revision).siblings or []]
    except Exception as error:  # the client's errors have no common root across the HTTP libraries it has used
        cached = _cached(repository, revision)
        if cached is None:
            _refuse(repository, revision, error)
        return cached
    chosen = choose_weights([name for name in files if "/" not in name], printable(repository))
    small = [name for name in files if _SMALL_FILE.fullmatch(name) and not name.endswith(".index.json")]
    folder = _download(repository, revision, [*small, chosen])
    if chosen.endswith(INDEX_SUFFIX):
        missing = sorted(set(read_index(folder / chosen).values()) - set(files))
        if missing:
            message = (
                f"{printable(repository)}, {printable(chosen)}: names the shard {printable(missing[0])}, which is "
                "missing on the hub. Choose another revision."
            )
            raise CheckpointError(message)
        # The commit is fixed now, so that a push in between cannot mix two versions.
        folder = _download(repository, folder.name, sorted(set(read_index(folder / chosen).values())))
    return folder / chosen


def _download(repository: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[glob.escape(f) for f in files]))
    except Exception as error:
        _refuse(repository, revision, error)


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the weights file or index of the snapshot in the hub's cache, None if there is no snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # One small file stands for the snapshot: its weights are checked when they are located.
        found = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    folder = Path(found)
    return folder / choose_weights([entry.name for entry in folder.iterdir()], printable(f"{repository} in {folder}"))


def _refuse(repository: str, revision: str | None, error: Exception) -> NoReturn:
    """Raise the CheckpointError that says what the hub's client ran into."""
    from huggingface_hub import errors

    where = printable(repository) + (f", revision {printable(revision)}" if revision else "")
    if isinstance(error, errors.GatedRepoError):
        reason = "the hub model is gated. Ask for access on its page, then set HF_TOKEN or run `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        reason = (
            f"not found: there is no such file or folder here, and the hub has no such public model. {EXPECTED} "
            "Check the spelling; for a private model set HF_TOKEN"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "the hub model has no such revision. Check the branch, tag or commit"
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        reason = (
            "not found: there is no such file or folder here, and as a hub id it is not in the cache while the hub is "
            f"off or out of reach (HF_HUB_OFFLINE, HF_HOME). {EXPECTED} Check the spelling, or connect and try again"
        )
    else:
        detail = printable(" ".join(str(error).split()))
        reason = (
            f"not found: there is no such file or folder here, and the hub could not be read "
            f"({type(error).__name__}: {detail}). Check the spelling and the connection"
        )
    message = f"{where}: {reason}."
    raise CheckpointError(message) from error
