"""Rewriting checkpoints: what is written and what is copied."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import raw_safetensors, write_checkpoint, write_safetensors
from rewriting import SHARDS, assert_tidy, names, run, same, tree, write_model
from safetensors.torch import load_file

from vrscope.checkpoint.header import read_header
from vrscope.checkpoint.source import BlockPlace, Checkpoint, RowBlock, StoredBlock, TensorInfo, open_checkpoint
from vrscope.checkpoint.staging import reserve
from vrscope.errors import VerificationError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


# --- what is written ---


def test_every_float_is_transformed_and_all_else_is_kept(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == sorted(tree(model))
    for shard, tensors in SHARDS.items():
        written = load_file(tmp_path / "out" / shard)
        for name, tensor in tensors.items():
            factor = 2 if tensor.is_floating_point() else 1
            expected = (tensor.double() * factor).to(tensor.dtype)
            assert written[name].dtype == tensor.dtype and written[name].shape == tensor.shape
            assert torch.equal(written[name].double(), expected.double())
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert_tidy(tmp_path)


def test_headers_are_kept_byte_for_byte(tmp_path: Path) -> None:
    """Odd spacing, odd order, odd metadata, types nobody knows: the copy under an identity is the same file."""
    header = (
        '{ "late":{"data_offsets":[8,16],"dtype":"F32","shape":[2] }, "__metadata__":{"format":"pt","\\u00fc\\n":"y"},'
        '"new":{"dtype":"MX9","shape":[5],"data_offsets":[16,22]},"f4":{"dtype":"F4","shape":[4],"data_offsets":[22,24]},'
        '"early":{"dtype":"F64","shape":[1],"data_offsets":[0,8],"note":[1]}}   '
    )
    raw = raw_safetensors(header, bytes(range(1, 25)))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(raw)
    run(tmp_path / "m", tmp_path / "out", same)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == raw
    run(tmp_path / "m", tmp_path / "zero", lambda info, block: block.values * 0)
    zeroed = (tmp_path / "zero" / "model.safetensors").read_bytes()
    assert zeroed == raw[:-24] + bytes(16) + raw[-8:]


def test_the_transform_sees_every_block_once(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def note(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        seen.append((info.name, block.first_row, block.first_column))
        return block.values

    run(model, tmp_path / "out", note)
    assert sorted(name for name, _, _ in seen) == ["a.bias", "experts", "f8.weight", "scalar", "z.weight"]


def test_blocks_cover_a_large_tensor(tmp_path: Path) -> None:
    tensors = {"m": torch.arange(2_500_000.0).view(2500, 1000), "v": torch.arange(2_700_000.0)}
    write_checkpoint(tmp_path / "m", tensors)

    def add_position(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        rows = torch.arange(block.first_row, block.first_row + block.values.shape[0]).view(-1, 1)
        columns = torch.arange(block.first_column, block.first_column + block.values.shape[1])
        return block.values + rows * info.columns + columns

    run(tmp_path / "m", tmp_path / "out", add_position)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor * 2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda info, block: block.values.double(),
        lambda info, block: block.values[:, :-1],
        lambda info, block: block.values.reshape(-1),
    ],
)
def test_another_dtype_or_shape_is_refused(tmp_path: Path, wrong: Callable[..., torch.Tensor]) -> None:
    write_checkpoint(tmp_path / "m", {"w": torch.ones(3, 2)})
    with pytest.raises(VerificationError, match=r"w \(model\.safetensors\).*expected torch.float32 of shape \(3, 2\)"):
        run(tmp_path / "m", tmp_path / "out", wrong)
    assert names(tmp_path) == ["m"]


def test_values_in_any_layout_are_written_in_order(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    write_checkpoint(tmp_path / "m", {"w": matrix})
    run(tmp_path / "m", tmp_path / "out", lambda info, block: block.values.t().contiguous().t().requires_grad_())
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], matrix)


def test_progress_counts_every_byte(model: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int, str]] = []
    run(model, tmp_path / "out", extra={"p.json": "{}"}, progress=lambda *call: calls.append(call))
    total = sum(path.stat().st_size for path in model.iterdir())
    assert {(stage, of, unit) for stage, _, of, unit in calls} == {("writing", total, "bytes")}
    done = [done for _, done, _, _ in calls]
    assert done == sorted(done) and done[-1] == total


def test_the_proof_sees_the_finished_copy_before_it_is_in_place(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def prove(copy: Checkpoint) -> None:
        assert copy.name == str(out) and copy.folder != out and not out.exists()
        assert torch.equal(copy.read("a.bias"), torch.arange(7.0) * 2)
        assert (copy.folder / "vrscope_plan.json").read_text() == "ü"
        assert copy.index == "model.safetensors.index.json"
        raise VerificationError("no")

    with pytest.raises(VerificationError, match="no"):
        run(model, out, extra={"vrscope_plan.json": "ü"}, prove=prove)
    assert names(tmp_path) == ["model"]


def test_every_block_is_shown_once_it_is_written_with_its_source(model: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    source = open_checkpoint(model)

    def look(copy: Checkpoint, place: BlockPlace, block: StoredBlock) -> None:
        shard = copy.tensors[place.name].shard
        assert copy.name == str(tmp_path / "out") and read_header(copy.folder / shard, shard).tensors
        written, original = copy.read_stored(place).bits, source.read_stored(place).bits
        assert np.array_equal(block.bits, original)
        if source.tensors[place.name].is_float:
            assert torch.equal(copy.read_block(place).values.float(), 2 * source.read_block(place).values.float())
        else:
            assert np.array_equal(written, original)
        seen[place.name] = seen.get(place.name, 0) + place.rows * place.columns

    run(model, tmp_path / "out", prove_block=look)
    sizes = {name: value.numel() for shard in SHARDS.values() for name, value in shard.items() if value.numel()}
    assert seen == sizes


@pytest.mark.parametrize("name", ["z.weight", "ids", "scalar"])
def test_one_block_that_is_rejected_rejects_the_copy(model: Path, tmp_path: Path, name: str) -> None:
    def reject(copy: Checkpoint, place: BlockPlace, block: StoredBlock) -> None:
        if place.name == name:
            message = f"{name} differs"
            raise VerificationError(message)

    with pytest.raises(VerificationError, match=f"{name} differs"):
        run(model, tmp_path / "out", prove_block=reject)
    assert names(tmp_path) == ["model"]


def test_a_place_is_reserved_or_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), 5000)
        assert os.fstat(file.fileno()).st_size in (0, 5000)
        reserve(file.fileno(), 0)


# --- what is copied ---


def test_everything_but_old_weights_is_copied(model: Path, tmp_path: Path) -> None:
    kept = ["README.md", "LICENSE", "merges.txt", "tokenizer.model", "modeling_x.py", "1_Pooling/config.json",
            "a/b/c.json", ".gitattributes", "x.index.json", "2_Dense/model.safetensors"]  # fmt: skip
    dropped = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "m.GGUF",
               "onnx/model.onnx", "original/consolidated.00.pth", "x.ckpt", "y.pt", "consolidated.safetensors",
               "old.safetensors.index.json", "vrscope_plan.json", ".git/objects/x", ".cache/huggingface/y",
               "original/model.safetensors", "training_args.bin"]  # fmt: skip
    for name in kept + dropped:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    own = ["config.json", "tokenizer.json", "modules.json", "model.safetensors.index.json", *SHARDS]
    run(model, tmp_path / "out")
    written = tree(tmp_path / "out")
    assert sorted(written) == sorted(kept + own)
    assert all(written[name] == name.encode() for name in kept)


def test_links_are_followed_for_files_only(tmp_path: Path) -> None:
    """A snapshot of the hub's cache becomes a folder of real files."""
    snapshot, elsewhere = tmp_path / "snapshots" / "abc", tmp_path / "elsewhere"
    write_safetensors(tmp_path / "blobs" / "w", {"a": torch.ones(3)})
    elsewhere.mkdir()
    (elsewhere / "secret.json").write_text("x")
    (tmp_path / "blobs" / "c").write_text('{"model_type": "x"}')
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    (snapshot / "config.json").symlink_to("../../blobs/c")
    (snapshot / "dangling.json").symlink_to("gone")
    (snapshot / "folder").symlink_to(elsewhere)
    (snapshot / "loop").symlink_to(".")
    os.mkfifo(snapshot / "fifo.json")
    run(snapshot, tmp_path / "out")
    out = tmp_path / "out"
    assert names(out) == ["config.json", "model.safetensors"]
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert torch.equal(open_checkpoint(out).read("a"), torch.full((3,), 2.0))
    assert torch.equal(open_checkpoint(snapshot).read("a"), torch.ones(3))


