"""The ten lines that people write: `python benchmarks/naive.py FOLDER` prints four statistics of every tensor."""

import sys
from pathlib import Path

from safetensors import safe_open

for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            x = file.get_tensor(name).float()
            z = (x - x.mean()) / x.std()
            print(name, x.mean().item(), x.std().item(), (z**4).mean().item() - 3, x.abs().max().item())
