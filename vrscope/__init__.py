"""vrscope: analyze a pretrained checkpoint, rescale it without changing its function, measure quantization damage.

Importing the package loads nothing heavy; each name below is fetched from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vrscope.api import analyze, measure, plan, recipe, rescale, run, sensitivity, verify
    from vrscope.errors import VrscopeError
    from vrscope.rescale.plan import RescalePlan
    from vrscope.tables import Report

__version__ = "0.1.0"

__all__ = [
    "Report",
    "RescalePlan",
    "VrscopeError",
    "__version__",
    "analyze",
    "measure",
    "plan",
    "recipe",
    "rescale",
    "run",
    "sensitivity",
    "verify",
]

_HOME = {
    "Report": "vrscope.tables",
    "RescalePlan": "vrscope.rescale.plan",
    "VrscopeError": "vrscope.errors",
    "analyze": "vrscope.api",
    "measure": "vrscope.api",
    "plan": "vrscope.api",
    "recipe": "vrscope.api",
    "rescale": "vrscope.api",
    "run": "vrscope.api",
    "sensitivity": "vrscope.api",
    "verify": "vrscope.api",
}

# The folder `rescale` and the function share a name. Python binds a folder once, when it is first imported: import it
# here and drop that binding, so that no later import can put it over the function. `from vrscope.rescale.plan import
# ...` works all the same.
import_module("vrscope.rescale")
globals().pop("rescale", None)


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module at first use."""
    if name not in _HOME:
        message = f"module 'vrscope' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted(__all__)
