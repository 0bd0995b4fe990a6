"""A table's columns: their names, their values as numbers, and rows taken by their places, whatever their types."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def first_clash(names: Iterable[str], made: Iterable[str]) -> str | None:
    """The first of ``names`` that is one of ``made``, upper or lower case: DuckDB and Spark take the two for one."""
    folded = {name.casefold() for name in made}
    return next((name for name in names if name.casefold() in folded), None)


def as_numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A numeric column as float64 [N], NaN where it is null."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def take_rows(table: pa.Table, places: pa.Array | npt.NDArray[np.int64]) -> pa.Table:
    """Rows of a table, as ``table.take``; columns of views too."""
    taken = []
    for column in table.columns:
        known = _without_views(column.type)
        taken.append(column.take(places) if known == column.type else column.cast(known).take(places).cast(column.type))
    return pa.table(taken, schema=table.schema)


def _without_views(kind: pa.DataType) -> pa.DataType:
    """The type that pyarrow's ``take`` knows, where ``kind`` holds views of strings or bytes."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(
            kind.key_field.with_type(_without_views(kind.key_type)),
            kind.item_field.with_type(_without_views(kind.item_type)),
            kind.keys_sorted,
        )
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_views(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)))
    return kind
