"""Labels of pairs: 1 for a match and 0 for none, whatever type they are kept in."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.records import is_bytes_like
from flipkd.errors import ConfigError, InputError

_STRINGS = pa.array([b"0", b"1"], pa.large_binary())
_NUMBERS = pa.array([0.0, 1.0], pa.float64())


def read_labels(
    column: pa.ChunkedArray, name: str, source: str, *, first_row: int = 0, allows_null: bool = False
) -> pa.ChunkedArray:
    """Labels as float32 1 or 0, from integers, floats, decimals, booleans, or the strings "0" and "1".

    Args:
        column: [N] labels; a NaN counts as null.
        name: the column's name, for messages.
        source: the file, for messages.
        first_row: row of the first label in the file, for messages.
        allows_null: whether a null is passed on.

    Raises:
        ConfigError: the column's type has no such form.
        InputError: a label is another value, or null and that is not allowed; named by file and row.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_null(kind):
        values = column.cast(pa.float64())
    elif pa.types.is_boolean(kind):
        values = column.cast(pa.int8()).cast(pa.float64())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        # Unsafe: an integer that no float64 holds is rounded, and stays neither 0 nor 1.
        values = column.cast(pa.float64(), safe=False)
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    elif is_bytes_like(kind):
        places = pc.index_in(column.cast(pa.large_binary()), _STRINGS, skip_nulls=True)
        wrong = pa.scalar(-1, pa.int32())
        values = pc.if_else(column.is_null(), pa.scalar(None, pa.int32()), pc.fill_null(places, wrong))
        values = values.cast(pa.float64())
    else:
        raise ConfigError(f"{source}: label column {name!r} has type {kind}; cast it to an integer of 0 or 1")
    # Null where the label is null: neither good nor bad yet.
    bad = pc.if_else(values.is_null(), not allows_null, pc.invert(pc.is_in(values, _NUMBERS)))
    row = pc.index(bad, True).as_py()
    if row >= 0:
        what = "is neither 0 nor 1" if values[row].is_valid else "is null"
        raise InputError(f"{source}: label column {name!r} {what} in row {first_row + row}; mend it, or drop the row")
    return values.cast(pa.float32())
