"""SIGKILL during a rewrite: the place holds nothing (or the old checkpoint), or the complete new one; never a part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import write_checkpoint

from vrscope.checkpoint.source import open_checkpoint
from vrscope.checkpoint.writer import rewrite
from vrscope.progress import silent

NAMES = [f"model-{number}-of-3.safetensors" for number in (1, 2, 3)]
SHARDS = {name: {f"w{n}.{k}": torch.full((64, 32), n + k / 4) for k in range(4)} for n, name in enumerate(NAMES)}

# Each child rewrites MODEL to its own folder and kills itself with SIGKILL at one point (a function about to be
# called, or just returned), or is killed by its parent after so many seconds of a slow transform.
SCRIPT = """
import itertools, json, os, shutil, signal, sys, time
from pathlib import Path
import torch
from vrscope.checkpoint import staging, writer
from vrscope.checkpoint.source import open_checkpoint
from vrscope.progress import silent

torch.set_num_threads(1)
model, parent, force, points = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1", json.loads(sys.argv[4])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(owner, name, call, after):
    original, calls = getattr(owner, name), itertools.count(1)
    def wrapped(*arguments, **options):
        mine = next(calls)  # files are flushed on a thread of their own
        if mine == call and not after:
            die()
        result = original(*arguments, **options)
        if mine == call and after:
            die()
        return result
    setattr(owner, name, wrapped)

def child(point, out):
    seen, prove, pause = [0], (lambda copy: None), 0.0
    deadly_block = point.get("block", 0)
    if "sleep" in point:
        pause = 0.02
    elif point.get("prove"):
        prove = die
    elif "function" in point:
        owner = {"staging": staging, "os": os, "shutil": shutil, "Path": Path}[point["owner"]]
        deadly(owner, point["function"], point["call"], point["after"])
    def transform(info, block):
        seen[0] += 1
        if seen[0] == deadly_block:
            die()
        time.sleep(pause)
        return block.values * 2
    writer.rewrite(open_checkpoint(model), out, transform, extra={"vrscope_plan.json": "{}"}, force=force,
                   prove=prove, progress=silent)

for number, point in enumerate(points):
    out = parent / str(number) / "out"
    process = os.fork()
    if process == 0:
        child(point, out)
        os._exit(0)
    if "sleep" in point:
        time.sleep(point["sleep"])
        os.kill(process, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def _call(owner: str, function: str, call: int = 1, after: bool = False) -> dict[str, object]:
    return {"owner": owner, "function": function, "call": call, "after": after}


# Points that leave the place as it was, and points that leave it new.
BEFORE = [{"block": number} for number in (1, 4, 5, 12)] + [
    *(_call("os", "fsync", number, after) for number in (1, 3, 6) for after in (False, True)),
    {"prove": True},
    _call("staging", "_publish"),
]
AFTER = [_call("staging", "_publish", after=True), _call("shutil", "rmtree")]
STEP = {
    False: ([_call("Path", "rename")], [_call("Path", "rename", after=True)]),
    True: ([_call("staging", "_exchange")], [_call("staging", "_exchange", after=True)]),
}
TIMED = [{"sleep": 0.03 + 0.05 * number} for number in range(8)]


@pytest.mark.parametrize("force", [False, True], ids=["new", "over an old one"])
def test_killed_anywhere_the_place_is_whole(tmp_path: Path, force: bool) -> None:
    model = write_checkpoint(tmp_path / "model", SHARDS, {"model_type": "x"})
    (model / "tokenizer.json").write_text("{}")
    before, after = STEP[force]
    points = [*BEFORE, *before, *AFTER, *after, *TIMED]
    for number in range(len(points)):
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        if force:
            write_checkpoint(tmp_path / "runs" / str(number) / "out", {"old": torch.ones(2)}, {})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, tmp_path / "runs", "01"[force], json.dumps(points)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = [int(line) for line in done.stdout.split()]
    assert codes[: -len(TIMED)] == [-9] * (len(points) - len(TIMED)), done.stderr  # every point was reached
    assert set(codes) <= {-9, 0} and -9 in codes[-len(TIMED) :]
    states = [_state(tmp_path / "runs" / str(number) / "out", force) for number in range(len(points))]
    count = len(BEFORE) + len(before)
    assert states[:count] == ["as before"] * count
    assert states[count : -len(TIMED)] == ["new"] * (len(points) - len(TIMED) - count)
    _assert_leftovers_go(model, tmp_path / "runs" / "3", force)


def _state(out: Path, force: bool) -> str:
    """Return "as before" or "new", and fail on anything in between."""
    if not out.exists():
        assert not force, "the old checkpoint is gone"
        return "as before"
    opened = open_checkpoint(out)
    if "old" in opened.tensors:
        assert force and sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
        return "as before"
    names = [*NAMES, "config.json", "model.safetensors.index.json", "tokenizer.json", "vrscope_plan.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for tensors in SHARDS.values():
        for name, tensor in tensors.items():
            assert torch.equal(opened.read(name), tensor * 2)
    return "new"


def _assert_leftovers_go(model: Path, folder: Path, force: bool) -> None:
    """The next run cleans up what the killed one left."""
    assert [path.name for path in folder.iterdir() if path.name.startswith(".out.vrscope-new-")]
    rewrite(
        open_checkpoint(model), folder / "out", lambda info, block: block.values,
        extra={}, force=force, prove=lambda copy: None, progress=silent,
    )  # fmt: skip
    assert [path.name for path in folder.iterdir()] == ["out"]
