"""Columns of any numeric type become float64."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from flipkd.data.columns import as_numbers, take_rows


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int8(), pa.uint64(), pa.null()], ids=str)
def test_a_null_is_nan_and_the_rest_is_exact(kind: pa.DataType) -> None:
    values = [None, None] if pa.types.is_null(kind) else [1, None]
    found = as_numbers(pa.chunked_array([pa.array(values, kind), pa.array(values[1:], kind)]))
    assert found.dtype == np.float64
    assert np.array_equal(found, np.array([values[0], None, None], float), equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.string_view(), ["a string that is longer than twelve bytes", None, "b"]),
        (pa.list_(pa.string_view()), [["a"], None, []]),
        (pa.large_list(pa.binary_view()), [[b"a"], None, []]),
        (pa.list_(pa.string_view(), 1), [["a"], None, ["b"]]),
        (pa.struct([("x", pa.string_view()), ("y", pa.list_(pa.binary_view()))]), [{"x": "a", "y": [b"b"]}, None, {}]),
        (pa.map_(pa.string_view(), pa.list_(pa.string_view())), [[("k", ["v"])], None, []]),
    ],
    ids=str,
)
def test_rows_of_columns_that_hold_views_are_taken(kind: pa.DataType, values: list[object]) -> None:
    table = pa.table({"v": pa.chunked_array([pa.array(values, kind), pa.array(values[:1], kind)])})
    found = take_rows(table, pa.array([3, 2, 1]))
    assert found.schema == table.schema
    assert found.column("v").to_pylist() == [table.column("v")[place].as_py() for place in (3, 2, 1)]
