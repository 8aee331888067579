"""Rewriting checkpoints: what is refused, and what an error leaves behind."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import safetensors_bytes, write_checkpoint, write_safetensors
from rewriting import SHARDS, assert_tidy, names, refusal, run, same, tree, write_model

from vrscope.checkpoint import staging, writer
from vrscope.checkpoint.source import RowBlock, TensorInfo, open_checkpoint
from vrscope.checkpoint.writer import rewrite
from vrscope.errors import CheckpointError, OutputError
from vrscope.progress import silent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


# --- what is refused ---


def test_a_place_that_is_taken_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, out)
    before = tree(out)
    assert "--force" in refusal(model, out)
    assert tree(out) == before
    (tmp_path / "file").write_text("x")
    assert "found a file" in refusal(model, tmp_path / "file", force=True)
    assert "cannot be written" in refusal(model, tmp_path / "file" / "out")
    assert_tidy(tmp_path)


def test_an_empty_folder_is_free(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(model, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").shards == tuple(SHARDS)


def test_parents_are_made_and_removed_again_on_failure(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(model, tmp_path / "a" / "b" / "out", prove=lambda copy: 1 // 0)
    assert names(tmp_path) == ["model"]
    run(model, tmp_path / "a" / "b" / "out")
    assert open_checkpoint(tmp_path / "a" / "b" / "out").tensors


def test_source_and_target_must_lie_apart(model: Path, tmp_path: Path) -> None:
    before = tree(model)
    link = tmp_path / "link"
    link.symlink_to(model)
    for force in (False, True):
        assert "is the checkpoint itself" in refusal(model, model, force=force)
        assert "is the checkpoint itself" in refusal(model, link, force=force)
        assert "is the checkpoint itself" in refusal(link, model, force=force)
        assert "inside the checkpoint" in refusal(model, model / "out", force=force)
        assert "inside the checkpoint" in refusal(model, link / "deep" / "out", force=force)
        assert "inside the checkpoint" in refusal(model, tmp_path / "x" / ".." / "model" / "out", force=force)
        assert "holds the checkpoint" in refusal(model, tmp_path, force=force)
        shard = model / "model-1-of-2.safetensors"
        assert "inside the checkpoint" in refusal(shard, model / "out", force=force)
        assert "is the checkpoint itself" in refusal(shard, model, force=force)
        assert "inside the checkpoint" in refusal(shard, shard, force=force)
        assert "holds the checkpoint" in refusal(shard, tmp_path, force=force)
        index = model / "model.safetensors.index.json"
        assert "inside the checkpoint" in refusal(index, model / "out", force=force)
    assert tree(model) == before


def test_a_target_that_holds_linked_files_of_the_source_is_refused(tmp_path: Path) -> None:
    store = write_checkpoint(tmp_path / "store", {"a": torch.ones(2)}, {})
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(store / "model.safetensors")
    assert "files it links to" in refusal(linked, store, force=True)
    assert torch.equal(open_checkpoint(store).read("a"), torch.ones(2))


def test_force_replaces_checkpoints_and_nothing_else(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = write_checkpoint(tmp_path / "out", {"old": torch.ones(2)}, {})
    (out / "stale.txt").write_text("x")
    run(model, out, force=True)
    assert sorted(tree(out)) == sorted(tree(model))
    for name in ("photos", "code"):
        other = tmp_path / name
        other.mkdir()
        (other / "config.json").write_text("{}")
        if name == "code":
            write_safetensors(other / "model.safetensors", {"a": torch.ones(1)})
            (other / ".git").mkdir()
        assert "remove it yourself" in refusal(model, other, force=True)
    monkeypatch.chdir(out)
    assert "does not replace it" in refusal(model, out, force=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out))
    assert "does not replace it" in refusal(model, out, force=True)
    assert_tidy(tmp_path)


def test_a_target_behind_a_link_is_replaced_where_it_lies(model: Path, tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "disk" / "real", {"old": torch.ones(2)}, {})
    (tmp_path / "out").symlink_to(real)
    run(model, tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink() and open_checkpoint(real).shards == tuple(SHARDS)


def test_a_full_disk_is_noticed_beforehand(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000))
    touched: list[str] = []
    message = refusal(model, tmp_path / "a" / "out", transform=lambda info, block: touched.append(info.name))
    assert "free bytes" in message and "5,000" in message and not touched
    assert names(tmp_path) == ["model"]


def test_a_disk_that_fills_up_is_one_clear_line(model: Path, tmp_path: Path) -> None:
    """/dev/full fails every write with ENOSPC, as a full disk does."""
    original = writer._Writer._new

    def full(self: Any, name: str) -> Any:
        original(self, name).close()
        return Path("/dev/full").open("wb", buffering=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer._Writer, "_new", full)
        assert "No space left" in refusal(model, tmp_path / "out")
    assert names(tmp_path) == ["model"]


def test_a_disk_that_fills_up_under_one_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "model", {"w": torch.ones(4096, 4096)})
    original, calls = os.pwrite, itertools.count()

    def full(*arguments: Any) -> int:
        if next(calls) == 21:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    assert "No space left" in refusal(model, tmp_path / "out")
    assert names(tmp_path) == ["model"]


def test_no_thread_writes_on_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "model", {"w": torch.ones(4096, 4096)})
    original, ends = os.pwrite, []

    def slow(*arguments: Any) -> int:
        time.sleep(0.01)
        written = original(*arguments)
        ends.append(time.monotonic())
        return written

    def interrupt(stage: str, done: int, total: int, unit: str) -> None:
        if done > 1 << 22:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", slow)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", same, progress=interrupt)
    over = time.monotonic()
    assert names(tmp_path) == ["model"]
    time.sleep(0.1)
    assert ends and max(ends) < over and len(ends) < 64


def test_a_parent_that_cannot_be_written_is_refused(model: Path) -> None:
    if Path("/proc/self").exists():
        assert "/proc/out: cannot be written" in refusal(model, Path("/proc/out"))
    assert "mount point" in refusal(model, Path("/dev"), force=True)


def test_a_source_that_changes_is_noticed(model: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(model)
    write_safetensors(model / "model-2-of-2.safetensors", {"other": torch.ones(5)})
    with pytest.raises(CheckpointError, match="changed while"):
        rewrite(opened, tmp_path / "out", same, extra={}, force=False, prove=lambda copy: None, progress=silent)

    def cut(info: TensorInfo, block: RowBlock) -> torch.Tensor:
        os.truncate(model / "model-1-of-2.safetensors", 400)
        return block.values

    with pytest.raises(CheckpointError, match="changed while"):
        run(write_checkpoint(model, SHARDS), tmp_path / "out", cut)
    assert names(tmp_path) == ["model"]


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
    before = tree(out)
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
        run(model, out, **options)
    assert hidden and set(hidden) == {1}  # other threads may call it before the first error is seen
    assert tree(out) == before and out.exists() == old
    assert_tidy(tmp_path)


def test_an_exchange_the_file_system_cannot_do_falls_back(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = write_checkpoint(tmp_path / "out", {"old": torch.ones(2)}, {})
    before = tree(out)
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    rename = Path.rename

    def fail_second(self: Path, target: Path) -> Path:
        if ".vrscope-new-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_second)
        assert "Input/output error" in refusal(model, out, force=True)
    assert tree(out) == before
    assert_tidy(tmp_path)
    run(model, out, force=True)
    assert open_checkpoint(out).shards == tuple(SHARDS)
    assert_tidy(tmp_path)


def test_the_exchange_is_one_step_here(tmp_path: Path) -> None:
    if os.uname().sysname != "Linux":
        pytest.skip("renameat2 is Linux's")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert staging._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
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
    run(model, tmp_path / "out", extra={"p.json": "{}"})
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
    message = refusal(model, tmp_path / "out", transform=lambda info, block: read.append(info.name))
    assert "--force" in message and not read  # the old one was put back first
    assert list(open_checkpoint(tmp_path / "out").tensors) == ["old"]
    assert [folder.exists() for folder in (gone, old, alive, elsewhere, other)] == [False, False, True, True, True]


def test_a_second_run_meanwhile_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"):
        run(model, out, prove=lambda copy: run(model, out, same))
    assert torch.equal(open_checkpoint(out).read("a.bias"), torch.arange(7.0))
    assert_tidy(tmp_path)
