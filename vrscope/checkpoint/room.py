"""Memory for one block after the other: what every thread would otherwise take from the system anew for each."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Room(threading.local):
    """Memory that each thread is given again and again: a block lives until its thread asks for the next."""

    def __init__(self) -> None:
        self._held: NDArray[np.uint8] | None = None

    def __call__(self, size_bytes: int) -> NDArray[np.uint8]:
        """Return memory of shape `(size_bytes,)`, the same as last time if that was large enough."""
        if self._held is None or self._held.size < size_bytes:
            self._held = new_room(size_bytes)
        return self._held[:size_bytes]


def new_room(size_bytes: int) -> NDArray[np.uint8]:
    """Return new memory of shape `(size_bytes,)`."""
    import numpy as np

    return np.empty(size_bytes, np.uint8)
