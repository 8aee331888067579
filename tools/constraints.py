"""Print constraints.txt for what is installed: every package that vrscope and its extras need, at the tested version.

Packages whose tested version needs a newer Python than vrscope does are bound only there, so that the oldest Python
still finds a version of its own. Run through `make constraints`.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution

_OLDEST = (3, 10)
_LATER = re.compile(r">=\s*3\.(\d+)")


def needed(root: str) -> set[str]:
    """Return the names of all installed packages that `root` needs, extras of the root included."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # needed on another platform or Python
            continue
        found.add(name)
        for line in requirements:
            package = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower()
            if package not in found and ("extra ==" not in line or name == root):
                waiting.append(package)
    return found - {root}


def constraint(name: str) -> str:
    """Return the line that binds one package to its installed version, without a local build label."""
    package = distribution(name)
    line = f"{name}=={package.version.partition('+')[0]}"
    later = _LATER.search(package.metadata.get("Requires-Python") or "")
    if later and int(later[1]) > _OLDEST[1]:
        line += f'; python_version >= "3.{later[1]}"'
    return line


if __name__ == "__main__":
    print("# The versions that the tests ran with. Written by `make constraints`.")
    print("\n".join(sorted(map(constraint, needed("vrscope")))))
