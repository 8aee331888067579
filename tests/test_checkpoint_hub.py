"""Hub checkpoints, against a real HTTP server on this machine that speaks the part of the hub's API that is used."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from builders import safetensors_bytes

from vrscope.checkpoint.hub import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = safetensors_bytes({"a": torch.arange(6.0).view(2, 3)})
OTHER = safetensors_bytes({"b": torch.ones(4)})
INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
CONFIG = b'{"model_type": "llama"}'
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "owner/single": {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
        "consolidated.safetensors": OTHER,
        "pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"onnx",
        "onnx/config.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "README.md": b"text",
        "image.png": b"png",
    },
    "owner/sharded": {
        "config.json": CONFIG,
        "model.safetensors.index.json": INDEX,
        "model-1-of-2.safetensors": WEIGHTS,
        "model-2-of-2.safetensors": OTHER,
        "model-3-of-2.safetensors": OTHER,
        "pytorch_model.bin.index.json": b"{}",
    },
    "owner/pickle": {"config.json": CONFIG, "pytorch_model.bin": b"pickle"},
    "owner/lost-shard": {"model.safetensors.index.json": INDEX, "model-1-of-2.safetensors": WEIGHTS},
    "owner/escape": {
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../evil.safetensors"}}).encode()
    },
    "owner/broken": {"config.json": CONFIG, "model.safetensors": WEIGHTS[:-3]},
    "bare": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
}
SCRIPT = """
import json, sys
from vrscope.checkpoint.source import open_checkpoint
from vrscope.errors import CheckpointError
for name, revision in json.loads(sys.argv[1]):
    try:
        opened = open_checkpoint(name, revision)
        files = sorted(str(p.relative_to(opened.folder)) for p in opened.folder.rglob("*") if p.is_file())
        print(json.dumps({"name": opened.name, "tensors": sorted(opened.tensors), "files": files,
                          "index": opened.index, "config": opened.config, "folder": str(opened.folder),
                          "sum": float(opened.read("a").sum())}))
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
"""


class _Hub(BaseHTTPRequestHandler):
    """Answers for the repositories above; notes every path asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        if body:
            self.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[: 2 if parts[0] == "owner" else 1])
        rest = parts[len(name.split("/")) :]
        files = REPOSITORIES.get(name)
        if name == "owner/gated":
            return self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if name == "owner/down":
            return self._send(500, b"{}", body, {})
        if files is None:
            return self._send(401, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("api/models/") and "tree" in rest:
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": _oid(data)} for file, data in files.items()
            ]
            return self._send(200, json.dumps(tree).encode(), body, {})
        if path.startswith("api/models/"):
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return self._send(200, json.dumps(info).encode(), body, {})
        data = files["/".join(rest[2:])]
        return self._send(200, data, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"'})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of the server, and the list of paths whose content was asked for."""
    handler = type("Handler", (_Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    server.shutdown()
    server.server_close()
    thread.join(10)


def _open(home: Path, endpoint: str, *names: tuple[str, str | None], offline: bool = False) -> list[dict]:
    """Open hub checkpoints in a process of their own, as the client reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names)],
        env=environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_the_needed_files_are_fetched(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    endpoint, asked = hub
    home = tmp_path / "home"
    single, sharded, bare = _open(home, endpoint, ("owner/single", None), ("owner/sharded", "main"), ("bare", None))
    assert single["name"] == "owner/single"
    assert single["tensors"] == ["a"] and single["sum"] == 15.0 and single["config"] == {"model_type": "llama"}
    assert single["files"] == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert Path(single["folder"]).is_relative_to(home)
    assert sharded["tensors"] == ["a", "b"] and sharded["index"] == "model.safetensors.index.json"
    assert sharded["files"] == [
        "config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert bare["tensors"] == ["a"]
    assert not [path for path in asked if path.endswith((".bin", ".onnx", ".png"))]

    again = _open(
        home, endpoint, ("owner/single", None), ("owner/sharded", COMMIT), ("owner/never", None), offline=True
    )
    assert again[0] == single
    assert again[1]["tensors"] == ["a", "b"]
    assert "HF_HUB_OFFLINE" in again[2]["error"] and "not found" in again[2]["error"]

    # The server is gone: what is in the cache still opens.
    assert _open(home, "http://127.0.0.1:9", ("owner/single", None))[0] == single


def test_every_refusal_is_one_clear_line(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    endpoint, asked = hub
    cases = {
        ("owner/nobody", None): ["owner/nobody", "not found", "hub has no such public model"],
        ("owner/gated", None): ["owner/gated", "gated", "HF_TOKEN"],
        ("owner/single", "v9"): ["v9", "no such revision"],
        ("owner/pickle", None): ["owner/pickle", "pytorch_model.bin", "never opened", "save_pretrained"],
        ("owner/lost-shard", None): ["model-2-of-2.safetensors", "missing"],
        ("owner/escape", None): ["../../evil.safetensors", "outside the folder"],
        ("owner/broken", None): ["model.safetensors", "expected", "bytes"],
        ("bad--id/x", None): ["bad--id/x", "not found"],
        ("owner/down", None): ["owner/down", "500"],
    }
    answers = _open(tmp_path / "home", endpoint, *cases)
    for answer, (case, words) in zip(answers, cases.items(), strict=True):
        assert "error" in answer, case
        assert "\n" not in answer["error"]
        for word in words:
            assert word in answer["error"], case
    assert not [path for path in asked if path.endswith(".bin")]


def test_a_path_never_reaches_the_hub(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    endpoint, asked = hub
    names = [
        "./owner/single",
        "/owner/single",
        "a/b/c",
        "weights.safetensors",
        "owner/x.bin",
        "../x",
        "~/x",
        "x\\y",
        "",
    ]
    for answer in _open(tmp_path / "home", endpoint, *((name, None) for name in names)):
        assert "hub id" in answer["error"]
    assert asked == []


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("gpt2", True), ("owner/name", True), ("Qwen/Qwen2.5-0.5B", True), ("a/b/c", False), ("./a", False),
     ("a/", False), ("/a", False), ("x.GGUF", False), ("a b", False), ("a\n", False), ("a/.b", False)],
)  # fmt: skip
def test_hub_ids_are_told_from_paths(name: str, is_id: bool) -> None:
    assert is_hub_id(name) is is_id
