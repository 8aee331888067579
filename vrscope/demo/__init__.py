"""The small trained model, and the sample text, that ship with the package.

`vrscope demo`, the notebook and the tests run on the model; every measurement without a text of its own uses the text.
"""

from __future__ import annotations

from pathlib import Path


def demo_model() -> Path:
    """Return the folder of the demo model: configuration, tokenizer, `model.safetensors` in bfloat16, `MODEL.md`."""
    return Path(__file__).parent / "model"


def sample_text() -> str:
    """Return the sample text: about 4,000 words of prose, dialogue, code and tables, written for this project."""
    return (Path(__file__).parent / "sample.txt").read_text(encoding="utf-8")
