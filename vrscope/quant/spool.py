"""Outputs of the reference model, kept on disk so that memory does not grow with tokens times vocabulary."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from vrscope.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Spool:
    """A list of float32 matrices in a temporary file that has no name and vanishes with the process.

    Attributes
    ----------
    file
        Plain positioned reads and writes: a full disk is then an error, where a memory map would end the process.
    shapes, starts
        Of each matrix, its shape and first byte.
    free
        First bytes of matrices that were dropped, by their size in bytes.
    """

    file: IO[bytes] = field(default_factory=lambda: tempfile.TemporaryFile(prefix="vrscope-"))  # noqa: SIM115
    shapes: list[tuple[int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    free: dict[int, list[int]] = field(default_factory=dict)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *reason: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self.shapes)

    def append(self, matrix: Tensor) -> None:
        """Write a float32 matrix of any device, in the place of a dropped one of its size or at the end.

        Raises
        ------
        OutputError
            If the disk is full.
        """
        rows, columns = matrix.shape
        try:
            places = self.free.get(4 * rows * columns)
            start = self.file.seek(places.pop()) if places else self.file.seek(0, 2)
            self.file.write(matrix.detach().cpu().contiguous().numpy().data)
            self.file.flush()
        except OSError as error:
            message = (
                f"{tempfile.gettempdir()}: expected {4 * rows * columns / 1e6:,.0f} MB more for the outputs of the "
                f"original model, found none ({error.strerror or error}). Free some, set TMPDIR, or use fewer --tokens."
            )
            raise OutputError(message) from error
        self.shapes.append((rows, columns))
        self.starts.append(start)

    def drop(self, index: int) -> None:
        """Let the place of matrix number `index`, which is not read any more, be used again; numbers stay."""
        rows, columns = self.shapes[index]
        self.free.setdefault(4 * rows * columns, []).append(self.starts[index])

    def read(self, index: int, into: Tensor | None = None) -> Tensor:
        """Return matrix number `index`, float32, in memory: that of a contiguous `into`, if it has the same shape."""
        import torch

        fits = into is not None and into.shape == self.shapes[index]
        matrix = into if into is not None and fits else torch.empty(self.shapes[index], dtype=torch.float32)
        self.file.seek(self.starts[index])
        view = matrix.numpy().data.cast("B")
        if self.file.readinto(view) != len(view):  # type: ignore[attr-defined]
            message = f"{tempfile.gettempdir()}: expected the outputs of the original model, found fewer. Run again."
            raise OutputError(message)
        return matrix
