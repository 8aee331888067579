"""The temporary file of reference outputs: what goes in comes out, nothing is left behind, a full disk is one line."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from vrscope.errors import OutputError
from vrscope.quant.spool import Spool


def test_matrices_come_back_in_any_order_and_bit_for_bit() -> None:
    matrices = [torch.randn(3, 5), torch.randn(4, 2).T, torch.full((1, 7), float("nan")), torch.randn(6, 5)[::2]]
    with Spool() as spool:
        for matrix in matrices:
            spool.append(matrix)
        assert len(spool) == 4
        for index in (2, 0, 3, 1, 0):
            assert torch.equal(spool.read(index).view(torch.int32), matrices[index].contiguous().view(torch.int32))
        spool.append(matrices[0])  # after a read in the middle
        assert [spool.read(index).shape for index in range(5)] == [matrix.shape for matrix in [*matrices, matrices[0]]]
        assert torch.equal(spool.read(4), matrices[0]) and torch.equal(spool.read(1), matrices[1])


def test_places_and_memory_are_used_again() -> None:
    matrices = [torch.randn(3, 5) for _ in range(5)] + [torch.randn(5, 3), torch.randn(2, 5)]
    with Spool() as spool:
        for matrix in matrices[:3]:
            spool.append(matrix)
        spool.drop(1)
        spool.append(matrices[6])  # of another size
        spool.append(matrices[5])  # of the same size
        spool.append(matrices[3])
        assert os.fstat(spool.file.fileno()).st_size == 4 * (4 * 15 + 10)
        for index, matrix in ((0, 0), (2, 2), (3, 6), (4, 5), (5, 3)):
            assert torch.equal(spool.read(index), matrices[matrix])
        memory = spool.read(0)
        assert spool.read(2, memory) is memory and torch.equal(memory, matrices[2])
        assert torch.equal(spool.read(4, memory), matrices[5]) and torch.equal(memory, matrices[2])  # of another shape


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Spool() as spool:
        spool.append(torch.ones(100, 100))
        assert os.fstat(spool.file.fileno()).st_size == 40_000
        assert list(tmp_path.iterdir()) == []
    assert spool.file.closed


def test_a_full_disk_is_one_line() -> None:
    with Spool() as spool, Path("/dev/full").open("r+b", buffering=0) as full:
        spool.file.close()
        spool.file = full
        with pytest.raises(OutputError, match=r"expected 4 MB more .* \(No space left on device\).*TMPDIR") as caught:
            spool.append(torch.ones(1000, 1000))
        assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
        assert len(spool) == 0


def test_a_file_that_was_cut_is_one_line() -> None:
    with Spool() as spool:
        spool.append(torch.ones(10, 10))
        spool.file.truncate(100)
        with pytest.raises(OutputError, match="found fewer"):
            spool.read(0)
