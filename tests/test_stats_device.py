"""Statistics by torch against those of the compiled loops; on the CPU always, and on CUDA where there is one.

The code is the same on both devices but for `_stream` and `_copied`, and uses only operations whose result is defined
to the last bit, so what holds on torch's CPU holds on a GPU.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stats_oracle import DTYPES, checkpoint_of, weights

from vrscope.arch.roles import TensorRole
from vrscope.checkpoint.source import Checkpoint
from vrscope.errors import ModelError
from vrscope.executors import Executor, Serial, Threads
from vrscope.stats import device as torch_path
from vrscope.stats import kernels, measure
from vrscope.stats.device import summarize_block_on
from vrscope.stats.matrix import matrix_view
from vrscope.stats.measure import StatOptions, measure_tensors, role_of
from vrscope.stats.summary import summarize_block

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use, and there is none")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]
SHAPES = [(33, 700), (23100,), (3, 11, 700), (23100, 1), (1, 23100), (7, 3, 1100), ()]
STACKED = TensorRole("a", "a", None, "linear", ("x", "out", "in"))


def hard(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return weights with NaN, infinity, zeros, subnormal numbers, and a stretch in which nothing is finite."""
    values = weights((33, 700), "F64").double() * 0.1
    values[0, :50], values[1, 3], values[2, 7] = 0.0, torch.nan, -torch.inf
    values[3:16] = torch.nan
    values[20, :10] = 1e-40
    values[21, :9], values[22, :9] = 5e-324, -1.7e305  # the ends of F64
    values[23, :300] *= 2.0**-20  # subnormal in F16
    values[24] += 1000.0
    flat = values.to(DTYPES[dtype]).reshape(-1)
    return flat.reshape(shape) if shape else flat[-1]


def table_on(
    device: str,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    block_bytes: int = 30_000,
    executor: Executor = Threads(2),  # noqa: B008
) -> pd.DataFrame:
    """Return the table of statistics by torch on a device."""
    with monkeypatch.context() as patched:
        patched.setattr(measure, "summarize_block_on", lambda given, *rest: summarize_block_on(device, *rest))
        options = StatOptions(device="cuda", block_bytes=block_bytes)
        return measure_tensors(checkpoint, {"stacked": STACKED}, options=options, executor=executor)


