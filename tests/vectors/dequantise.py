"""Stored rows as float32, to compare them with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flipkd.vectors.rows import VectorRows


def dequantise(rows: VectorRows) -> NDArray[np.float32]:
    """Return [N, d] float32 rows whose dot products are the scores of `rows`: int8 rows come back as unit vectors."""
    if rows.dtype == "float32":
        return rows.values
    if rows.dtype == "bf16":
        wide: NDArray[np.float32] = np.left_shift(rows.values, 16, dtype=np.uint32).view(np.float32)
        return wide
    values = rows.values.astype(np.float32)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    norms[norms == 0] = 1  # an all-zero row stays zero, and scores 0
    unit: NDArray[np.float32] = values / norms
    return unit
