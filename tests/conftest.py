"""Settings of every test run, and the two real checkpoints that tests marked `real` read."""

from __future__ import annotations

import os

# Before anything imports the libraries that read them: no network, and one thread per test process.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_REPOSITORY = Path(__file__).resolve().parents[1]
_FETCH_SECONDS = 600


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M: Llama type, bf16, tied head."""
    return _real_checkpoint("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: BERT type, f32, names without a prefix."""
    return _real_checkpoint("minilm")


def _real_checkpoint(name: str) -> Path:
    """Return the folder of a real checkpoint, fetched by an optional script beside the repository, or skip."""
    cache = Path(os.environ.get("VRSCOPE_TEST_MODELS") or Path.home() / ".cache" / "vrscope-models")
    folder = cache / name
    if (folder / "model.safetensors").is_file():
        return folder
    script = _REPOSITORY.parent / "shared" / "models" / "get.py"
    if not script.is_file():
        pytest.skip(f"{folder} is absent and there is no script to fetch it; set VRSCOPE_TEST_MODELS")
    return _fetch(script, name, folder)


def _fetch(script: Path, name: str, folder: Path) -> Path:
    """Run the fetch script; one test process at a time, and the folder appears only when it is complete."""
    staging = folder.with_name(f"{name}.part")
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        shutil.rmtree(staging, ignore_errors=True)
        try:
            done = subprocess.run(
                [sys.executable, script, name, staging],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_FETCH_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} could not be fetched within {_FETCH_SECONDS} s")
        if done.returncode != 0 or not (staging / "model.safetensors").is_file():
            pytest.skip(f"{name} could not be fetched: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
        staging.rename(folder)
    return folder
