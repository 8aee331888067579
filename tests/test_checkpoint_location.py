"""Which files make up a checkpoint, and one clear line for everything that is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from builders import safetensors_bytes, write_checkpoint, write_safetensors

from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import CheckpointError

WEIGHTS = safetensors_bytes({"a": torch.ones(2)})


def _refusal(model: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert message.isprintable() and message.endswith((".", ")."))
    return message


def _folder(tmp_path: Path, **files: bytes | str) -> Path:
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".").replace("SLASH", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


@pytest.mark.parametrize("name", ["gone", "gone/deeper/still", "gone.safetensors", "x\0y", "n" * 5000])
def test_what_does_not_exist_is_not_found(tmp_path: Path, name: str) -> None:
    assert "not found" in _refusal(tmp_path / name)
    assert "not found" in _refusal(f"{tmp_path}/{name}")


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"a": torch.ones(1)})
    monkeypatch.chdir(tmp_path)
    assert "empty name" in _refusal("")
    assert open_checkpoint(".").shards == ("model.safetensors",)


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "m", {"a": torch.ones(1)})
    assert open_checkpoint("~/m").folder == tmp_path / "m"


def test_a_revision_belongs_to_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to a hub id"):
        open_checkpoint(write_checkpoint(tmp_path / "m", {"a": torch.ones(1)}), revision="main")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    fifo = tmp_path / f"pytorch_model.{suffix}"
    os.mkfifo(fifo)  # opening it to read would hang: proof that nobody does
    for model in (tmp_path, fifo):
        message = _refusal(model)
        assert fifo.name in message and "never opened" in message and "save_pretrained" in message


def test_an_index_of_pickles_is_refused(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}})
    folder = _folder(tmp_path, pytorch_model__bin__index__json=index)
    assert "never opened" in _refusal(folder)
    assert "never opened" in _refusal(folder / "pytorch_model.bin.index.json")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "pytorch_model-1.bin" in _refusal(folder) and "never opened" in _refusal(folder)


@pytest.mark.parametrize("suffix", ["gguf", "h5", "onnx", "msgpack"])
def test_formats_of_other_programs_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"x")
    for model in (tmp_path, path):
        message = _refusal(model)
        assert f"found .{suffix}" in message and "expected safetensors" in message


def test_folders_without_weights_and_other_files_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, config__json="{}", notes__txt="x", training_args__bin="x")
    assert "expected safetensors weights, found none" in _refusal(folder)
    assert "not a checkpoint" in _refusal(folder / "notes.txt")
    assert "Give the folder" in _refusal(folder / "config.json")
    os.mkfifo(folder / "model.safetensors")
    assert "not a checkpoint" in _refusal(folder)
    assert "not a checkpoint" in _refusal("/dev/null")


def test_a_dangling_link_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    assert "not found" in _refusal(tmp_path)


def test_the_weights_are_chosen_as_transformers_chooses(tmp_path: Path) -> None:
    folder = _folder(tmp_path, adapter__safetensors=WEIGHTS)
    assert open_checkpoint(folder).shards == ("adapter.safetensors",)  # the only one
    _folder(tmp_path, consolidated__safetensors=WEIGHTS)
    message = _refusal(folder)
    assert "adapter.safetensors, consolidated.safetensors" in message and "missing index" in message
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "adapter.safetensors"}}))
    assert open_checkpoint(folder).index == "x.safetensors.index.json"  # the only index
    (folder / "y.safetensors.index.json").write_text("{}")
    assert "x.safetensors.index.json, y.safetensors.index.json" in _refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "consolidated.safetensors"}}))
    assert open_checkpoint(folder).shards == ("consolidated.safetensors",)  # model.* goes before others
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    assert open_checkpoint(folder).shards == ("model.safetensors",)  # and one file before an index


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{nonsense", ["expected JSON"]),
        ("[]", ["JSON object", "list"]),
        ("{}", ["weight_map", "none"]),
        ('{"weight_map": {}}', ["weight_map", "none"]),
        ('{"weight_map": ["a"]}', ["weight_map", "none"]),
        ('{"weight_map": {"a": 3}}', ["a:", "not a file name"]),
        ('{"weight_map": {"a": ""}}', ["a:", "not a file name"]),
        ('{"weight_map": {"a": "s.safetensors", "a": "s.safetensors"}}', ["key a occurs twice"]),
        ('{"weight_map": {"a": "/etc/passwd"}}', ["/etc/passwd", "outside the folder"]),
        ('{"weight_map": {"a": "../s.safetensors"}}', ["../s.safetensors", "outside the folder"]),
        ('{"weight_map": {"a": "x/../../s.safetensors"}}', ["outside the folder"]),
        ('{"weight_map": {"a": "..\\\\s.safetensors"}}', ["no file name may have"]),
        ('{"weight_map": {"a": "s\\u0000.safetensors"}}', ["s\\x00.safetensors", "no file name may have"]),
        ('{"weight_map": {"a": "model.h5"}}', ["model.h5", "does not read"]),
        ('{"weight_map": {"a": "config.json"}}', ["config.json", ".safetensors shards"]),
        ('{"weight_map": {"a": "gone.safetensors"}}', ["gone.safetensors", "missing"]),
        ('{"weight_map": {"a": "folder.safetensors"}}', ["folder.safetensors", "missing"]),
        ('{"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}', ["b: expected in s.safetensors", "no shard"]),
        (
            '{"weight_map": {"a": "t.safetensors", "c": "s.safetensors"}}',
            ["expected in t.safetensors", "it is in s.safetensors"],
        ),
    ],
)
def test_an_index_that_lies_is_named(tmp_path: Path, content: str, words: list[str]) -> None:
    folder = _folder(tmp_path / "m", s__safetensors=WEIGHTS, config__json="{}")
    write_safetensors(folder / "t.safetensors", {"c": torch.ones(1)})
    (folder / "folder.safetensors").mkdir()
    (tmp_path / "s.safetensors").write_bytes(WEIGHTS)
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    for model in (folder, index):
        message = _refusal(model)
        for word in words:
            assert word in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, s__safetensors=WEIGHTS, t__safetensors=WEIGHTS)
    write_safetensors(folder / "u.safetensors", {"b": torch.ones(1)})
    index = {"weight_map": {"a": "s.safetensors", "b": "t.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = _refusal(folder)
    assert message.startswith("a: expected in one shard, found in s.safetensors and t.safetensors")


def test_tensors_an_index_forgot_are_still_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "s.safetensors", {"a": torch.ones(1), "forgotten": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "s.safetensors"}}))
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "forgotten"}


def test_shards_may_lie_in_a_subfolder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"part/s.safetensors": {"a": torch.ones(1)}})
    assert open_checkpoint(tmp_path).tensors["a"].shard == "part/s.safetensors"


@pytest.mark.parametrize("content", ["{", "[1]", "", "\ufeff{}", '"x"'])
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    folder = _folder(tmp_path, model__safetensors=WEIGHTS, config__json=content)
    message = _refusal(folder)
    assert "config.json" in message and "JSON" in message


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    message = _refusal(tmp_path)
    assert "cannot be read" in message and "Permission denied" in message


def test_names_are_escaped_in_messages(tmp_path: Path) -> None:
    folder = tmp_path / "a\nb\x1b[2J"
    folder.mkdir()
    assert "a\\nb\\x1b[2J" in _refusal(folder)
