"""Columns of a table as NumPy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def as_numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A numeric column as float64 [N], NaN where it is null."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


# What pyarrow's ``take`` and ``filter`` do not know, and what they do.
_KNOWN_FOR_VIEW = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}


def take_rows(table: pa.Table, places: pa.Array | npt.NDArray[np.int64]) -> pa.Table:
    """Rows of a table, as ``table.take``; columns of views too."""
    taken = []
    for column in table.columns:
        known = _KNOWN_FOR_VIEW.get(column.type)
        taken.append(column.take(places) if known is None else column.cast(known).take(places).cast(column.type))
    return pa.table(taken, schema=table.schema)