def test_a_single_file_takes_config_and_tokenizer_along(tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    write_safetensors(folder / "tuned.safetensors", {"a": torch.ones(3)})
    write_safetensors(folder / "unrelated.safetensors", {"b": torch.ones(3)})
    for name in ("tokenizer.json", "vocab.txt", "invoice.json", "photo.png", "deep/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    run(folder / "tuned.safetensors", folder / "out")  # beside the file: there is no checkpoint folder to be in
    assert sorted(tree(folder / "out")) == ["tokenizer.json", "tuned.safetensors", "vocab.txt"]


def test_extra_files_replace_copied_ones(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", extra={"tokenizer.json": "new", "vrscope_plan.json": "plan"})
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "out" / "vrscope_plan.json").read_text() == "plan"


def test_permissions_are_kept_and_the_folder_is_not_private(model: Path, tmp_path: Path) -> None:
    (model / "config.json").chmod(0o440)
    (model / "model-1-of-2.safetensors").chmod(0o600)
    run(model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out" / "model-1-of-2.safetensors").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out").stat().st_mode & 0o777 == model.stat().st_mode & 0o777


@pytest.mark.real
def test_a_real_checkpoint_survives_there_and_back(smollm2: Path, tmp_path: Path) -> None:
    def halve(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        return block.values * 0.5

    def double(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        return block.values * 2

    run(smollm2, tmp_path / "half", halve)
    run(tmp_path / "half", tmp_path / "back", double)
    assert names(tmp_path / "back") == names(smollm2)
    for name in names(smollm2):
        assert (tmp_path / "back" / name).read_bytes() == (smollm2 / name).read_bytes()
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == open_checkpoint(smollm2).config
