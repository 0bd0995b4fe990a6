"""Columns of a table as NumPy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def as_numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A numeric column as float64 [N], NaN where it is null."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
