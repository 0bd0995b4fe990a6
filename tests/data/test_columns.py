"""Columns of any numeric type become float64."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from flipkd.data.columns import as_numbers


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int8(), pa.uint64(), pa.null()], ids=str)
def test_a_null_is_nan_and_the_rest_is_exact(kind: pa.DataType) -> None:
    values = [None, None] if pa.types.is_null(kind) else [1, None]
    found = as_numbers(pa.chunked_array([pa.array(values, kind), pa.array(values[1:], kind)]))
    assert found.dtype == np.float64
    assert np.array_equal(found, np.array([values[0], None, None], float), equal_nan=True)
