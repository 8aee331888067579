"""What numpy and scipy say, in float64, about the weights of a tensor; and tensors that are hard to summarize."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from builders import write_checkpoint

from vrscope.checkpoint.source import Checkpoint, open_checkpoint

QUANTILES = {"abs_q50": 0.5, "abs_q99": 0.99, "abs_q999": 0.999, "abs_q9999": 0.9999}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
EXACT = ("F16", "BF16", "F8_E4M3", "F8_E5M2")


def checkpoint_of(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    """Write tensors and open them as a checkpoint."""
    return open_checkpoint(write_checkpoint(folder, tensors))


def weights(shape: tuple[int, ...], dtype: str, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Return heavy-tailed random weights (Student t, 4 degrees of freedom) with some exact zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(4, size=shape) * scale + shift
    values = np.where(rng.random(shape) < 0.01, 0.0, values)
    return torch.from_numpy(np.asarray(values)).to(DTYPES[dtype])


def oracle(tensor: torch.Tensor) -> dict[str, float]:
    """Return every statistic that does not need to know rows from columns, of the finite weights."""
    every = tensor.to(torch.float64).numpy().reshape(-1)
    x = every[np.isfinite(every)]
    out = {"nan_count": int(np.isnan(every).sum()), "inf_count": int(np.isinf(every).sum())}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        out["mean"], out["std"], out["variance"] = x.mean(), x.std(), x.var()
        out["skewness"] = scipy.stats.skew(x, bias=True)
        out["kurtosis_excess"] = scipy.stats.kurtosis(x, fisher=True, bias=True)
        away = np.abs(x - x.mean())
        for sigmas in (4, 6):
            out[f"outlier_share_{sigmas}sigma"] = np.mean(away > sigmas * x.std()) if x.size else np.nan
        out["zero_share"] = np.mean(x == 0) if x.size else np.nan
        out["absmax"] = np.abs(x).max(initial=-np.inf) if x.size else np.nan
        for name, share in QUANTILES.items():
            out[name] = np.quantile(np.abs(x), share) if x.size else np.nan
    out["frobenius_norm"] = np.linalg.norm(x)
    out["tvr_ratio"] = out["std"] / 0.01
    return {name: float(value) for name, value in out.items()}


def spread(absmax: np.ndarray) -> float:
    """Return maximum over median."""
    return float(absmax.max() / np.median(absmax))


def bits_of(values: torch.Tensor) -> np.ndarray:
    """Return the stored bits of a tensor as unsigned integers, same shape."""
    width = 8 * values.dtype.itemsize
    signed = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    return values.contiguous().view(signed).numpy().view(f"uint{width}")
