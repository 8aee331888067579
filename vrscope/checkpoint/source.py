"""Open a checkpoint and stream its tensors in blocks of rows.

In: a folder, a safetensors file, an index or a hub id. Out: a `Checkpoint`, whose header was checked completely and
whose weights are read only when asked for, with positioned reads, so that memory does not grow with the checkpoint.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vrscope.checkpoint.header import read_header
from vrscope.checkpoint.hub import fetch, is_hub_id
from vrscope.checkpoint.layout import (
    DTYPE_BITS,
    FLOAT_DTYPES,
    RowBlock,
    StoredBlock,
    TensorInfo,
    printable,
    torch_dtype,
)
from vrscope.checkpoint.location import EXPECTED, Location, locate, read_json_object
from vrscope.checkpoint.quantized import describe_quantization
from vrscope.checkpoint.room import new_room
from vrscope.errors import CheckpointError, UnknownNameError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["FLOAT_DTYPES", "BlockPlace", "Checkpoint", "RowBlock", "StoredBlock", "TensorInfo", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Where one row block of a tensor lies: its first row and column, and how many of each."""

    name: str
    first_row: int
    rows: int
    first_column: int
    columns: int


_SPOTS, _SPOT_BYTES = 16, 64  # the sample of each tensor that enters the fingerprint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk, opened and checked; its weights stay on disk.

    Attributes
    ----------
    name
        As the user gave it.
    folder
        Where its files are.
    config
        The contents of config.json, empty if there is none.
    tensors
        Name to description, shard by shard, in the order of their bytes.
    shards
        File names of the safetensors files.
    metadata
        For each shard, its `__metadata__`.
    index
        File name of the index, None if there is none.
    quantization
        One sentence why it counts as already quantized, else None.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    metadata: Mapping[str, Mapping[str, str]]
    index: str | None
    quantization: str | None

    def row_blocks(self, name: str, max_bytes: int = 1 << 20, unit: int = 1) -> Iterator[RowBlock]:
        """Yield the tensor `name` in blocks of whole rows of about `max_bytes` bytes, first row first.

        Blocks are cut only at multiples of `unit` rows, so `unit` rows larger than `max_bytes` are one block. A vector
        is cut along its elements; a tensor without elements has no blocks. Every block is a fresh tensor in the stored
        dtype.

        Raises
        ------
        CheckpointError
            If the file cannot be read any more, or the dtype is one that torch cannot hold.
        """
        for place in self.block_places(name, max_bytes, unit):
            yield self.read_block(place)

    def block_places(self, name: str, max_bytes: int = 1 << 20, unit: int = 1) -> list[BlockPlace]:
        """Return where the blocks of `row_blocks` lie; nothing is read."""
        info = self._info(name)
        if info.numel == 0:
            return []
        rows, columns = info.rows, info.columns
        if len(info.shape) <= 1:
            step = max(1, max_bytes // max(1, info.size_bytes // info.numel))
            return [BlockPlace(name, 0, 1, first, min(step, columns - first)) for first in range(0, columns, step)]
        step = max(unit, max_bytes // (info.size_bytes // rows) // unit * unit)
        return [BlockPlace(name, first, min(step, rows - first), 0, columns) for first in range(0, rows, step)]

    def read_block(self, place: BlockPlace) -> RowBlock:
        """Return the block at a place that `block_places` gave; may be called on any thread.

        Raises
        ------
        CheckpointError
            If the file cannot be read any more, or the dtype is one that torch cannot hold.
        """
        info = self._info(place.name)
        first = place.first_row * info.columns + place.first_column
        with self._open(info) as file:
            values = _elements(file, info, torch_dtype(info), first, place.rows * place.columns)
        return RowBlock(place.first_row, values.view(place.rows, place.columns), place.first_column)

    def read_stored(self, place: BlockPlace, room: Callable[[int], NDArray[np.uint8]] = new_room) -> StoredBlock:
        """Return the stored bits at a place that `block_places` gave; may be called on any thread.

        `room` gives the memory for so many bytes; the block is valid as long as that is.

        Raises
        ------
        CheckpointError
            If the file cannot be read any more, or elements are not whole bytes.
        """
        info = self._info(place.name)
        width = DTYPE_BITS[info.dtype]
        if width % 8:
            torch_dtype(info)
        stored = room(place.rows * place.columns * width // 8)
        with self._open(info) as file:
            _fill(file, info, self.position(place), stored.data)
        bits = stored.view(f"uint{width}").reshape(place.rows, place.columns)
        return StoredBlock(place.first_row, bits, place.first_column, info)

    def position(self, place: BlockPlace) -> int:
        """Return the byte of its shard at which a block begins."""
        info = self._info(place.name)
        return info.start + (place.first_row * info.columns + place.first_column) * DTYPE_BITS[info.dtype] // 8

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor `name` in its stored dtype and shape.

        Raises
        ------
        CheckpointError
            If the file cannot be read any more, or the dtype is one that torch cannot hold.
        """
        info = self._info(name)
        with self._open(info) as file:
            return _elements(file, info, torch_dtype(info), 0, info.numel).reshape(info.shape)

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over sorted names, dtypes, shapes and a fixed sample of each tensor's bytes.

        The sample is 16 evenly spaced stretches of 64 bytes, or the whole tensor if it is not larger. It does not
        depend on how the tensors are spread over shards.

        Raises
        ------
        CheckpointError
            If a file cannot be read any more.
        """
        samples: dict[str, bytes] = {}
        for shard in self.shards:
            own = [info for info in self.tensors.values() if info.shard == shard]
            if own:
                with self._open(own[0]) as file:
                    samples.update((info.name, _sample(file, info)) for info in own)
        digest = hashlib.sha256()
        for name in sorted(samples):
            info = self.tensors[name]
            text = repr((name, info.dtype, info.shape, len(samples[name])))
            digest.update(text.encode() + samples[name])
        return digest.hexdigest()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"the nearest name is {printable(near[0])}" if near else f"it holds {len(self.tensors)} others"
            message = f"{printable(self.name)}: no tensor {printable(name)}; {hint}. Check the name."
            raise UnknownNameError(message)
        return self.tensors[name]

    def _open(self, info: TensorInfo) -> IO[bytes]:
        path = self.folder / info.shard
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            message = f"{printable(path)}: cannot be read any more ({error.strerror or error}). Check the file."
            raise CheckpointError(message) from error


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint and check the headers of all its shards; no weight is read.

    Parameters
    ----------
    model
        A folder, a `.safetensors` file, a `.safetensors.index.json` file, or (text only) a hub id such as "owner/name",
        whose files are fetched into the hub's cache. What exists on disk goes before the hub.
    revision
        Branch, tag or commit of a hub model; its main branch by default.

    Raises
    ------
    CheckpointError
        If it cannot be found, is of another format, or is damaged.
    """
    location = locate(_local_path(model, revision))
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for shard in location.shards:
        header = read_header(location.folder / shard, shard)
        metadata[shard] = header.metadata
        for info in header.tensors:
            if info.name in tensors:
                message = (
                    f"{printable(info.name)}: expected in one shard, found in {printable(tensors[info.name].shard)} "
                    f"and {printable(shard)}. Keep one of them."
                )
                raise CheckpointError(message)
            tensors[info.name] = info
    _check_index(location, tensors)
    if not tensors:
        message = f"{printable(model)}: expected tensors, found none in {printable(', '.join(location.shards))}."
        raise CheckpointError(message + " Save the checkpoint again.")
    config_path = location.folder / "config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    quantization = describe_quantization(config, tensors)
    return Checkpoint(
        str(model), location.folder, config, tensors, location.shards, metadata, location.index, quantization
    )


def _local_path(model: str | Path, revision: str | None) -> Path:
    """Return where `model` lies on disk, after fetching it if it is a hub id."""
    try:
        path = Path(model).expanduser()
        found = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        message = f"{printable(model)}: not found ({printable(error)}). {EXPECTED} Check the spelling."
        raise CheckpointError(message) from error
    if model == "":
        message = f"an empty name is no checkpoint. {EXPECTED}"
        raise CheckpointError(message)
    if isinstance(model, str) and not found and is_hub_id(model):
        return fetch(model, revision)
    if revision is not None:
        message = (
            f"{printable(model)}: a revision ({printable(revision)}) belongs to a hub id, and this is a path. "
            "Leave the revision out."
        )
        raise CheckpointError(message)
    return path


def _check_index(location: Location, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every tensor the index lists is in the shard it names."""
    for name, shard in location.weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            found = f"it is in {printable(tensors[name].shard)}" if name in tensors else "no shard has it"
            message = (
                f"{printable(name)}: expected in {printable(shard)}, as {printable(location.index)} says, but {found}. "
                "Download or save the checkpoint again."
            )
            raise CheckpointError(message)


def _elements(file: IO[bytes], info: TensorInfo, dtype: torch.dtype, first: int, count: int) -> torch.Tensor:
    """Read `count` elements from element `first` on into a new tensor of shape (count,)."""
    import torch

    if count == 0:
        return torch.empty(0, dtype=dtype)
    buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    _fill(file, info, info.start + first * dtype.itemsize, buffer.numpy().data)
    return buffer.view(dtype)


def _fill(file: IO[bytes], info: TensorInfo, position: int, target: memoryview) -> None:
    """Fill `target` from byte `position` of the shard on."""
    done = 0
    try:
        file.seek(position)
        while done < len(target):
            count = file.readinto(target[done:])  # type: ignore[attr-defined]
            if not count:
                break
            done += count
    except OSError as error:
        message = f"{printable(info.shard)}: cannot be read any more ({error.strerror or error}). Check the disk."
        raise CheckpointError(message) from error
    if done < len(target):
        message = (
            f"{printable(info.name)} ({printable(info.shard)}): expected {len(target):,} bytes at {position:,}, found "
            f"{done:,}. The file was changed while it was read; start again when nothing writes to it."
        )
        raise CheckpointError(message)


def _sample(file: IO[bytes], info: TensorInfo) -> bytes:
    """Return the bytes of one tensor that enter the fingerprint."""
    if info.size_bytes <= _SPOTS * _SPOT_BYTES:
        starts, length = [0], info.size_bytes
    else:
        starts = [spot * (info.size_bytes - _SPOT_BYTES) // (_SPOTS - 1) for spot in range(_SPOTS)]
        length = _SPOT_BYTES
    sample = bytearray(len(starts) * length)
    for number, start in enumerate(starts):
        _fill(file, info, info.start + start, memoryview(sample)[number * length : (number + 1) * length])
    return bytes(sample)
