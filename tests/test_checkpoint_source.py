"""Opening checkpoints and streaming their tensors, compared with the safetensors library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders import DTYPE_NAMES, raw_safetensors, safetensors_bytes, write_checkpoint, write_safetensors
from safetensors.torch import load_file, save_file

from vrscope.checkpoint.source import FLOAT_DTYPES, Checkpoint, TensorInfo, open_checkpoint
from vrscope.errors import CheckpointError, UnknownNameError

SHAPES = [(), (1,), (7,), (5, 3), (3, 5, 2), (2, 3, 1, 4), (0,), (0, 4), (4, 0), (1, 1), (6, 1)]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bytes in every dtype but bool: NaN payloads included, so that only exact copies pass."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def _open(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path / "model", tensors))


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())
@pytest.mark.parametrize("max_bytes", [1, 16, 1 << 20])
def test_blocks_and_whole_tensors_are_the_stored_bits(tmp_path: Path, dtype: torch.dtype, max_bytes: int) -> None:
    tensors = {f"t{number}": _random(shape, dtype, number) for number, shape in enumerate(SHAPES)}
    opened = _open(tmp_path, tensors)
    reference = load_file(tmp_path / "model" / "model.safetensors")
    assert set(opened.tensors) == set(reference)
    for name, expected in reference.items():
        info = opened.tensors[name]
        assert info.dtype == DTYPE_NAMES[dtype] and info.is_float == (info.dtype in FLOAT_DTYPES)
        whole = opened.read(name)
        assert whole.dtype == expected.dtype and whole.shape == expected.shape and _bits(whole) == _bits(expected)
        matrix = expected.reshape(info.rows, info.columns)
        rebuilt = torch.zeros_like(matrix)
        covered = torch.zeros(matrix.shape, dtype=torch.int32)
        for block in opened.row_blocks(name, max_bytes):
            assert block.values.dtype == dtype and block.values.ndim == 2 and block.values.is_contiguous()
            rows, columns = block.values.shape
            assert block.first_column == 0 or matrix.shape[0] == 1
            assert rows * columns * dtype.itemsize <= max_bytes or rows == 1
            place = (
                slice(block.first_row, block.first_row + rows),
                slice(block.first_column, block.first_column + columns),
            )
            rebuilt[place] = block.values
            covered[place] += 1
        assert torch.equal(covered, torch.ones_like(covered))
        assert _bits(rebuilt) == _bits(expected)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((), 1, 1), ((7,), 1, 7), ((0,), 1, 0), ((5, 3), 5, 3), ((3, 5, 2), 3, 10), ((0, 4), 0, 4), ((4, 0), 4, 0)],
)
def test_the_matrix_view_of_a_shape(shape: tuple[int, ...], rows: int, columns: int) -> None:
    info = TensorInfo("t", "F32", shape, "s", 8, 8 + 4 * rows * columns)
    assert (info.rows, info.columns, info.numel, info.size_bytes) == (rows, columns, rows * columns, 4 * rows * columns)


def test_vectors_are_cut_along_their_elements(tmp_path: Path) -> None:
    vector = torch.arange(10.0)
    blocks = list(_open(tmp_path, {"v": vector}).row_blocks("v", max_bytes=16))
    assert [(b.first_row, b.first_column, tuple(b.values.shape)) for b in blocks] == [
        (0, 0, (1, 4)), (0, 4, (1, 4)), (0, 8, (1, 2)),
    ]  # fmt: skip
    assert torch.equal(torch.cat([b.values[0] for b in blocks]), vector)


def test_a_row_larger_than_the_limit_is_one_block(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    blocks = list(_open(tmp_path, {"m": matrix}).row_blocks("m", max_bytes=4))
    assert [b.first_row for b in blocks] == [0, 1, 2]
    assert torch.equal(torch.cat([b.values for b in blocks]), matrix)


def test_blocks_may_be_kept_and_changed(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(6, 2)
    opened = _open(tmp_path, {"m": matrix})
    kept = [block.values for block in opened.row_blocks("m", max_bytes=8)]
    kept[0].zero_()
    assert torch.equal(torch.cat(kept)[1:], matrix[1:])
    assert torch.equal(opened.read("m"), matrix)


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    tensors = {f"t{n}": _random((64, 16), torch.float32, n) for n in range(8)}
    opened = _open(tmp_path, tensors)
    names = list(tensors) * 8

    def read(name: str) -> bytes:
        return b"".join(_bits(block.values) for block in opened.row_blocks(name, max_bytes=64))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, names)) == [_bits(tensors[name]) for name in names]


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    data = b"\1" * 4 + b"\2" * 4 + b"\3" * 4
    entry = {"dtype": "U8", "shape": [4]}
    header = {"late": entry | {"data_offsets": [8, 12]}, "first": entry | {"data_offsets": [0, 4]}}
    header |= {"none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}}
    header |= {"mid": entry | {"data_offsets": [4, 8]}}
    (tmp_path / "x.safetensors").write_bytes(raw_safetensors(header, data))
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert list(opened.tensors) == ["first", "none", "mid", "late"]
    assert [int(opened.read(name)[0]) for name in ("first", "mid", "late")] == [1, 2, 3]


def test_metadata_config_and_names_are_kept(tmp_path: Path) -> None:
    strange = "layer\n\u202e<b>&ü"
    write_checkpoint(tmp_path / "m", {strange: torch.ones(2, 2)}, {"model_type": "llama", "x": None})
    opened = open_checkpoint(tmp_path / "m")
    assert opened.metadata == {"model.safetensors": {"format": "pt"}}
    assert opened.config == {"model_type": "llama", "x": None}
    assert opened.name == str(tmp_path / "m") and opened.folder == tmp_path / "m"
    assert list(opened.tensors) == [strange] and opened.index is None and opened.quantization is None
    with pytest.raises(UnknownNameError) as caught:
        opened.read(strange + "x")
    assert "\n" not in str(caught.value) and "\\n" in str(caught.value) and "\u202e" not in str(caught.value)


def test_sharded_checkpoints_open_by_folder_index_and_shard(tmp_path: Path) -> None:
    shards = {"b.safetensors": {"w2": torch.full((2, 2), 2.0)}, "a.safetensors": {"w1": torch.ones(3)}}
    folder = write_checkpoint(tmp_path / "m", shards, {"model_type": "x"})
    for model in (folder, str(folder), folder / "model.safetensors.index.json"):
        opened = open_checkpoint(model)
        assert opened.index == "model.safetensors.index.json"
        assert opened.shards == ("a.safetensors", "b.safetensors")
        assert list(opened.tensors) == ["w1", "w2"] and opened.tensors["w2"].shard == "b.safetensors"
        assert opened.config == {"model_type": "x"}
        assert torch.equal(opened.read("w2"), torch.full((2, 2), 2.0))
    alone = open_checkpoint(folder / "b.safetensors")
    assert alone.index is None and list(alone.tensors) == ["w2"] and alone.config == {"model_type": "x"}


def test_files_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blob = write_safetensors(tmp_path / "blobs" / "0123", {"a": torch.ones(2)})
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    for model in (snapshot, snapshot / "model.safetensors"):
        opened = open_checkpoint(model)
        assert opened.folder == snapshot and opened.tensors["a"].shard == "model.safetensors"
        assert torch.equal(opened.read("a"), torch.ones(2))


def test_types_that_torch_cannot_hold_are_listed_only(tmp_path: Path) -> None:
    header = {
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "f4": {"dtype": "F4", "shape": [16], "data_offsets": [8, 16]},
        "new": {"dtype": "MX9_NEW", "shape": [5], "data_offsets": [16, 22]},
        "scale": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [22, 24]},
        "complex": {"dtype": "C64", "shape": [1], "data_offsets": [24, 32]},
    }
    (tmp_path / "x.safetensors").write_bytes(raw_safetensors(header, bytes(range(32))))
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert [info.is_float for info in opened.tensors.values()] == [True, False, False, False, False]
    assert opened.tensors["new"].size_bytes == 6 and len(opened.fingerprint()) == 64
    for name, dtype in (("f4", "F4"), ("new", "MX9_NEW")):
        with pytest.raises(CheckpointError, match=f"{name}.*{dtype}.*listed"):
            opened.read(name)
        with pytest.raises(CheckpointError, match=dtype):
            list(opened.row_blocks(name))
    assert opened.read("complex").dtype == torch.complex64
    assert opened.read("scale").dtype == torch.float8_e8m0fnu


def test_a_file_cut_off_while_reading_is_noticed(tmp_path: Path) -> None:
    opened = _open(tmp_path, {"m": torch.ones(64, 8)})
    blocks = opened.row_blocks("m", max_bytes=32)
    next(blocks)
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1024)
    with pytest.raises(CheckpointError, match=r"m \(model.safetensors\).*changed while"):
        list(blocks)
    path.unlink()
    with pytest.raises(CheckpointError, match="any more"):
        opened.read("m")


def test_the_fingerprint_depends_on_content_alone(tmp_path: Path) -> None:
    tensors = {"a": _random((40, 30), torch.bfloat16, 1), "b": _random((3,), torch.float32, 2)}
    one = open_checkpoint(write_checkpoint(tmp_path / "one", tensors)).fingerprint()
    two = {"x.safetensors": {"b": tensors["b"]}, "y.safetensors": {"a": tensors["a"]}}
    assert open_checkpoint(write_checkpoint(tmp_path / "two", two)).fingerprint() == one
    save_file(tensors, tmp_path / "library.safetensors", {"other": "metadata"})
    assert open_checkpoint(tmp_path / "library.safetensors").fingerprint() == one

    def changed(name: str, **tensor: torch.Tensor) -> str:
        return open_checkpoint(write_checkpoint(tmp_path / name, tensors | tensor)).fingerprint()

    last = tensors["a"].clone()
    last.view(torch.uint8)[-1, -1] ^= 1
    seen = {
        one,
        changed("last", a=last),
        changed("dtype", a=tensors["a"].view(torch.float16)),
        changed("shape", a=tensors["a"].reshape(30, 40)),
        changed("more", c=torch.zeros(0)),
        changed("small", b=tensors["b"] + 1),
    }
    assert len(seen) == 6
    scaled = {name: tensor * 2 for name, tensor in tensors.items()}
    assert open_checkpoint(write_checkpoint(tmp_path / "scaled", scaled)).fingerprint() != one


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Stream 128 MB and compare the peak resident memory with that of streaming 1 MB."""
    script = (
        "import resource, sys; from vrscope.checkpoint.source import open_checkpoint; import torch\n"
        "opened = open_checkpoint(sys.argv[1]); opened.fingerprint()\n"
        "total = sum(block.values.numel() for name in opened.tensors for block in opened.row_blocks(name))\n"
        "print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for rows in (1 << 10, 1 << 17):
        size = rows * 256 * 4
        header = {"w": {"dtype": "F32", "shape": [rows, 256], "data_offsets": [0, size]}}
        path = tmp_path / f"{rows}.safetensors"
        path.write_bytes(raw_safetensors(header))
        os.truncate(path, path.stat().st_size + size)  # a sparse file: it costs no disk
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", script, path], env=environment, capture_output=True, text=True, check=True
        )
        total, peak = map(int, done.stdout.split())
        assert total == rows * 256
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 32


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"a": torch.ones(2)}, {})
    script = (
        "import sys; from vrscope.checkpoint.source import open_checkpoint\n"
        "open_checkpoint(sys.argv[1]).fingerprint(); print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, folder], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.real
@pytest.mark.parametrize("fixture", ["smollm2", "minilm"])
def test_real_checkpoints_read_as_the_library_reads_them(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    opened = open_checkpoint(folder)
    assert opened.config == json.loads((folder / "config.json").read_text()) and opened.quantization is None
    reference = load_file(folder / "model.safetensors")
    assert set(opened.tensors) == set(reference)
    for name, expected in reference.items():
        dim = 0 if expected.ndim >= 2 else 1
        rebuilt = torch.cat([block.values for block in opened.row_blocks(name)], dim=dim).reshape(expected.shape)
        assert rebuilt.dtype == expected.dtype and torch.equal(rebuilt, expected)


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({}))
    with pytest.raises(CheckpointError, match="expected tensors, found none"):
        open_checkpoint(tmp_path)