def assert_same_table(found: pd.DataFrame, expected: pd.DataFrame, rtol: float) -> None:
    """Compare all statistics; those that cancel to about 0 relative to the spread."""
    around_zero = {"mean": expected["std"].fillna(0), "skewness": 1.0, "kurtosis_excess": 1.0}
    for name in expected:
        if name in around_zero:
            error = (found[name] - expected[name]).abs()
            allowed = rtol * (expected[name].abs() + around_zero[name])
            assert (found[name].isna() == expected[name].isna()).all(), name
            assert not (error > allowed).any(), name
        else:
            pd.testing.assert_series_equal(found[name], expected[name], check_exact=False, rtol=rtol, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_block_contributes_the_same(tmp_path: Path, device: str, dtype: str, shape: tuple[int, ...]) -> None:
    checkpoint = checkpoint_of(tmp_path, a=hard(dtype, shape))
    info = checkpoint.tensors["a"]
    view = matrix_view(info, STACKED if len(shape) == 3 else role_of({}, info))
    for place in checkpoint.block_places("a", 20_000 * info.size_bytes // info.numel):
        block = checkpoint.read_stored(place)
        ours, theirs = summarize_block_on(device, info, view, block), summarize_block(info, view, block)
        for name in ("patterns", "row_top", "column_top", "head", "tail"):
            found, expected = getattr(ours, name), getattr(theirs, name)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            np.testing.assert_array_equal(found, expected)
        assert ours.row == theirs.row and ours.chunks.shape == theirs.chunks.shape
        counted = [kernels.COUNT, kernels.EXPONENT, kernels.ABSMAX, kernels.ZEROS, kernels.NANS, kernels.INFS]
        np.testing.assert_array_equal(ours.chunks[:, counted], theirs.chunks[:, counted])
        np.testing.assert_allclose(ours.chunks, theirs.chunks, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_the_table_is_that_of_the_cpu(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"plain": (40, 300), "vector": (10_001,), "column": (9000, 1), "stacked": (3, 50, 70), "empty": (0, 5)}
    tensors = {
        f"{dtype}.{name}" if name != "stacked" else name: weights(shape, dtype) * 3
        for dtype in ("F64", "F32", "F16", "BF16")
        for name, shape in shapes.items()
    }
    tensors |= {f"{dtype}.hard": hard(dtype, (33, 700)) for dtype in DTYPES}
    tensors |= {f"{dtype}.far": weights((50, 300), dtype, shift=1000.0) for dtype in ("F64", "F32", "F16", "BF16")}
    tensors["constant"] = torch.full((10_000,), 0.1)
    tensors["tiny"] = torch.full((5000,), 1e-44) * torch.arange(5000).remainder(7)
    tensors["scalar"], tensors["void"], tensors["whole"] = torch.tensor(2.5), torch.zeros(0), torch.arange(9)
    tensors["lost"] = torch.full((5000,), torch.nan)
    checkpoint = checkpoint_of(tmp_path, **tensors)
    expected = measure_tensors(checkpoint, {"stacked": STACKED})
    found = table_on(device, checkpoint, monkeypatch)
    assert_same_table(found, expected, 1e-12)
    few = expected["dtype"].isin(["F16", "BF16", "F8_E4M3", "F8_E5M2"])
    pd.testing.assert_frame_equal(found[few], expected[few], check_exact=True)


@pytest.mark.parametrize("device", DEVICES)
def test_threads_do_not_show_and_blocks_only_in_the_last_digits(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {dtype: weights((400, 301), dtype, scale=0.1) for dtype in ("F64", "F32", "BF16")}
    checkpoint = checkpoint_of(tmp_path, **tensors)
    for block_bytes in (30_000, 4 << 20):
        alone = table_on(device, checkpoint, monkeypatch, block_bytes, Serial())
        for count in (2, 3):
            threads = table_on(device, checkpoint, monkeypatch, block_bytes, Threads(count))
            pd.testing.assert_frame_equal(threads, alone, check_exact=True)
        if block_bytes == 30_000:
            small = alone
    assert_same_table(small, alone, 1e-13)


@NO_GPU
def test_a_gpu_gives_the_bits_of_torch_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(tmp_path, **{dtype: hard(dtype, (33, 700)) for dtype in DTYPES})
    frames = [table_on(device, checkpoint, monkeypatch) for device in ("cpu", "cuda")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-kernels.EMPTY_EXPONENT, kernels.EMPTY_EXPONENT - 1, -1)
    expected = np.ldexp(1.0, exponents.numpy())
    np.testing.assert_array_equal(torch_path._power_of_two(exponents).numpy(), expected)


def test_large_blocks_are_worked_on_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = weights((20 * 4096,), "F32").view(torch.int32)
    code = torch_path.encoding("F32")
    seen: list[int] = []
    whole = torch_path._moments(bits, code)
    monkeypatch.setattr(torch_path, "_TOGETHER", 8)
    once = torch_path._moments_of
    monkeypatch.setattr(torch_path, "_moments_of", lambda part, code: (seen.append(len(part)), once(part, code))[1])
    np.testing.assert_array_equal(torch_path._moments(bits, code), whole)
    assert seen == [8, 8, 4]


def test_too_little_memory_on_the_device_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    checkpoint = checkpoint_of(tmp_path, a=weights((1000, 1000), "F32"))
    monkeypatch.setattr(torch, "bincount", full)
    with pytest.raises(ModelError, match=r"a: expected about 16 MB free on cpu, found less\. .*--device cpu") as caught:
        table_on("cpu", checkpoint, monkeypatch, block_bytes=4 << 20)
    assert "\n" not in str(caught.value)


def test_patterns_are_widened_to_the_next_width_at_most() -> None:
    for dtype, stored in DTYPES.items():
        bits = torch.zeros(4, dtype=stored).view(getattr(torch, f"int{8 * stored.itemsize}"))
        widened = torch_path._widened(bits)
        assert widened.element_size() == {1: 2, 2: 4, 4: 4, 8: 8}[stored.itemsize], dtype
        assert widened.data_ptr() != bits.data_ptr()


def test_every_thread_keeps_one_stream_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or (device, threading.get_ident()))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream))
    barrier = threading.Barrier(2, timeout=30)

    def use(device: str) -> list[object]:
        barrier.wait()  # so that each of two threads takes one item
        contexts = [torch_path._stream(device) for _ in range(3)] + [torch_path._stream("cuda:7")]
        return [context.enter_result for context in contexts]  # type: ignore[attr-defined]

    first, second = Threads(2).map(use, ["cuda:0", "cuda:0"])
    assert sorted(made) == ["cuda:0", "cuda:0", "cuda:7", "cuda:7"]
    assert first[0] == first[1] == first[2] != second[0] == second[2]
    assert first[3] not in (first[0], second[3])
