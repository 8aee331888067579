"""Rewriting checkpoints: what is written, what is copied, what is refused, and what an error leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import raw_safetensors, safetensors_bytes, write_checkpoint, write_safetensors
from safetensors.torch import load_file

from vrscope.checkpoint import staging, writer
from vrscope.checkpoint.source import Checkpoint, RowBlock, TensorInfo, open_checkpoint
from vrscope.checkpoint.writer import rewrite
from vrscope.errors import CheckpointError, OutputError, VerificationError
from vrscope.progress import silent

SHARDS = {
    "model-1-of-2.safetensors": {
        "z.weight": torch.arange(600.0).view(20, 30).to(torch.bfloat16),
        "a.bias": torch.arange(7.0),
        "ids": torch.arange(9),
    },
    "model-2-of-2.safetensors": {
        "f8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "experts": torch.arange(24.0).view(2, 3, 4).to(torch.float16),
    },
}


def _double(info: TensorInfo, block: RowBlock) -> torch.Tensor:
    del info
    return (block.values.double() * 2).to(block.values.dtype)


def _same(info: TensorInfo, block: RowBlock) -> torch.Tensor:
    del info
    return block.values


def _rewrite(source: Path | str, out: Path, transform: Callable[..., torch.Tensor] = _double, **options: Any) -> None:
    settings: dict[str, Any] = {"extra": {}, "force": False, "prove": lambda copy: None, "progress": silent}
    rewrite(open_checkpoint(source), out, transform, **(settings | options))


def _refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(OutputError) as caught:
        _rewrite(source, out, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _assert_tidy(parent: Path) -> None:
    assert not [path.name for path in parent.iterdir() if path.name.startswith(".")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "model", SHARDS, {"model_type": "x"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


# --- what is written ---


def test_every_float_is_transformed_and_all_else_is_kept(model: Path, tmp_path: Path) -> None:
    _rewrite(model, tmp_path / "out")
    assert sorted(_tree(tmp_path / "out")) == sorted(_tree(model))
    for shard, tensors in SHARDS.items():
        written = load_file(tmp_path / "out" / shard)
        for name, tensor in tensors.items():
            factor = 2 if tensor.is_floating_point() else 1
            expected = (tensor.double() * factor).to(tensor.dtype)
            assert written[name].dtype == tensor.dtype and written[name].shape == tensor.shape
            assert torch.equal(written[name].double(), expected.double())
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    _assert_tidy(tmp_path)


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
    _rewrite(tmp_path / "m", tmp_path / "out", _same)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == raw
    _rewrite(tmp_path / "m", tmp_path / "zero", lambda info, block: block.values * 0)
    zeroed = (tmp_path / "zero" / "model.safetensors").read_bytes()
    assert zeroed == raw[:-24] + bytes(16) + raw[-8:]


def test_the_transform_sees_blocks_in_order(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def note(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        seen.append((info.name, block.first_row, block.first_column))
        return block.values

    _rewrite(model, tmp_path / "out", note)
    assert [name for name, _, _ in seen] == ["z.weight", "a.bias", "f8.weight", "scalar", "experts"]


def test_blocks_cover_a_large_tensor(tmp_path: Path) -> None:
    tensors = {"m": torch.arange(1_000_000.0).view(1000, 1000), "v": torch.arange(700_000.0)}
    write_checkpoint(tmp_path / "m", tensors)

    def add_position(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        rows = torch.arange(block.first_row, block.first_row + block.values.shape[0]).view(-1, 1)
        columns = torch.arange(block.first_column, block.first_column + block.values.shape[1])
        return block.values + rows * info.columns + columns

    _rewrite(tmp_path / "m", tmp_path / "out", add_position)
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
        _rewrite(tmp_path / "m", tmp_path / "out", wrong)
    assert _names(tmp_path) == ["m"]


def test_values_in_any_layout_are_written_in_order(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    write_checkpoint(tmp_path / "m", {"w": matrix})
    _rewrite(tmp_path / "m", tmp_path / "out", lambda info, block: block.values.t().contiguous().t().requires_grad_())
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], matrix)


def test_progress_counts_every_byte(model: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int, str]] = []
    _rewrite(model, tmp_path / "out", extra={"p.json": "{}"}, progress=lambda *call: calls.append(call))
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
        _rewrite(model, out, extra={"vrscope_plan.json": "ü"}, prove=prove)
    assert _names(tmp_path) == ["model"]


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
    _rewrite(model, tmp_path / "out")
    written = _tree(tmp_path / "out")
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
    _rewrite(snapshot, tmp_path / "out")
    out = tmp_path / "out"
    assert _names(out) == ["config.json", "model.safetensors"]
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
    _rewrite(folder / "tuned.safetensors", folder / "out")  # beside the file: there is no checkpoint folder to be in
    assert sorted(_tree(folder / "out")) == ["tokenizer.json", "tuned.safetensors", "vocab.txt"]


def test_extra_files_replace_copied_ones(model: Path, tmp_path: Path) -> None:
    _rewrite(model, tmp_path / "out", extra={"tokenizer.json": "new", "vrscope_plan.json": "plan"})
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "out" / "vrscope_plan.json").read_text() == "plan"


def test_permissions_are_kept_and_the_folder_is_not_private(model: Path, tmp_path: Path) -> None:
    (model / "config.json").chmod(0o440)
    (model / "model-1-of-2.safetensors").chmod(0o600)
    _rewrite(model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out" / "model-1-of-2.safetensors").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out").stat().st_mode & 0o777 == model.stat().st_mode & 0o777


# --- what is refused ---


def test_a_place_that_is_taken_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _rewrite(model, out)
    before = _tree(out)
    assert "--force" in _refusal(model, out)
    assert _tree(out) == before
    (tmp_path / "file").write_text("x")
    assert "found a file" in _refusal(model, tmp_path / "file", force=True)
    assert "cannot be written" in _refusal(model, tmp_path / "file" / "out")
    _assert_tidy(tmp_path)


def test_an_empty_folder_is_free(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _rewrite(model, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").shards == tuple(SHARDS)


def test_parents_are_made_and_removed_again_on_failure(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _rewrite(model, tmp_path / "a" / "b" / "out", prove=lambda copy: 1 // 0)
    assert _names(tmp_path) == ["model"]
    _rewrite(model, tmp_path / "a" / "b" / "out")
    assert open_checkpoint(tmp_path / "a" / "b" / "out").tensors


def test_source_and_target_must_lie_apart(model: Path, tmp_path: Path) -> None:
    before = _tree(model)
    link = tmp_path / "link"
    link.symlink_to(model)
    for force in (False, True):
        assert "is the checkpoint itself" in _refusal(model, model, force=force)
        assert "is the checkpoint itself" in _refusal(model, link, force=force)
        assert "is the checkpoint itself" in _refusal(link, model, force=force)
        assert "inside the checkpoint" in _refusal(model, model / "out", force=force)
        assert "inside the checkpoint" in _refusal(model, link / "deep" / "out", force=force)
        assert "inside the checkpoint" in _refusal(model, tmp_path / "x" / ".." / "model" / "out", force=force)
        assert "holds the checkpoint" in _refusal(model, tmp_path, force=force)
        shard = model / "model-1-of-2.safetensors"
        assert "inside the checkpoint" in _refusal(shard, model / "out", force=force)
        assert "is the checkpoint itself" in _refusal(shard, model, force=force)
        assert "inside the checkpoint" in _refusal(shard, shard, force=force)
        assert "holds the checkpoint" in _refusal(shard, tmp_path, force=force)
        index = model / "model.safetensors.index.json"
        assert "inside the checkpoint" in _refusal(index, model / "out", force=force)
    assert _tree(model) == before


def test_a_target_that_holds_linked_files_of_the_source_is_refused(tmp_path: Path) -> None:
    store = write_checkpoint(tmp_path / "store", {"a": torch.ones(2)}, {})
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(store / "model.safetensors")
    assert "files it links to" in _refusal(linked, store, force=True)
    assert torch.equal(open_checkpoint(store).read("a"), torch.ones(2))


def test_force_replaces_checkpoints_and_nothing_else(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = write_checkpoint(tmp_path / "out", {"old": torch.ones(2)}, {})
    (out / "stale.txt").write_text("x")
    _rewrite(model, out, force=True)
    assert sorted(_tree(out)) == sorted(_tree(model))
    for name in ("photos", "code"):
        other = tmp_path / name
        other.mkdir()
        (other / "config.json").write_text("{}")
        if name == "code":
            write_safetensors(other / "model.safetensors", {"a": torch.ones(1)})
            (other / ".git").mkdir()
        assert "remove it yourself" in _refusal(model, other, force=True)
    monkeypatch.chdir(out)
    assert "does not replace it" in _refusal(model, out, force=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out))
    assert "does not replace it" in _refusal(model, out, force=True)
    _assert_tidy(tmp_path)


def test_a_target_behind_a_link_is_replaced_where_it_lies(model: Path, tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "disk" / "real", {"old": torch.ones(2)}, {})
    (tmp_path / "out").symlink_to(real)
    _rewrite(model, tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink() and open_checkpoint(real).shards == tuple(SHARDS)


def test_a_full_disk_is_noticed_beforehand(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000))
    touched: list[str] = []
    message = _refusal(model, tmp_path / "a" / "out", transform=lambda info, block: touched.append(info.name))
    assert "free bytes" in message and "5,000" in message and not touched
    assert _names(tmp_path) == ["model"]


def test_a_disk_that_fills_up_is_one_clear_line(model: Path, tmp_path: Path) -> None:
    """/dev/full fails every write with ENOSPC, as a full disk does."""
    original = writer._Writer._new

    def full(self: Any, name: str) -> Any:
        original(self, name).close()
        return Path("/dev/full").open("wb", buffering=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer._Writer, "_new", full)
        assert "No space left" in _refusal(model, tmp_path / "out")
    assert _names(tmp_path) == ["model"]


def test_a_parent_that_cannot_be_written_is_refused(model: Path) -> None:
    if Path("/proc/self").exists():
        assert "/proc/out: cannot be written" in _refusal(model, Path("/proc/out"))
    assert "mount point" in _refusal(model, Path("/dev"), force=True)


def test_a_source_that_changes_is_noticed(model: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(model)
    write_safetensors(model / "model-2-of-2.safetensors", {"other": torch.ones(5)})
    with pytest.raises(CheckpointError, match="changed while"):
        rewrite(opened, tmp_path / "out", _same, extra={}, force=False, prove=lambda copy: None, progress=silent)

    def cut(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        os.truncate(model / "model-1-of-2.safetensors", 400)
        return block.values

    with pytest.raises(CheckpointError, match="changed while"):
        _rewrite(write_checkpoint(model, SHARDS), tmp_path / "out", cut)
    assert _names(tmp_path) == ["model"]


# --- what an error leaves behind ---


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["transform", "prove", "progress", "rename"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_an_error_leaves_the_place_as_it_was(
    model: Path, tmp_path: Path, monkeypatch: Any, error: type[BaseException], place: str, old: bool
) -> None:
    out = tmp_path / "out"
    if old:
        write_checkpoint(out, {"old": torch.ones(2)}, {})
    before = _tree(out)
    hidden: list[int] = []

    def fail(*args: Any) -> None:
        hidden.append(sum(path.name.startswith(".out.vrscope-new-") for path in tmp_path.iterdir()))
        raise error

    options: dict[str, Any] = {"force": old}
    if place == "rename":
        monkeypatch.setattr(staging, "_publish", fail)
    else:
        options[place] = fail
    with pytest.raises(error):
        _rewrite(model, out, **options)
    assert hidden == [1]
    assert _tree(out) == before and out.exists() == old
    _assert_tidy(tmp_path)


def test_an_exchange_the_file_system_cannot_do_falls_back(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = write_checkpoint(tmp_path / "out", {"old": torch.ones(2)}, {})
    before = _tree(out)
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    rename = Path.rename

    def fail_second(self: Path, target: Path) -> Path:
        if ".vrscope-new-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_second)
        assert "Input/output error" in _refusal(model, out, force=True)
    assert _tree(out) == before
    _assert_tidy(tmp_path)
    _rewrite(model, out, force=True)
    assert open_checkpoint(out).shards == tuple(SHARDS)
    _assert_tidy(tmp_path)


def test_the_exchange_is_one_step_here(tmp_path: Path) -> None:
    if os.uname().sysname != "Linux":
        pytest.skip("renameat2 is Linux's")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert staging._exchange(tmp_path / "a", tmp_path / "b")
    assert _names(tmp_path / "a") == ["b"] and _names(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        staging._exchange(tmp_path / "a", tmp_path / "gone")


def test_everything_is_on_the_disk_before_it_is_in_place(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (model / "deep").mkdir()
    (model / "deep" / "x.json").write_text("{}")
    synced: list[int] = []
    fsync, publish, checked = os.fsync, staging._publish, []
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))

    def check(temporary: Path, target: Path) -> None:
        paths = [temporary, *temporary.rglob("*")]
        checked.extend(paths)
        assert {path.stat().st_ino for path in paths} <= set(synced)
        synced.clear()
        publish(temporary, target)
        assert synced == [tmp_path.stat().st_ino]

    monkeypatch.setattr(staging, "_publish", check)
    _rewrite(model, tmp_path / "out", extra={"p.json": "{}"})
    assert len(checked) == 9


def test_leftovers_of_dead_runs_are_removed(model: Path, tmp_path: Path) -> None:
    dead = next(number for number in range(400_000, 4_000_000) if not Path(f"/proc/{number}").exists())
    machine = staging._machine()
    gone = tmp_path / f".out.vrscope-new-{machine}-{dead}-0a1b"
    old = tmp_path / f".out.vrscope-old-{machine}-{dead}-0a1b"
    alive = tmp_path / f".out.vrscope-new-{machine}-{os.getpid()}-0a1b"
    elsewhere = tmp_path / f".out.vrscope-new-00000000-{dead}-0a1b"
    other = tmp_path / f".other.vrscope-new-{machine}-{dead}-0a1b"
    for folder in (gone, old, alive, elsewhere, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(safetensors_bytes({"old": torch.ones(1)}))
    read: list[str] = []
    message = _refusal(model, tmp_path / "out", transform=lambda info, block: read.append(info.name))
    assert "--force" in message and not read  # the old one was put back first
    assert list(open_checkpoint(tmp_path / "out").tensors) == ["old"]
    assert [folder.exists() for folder in (gone, old, alive, elsewhere, other)] == [False, False, True, True, True]


def test_a_second_run_meanwhile_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"):
        _rewrite(model, out, prove=lambda copy: _rewrite(model, out, _same))
    assert torch.equal(open_checkpoint(out).read("a.bias"), torch.arange(7.0))
    _assert_tidy(tmp_path)


@pytest.mark.real
def test_a_real_checkpoint_survives_there_and_back(smollm2: Path, tmp_path: Path) -> None:
    def halve(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        return block.values * 0.5

    def double(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        return block.values * 2

    _rewrite(smollm2, tmp_path / "half", halve)
    _rewrite(tmp_path / "half", tmp_path / "back", double)
    names = sorted(path.name for path in smollm2.iterdir())
    assert _names(tmp_path / "back") == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (smollm2 / name).read_bytes()
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == open_checkpoint(smollm2).config
