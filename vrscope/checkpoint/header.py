"""Read and check the header of one safetensors file: where each tensor lies, and that the file really holds it.

The checks are those of the format (and of the safetensors library, which is asked for a second opinion), made here
because a refusal has to name the shard, the tensor and the two numbers that disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrscope.checkpoint.layout import DTYPE_BITS, TensorInfo, printable
from vrscope.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# Types that every release of the safetensors library we accept knows; it refuses a whole file for any other.
_LIBRARY_DTYPES = frozenset(DTYPE_BITS) - {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}
_REMEDY = "The file is damaged or incomplete; download or save it again."


@dataclass(frozen=True, slots=True)
class Header:
    """What one safetensors file declares.

    Attributes
    ----------
    tensors
        In the order of their bytes.
    metadata
        The `__metadata__` entry, empty if there is none.
    data_start
        Byte at which the first tensor begins: 8 + the length of the header text.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path, shard: str) -> Header:
    """Return the checked header of the safetensors file `path`, which messages call `shard`.

    Raises
    ------
    CheckpointError
        If the file cannot be opened, or is not a whole and consistent safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = _checked_length(prefix, size, shard)
            text = file.read(length)
    except OSError as error:
        message = f"{printable(path)}: cannot be read ({error.strerror or error}). Check the path and its permissions."
        raise CheckpointError(message) from error
    entries = _parse(text, shard)
    metadata = _checked_metadata(entries.pop("__metadata__", None) or {}, shard)
    data_start = 8 + length
    tensors = [_tensor(name, entry, shard, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_layout(tensors, data_start, size, shard)
    if all(info.dtype in _LIBRARY_DTYPES for info in tensors):
        _second_opinion(path, shard)
    return Header(tuple(tensors), metadata, data_start)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse a key that occurs twice; for `json.loads(object_pairs_hook=...)`.

    Raises
    ------
    ValueError
        Naming the repeated key.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        message = f"the key {printable(repeated)} occurs twice"
        raise ValueError(message)
    return result


def _fail(where: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(f"{where}: expected {expected}, found {found}. {_REMEDY}")


def _checked_length(prefix: bytes, size: int, shard: str) -> int:
    where = printable(shard)
    if prefix == b"version ":
        message = f"{where}: expected weights, found the pointer that git leaves in their place. Run `git lfs pull`."
        raise CheckpointError(message)
    if len(prefix) < 8:
        raise _fail(where, "a safetensors file, which starts with the 8-byte length of its header", f"{size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        found = f"a header length of {length:,} bytes (not a safetensors file, or a damaged one)"
        raise _fail(where, f"a header of at most {MAX_HEADER_BYTES:,} bytes", found)
    if length > size - 8:
        found = f"only {size - 8:,} bytes after the length field"
        raise _fail(where, f"a header of {length:,} bytes", found)
    return length


def _parse(text: bytes, shard: str) -> dict[str, Any]:
    where = f"{printable(shard)}, header"
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _fail(where, "a JSON object without repeated keys", f"something else ({printable(error)})") from error
    if not isinstance(entries, dict) or not text.startswith(b"{"):
        found = f"JSON that is {type(entries).__name__} or does not start with an opening brace"
        raise _fail(where, "a JSON object", found)
    for name in entries:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _fail(where, "tensor names in UTF-8", f"the name {printable(name)}") from error
    return entries


def _checked_metadata(metadata: Any, shard: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        where = f"{printable(shard)}, __metadata__"
        raise _fail(where, "an object of text values", printable(metadata))
    return metadata


def _tensor(name: str, entry: Any, shard: str, data_start: int) -> TensorInfo:
    where = f"{printable(name)} ({printable(shard)})"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise _fail(where, "dtype, shape and data_offsets", printable(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _fail(where, "a dtype such as BF16", printable(dtype))
    if not _naturals(shape):
        raise _fail(where, "a shape of whole numbers from 0", printable(shape))
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _fail(where, "data_offsets of two whole numbers, begin <= end", printable(offsets))
    stored, bits, count = offsets[1] - offsets[0], DTYPE_BITS.get(dtype), _count(shape)
    if count is None:
        raise _fail(where, "a shape of fewer than 2^63 elements", printable(shape))
    if bits is not None and count * bits != stored * 8:
        expected = f"{count * bits / 8:,.10g} bytes for {dtype} of shape {printable(shape)}"
        raise _fail(where, expected, f"data_offsets that span {stored:,} bytes")
    return TensorInfo(name, dtype, tuple(shape), shard, data_start + offsets[0], data_start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _count(shape: list[int]) -> int | None:
    """Return the number of elements; None where it overflows, before the product costs time."""
    count = 1
    for extent in shape:
        count *= extent
        if count >= 2**63:
            return None
    return count


def _check_layout(tensors: list[TensorInfo], data_start: int, size: int, shard: str) -> None:
    """Check that the tensors fill the rest of the file, one directly after the other."""
    position, previous = data_start, "the header"
    for info in tensors:
        where = f"{printable(info.name)} ({printable(shard)})"
        if info.start != position:
            problem = "overlaps" if info.start < position else "leaves unused bytes after"
            expected = f"its bytes to begin at offset {position - data_start:,}, right after {printable(previous)}"
            raise _fail(where, expected, f"{info.start - data_start:,}, which {problem} it")
        if info.end > size:
            raise _fail(where, f"a file of at least {info.end:,} bytes", f"{size:,}")
        position, previous = info.end, info.name
    if position != size:
        raise _fail(printable(shard), f"a file of {position:,} bytes, as its header says", f"{size:,}")


def _second_opinion(path: Path, shard: str) -> None:
    """Let the safetensors library refuse what the checks above do not know of."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        message = f"{printable(shard)}: the safetensors library refuses it ({printable(error)}). {_REMEDY}"
        raise CheckpointError(message) from error
