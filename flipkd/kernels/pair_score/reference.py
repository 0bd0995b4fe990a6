"""pair_score in plain float32 PyTorch: what the others are tested against, and the way without a compiler."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from flipkd.vectors.rows import VectorRows

# Two gathered float32 chunks of this size fit a CPU's second-level cache.
_CHUNK_BYTES = 1 << 18


def pair_score(
    left: VectorRows,
    right: VectorRows,
    left_index: NDArray[np.int32] | NDArray[np.int64],
    right_index: NDArray[np.int32] | NDArray[np.int64],
    calibration: tuple[float, float] | None,
    min_score: float | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.int64] | None]:
    """Return (score, probability, position); `flipkd.kernels.pair_score.pair_score` is the contract and the checks."""
    score = torch.full((len(left_index),), torch.nan)
    valid = np.flatnonzero((left_index >= 0) & (right_index >= 0))
    chunk = max(1, _CHUNK_BYTES // (4 * left.dim))
    for start in range(0, len(valid), chunk):
        places = valid[start : start + chunk]
        left_rows, right_rows = _rows(left, left_index[places]), _rows(right, right_index[places])
        dot = (left_rows * right_rows).sum(1)
        if left.dtype == "int8":
            squares = left_rows.square().sum(1) * right_rows.square().sum(1)
            dot /= squares.clamp(min=1.0).sqrt()  # integer sums: below 1 is a row of zeros, whose dot is 0
        score[torch.from_numpy(places)] = dot.clamp(-1.0, 1.0)
    position = None
    if min_score is not None:
        kept = torch.nonzero(score >= min_score).flatten()  # NaN does not survive
        score, position = score[kept], kept.numpy()
    probability = None
    if calibration is not None:
        probability = torch.sigmoid(calibration[0] * score + calibration[1]).numpy()
    return score.numpy(), probability, position


def _rows(rows: VectorRows, index: NDArray[np.int32] | NDArray[np.int64]) -> torch.Tensor:
    """Return rows[index] as float32; int8 rows stay integers, since their norms are divided out afterwards."""
    gathered = torch.from_numpy(rows.values[index])
    return (gathered.view(torch.bfloat16) if rows.dtype == "bf16" else gathered).float()
