"""Labels of every type become 1 or 0, or are refused by file and row."""

from __future__ import annotations

import pyarrow as pa
import pytest

from flipkd.data.labels import read_labels
from flipkd.errors import ConfigError, InputError


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 0, 1], pa.int64()),
        pa.array([1, 0, 1], pa.uint8()),
        pa.array([1.0, 0.0, 1.0], pa.float64()),
        pa.array([1.0, 0.0, 1.0], pa.float16()),
        pa.array([True, False, True]),
        pa.array(["1", "0", "1"]),
        pa.array(["1", "0", "1"], pa.large_string()),
        pa.array([b"1", b"0", b"1"]),
        pa.array(["1", "0", "1"]).dictionary_encode(),
        pa.array([1, 0, 1]).dictionary_encode(),
        pa.array([1, 0, 1], pa.decimal128(5, 2)),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_gives_the_same(column: pa.Array) -> None:
    """Labels of every type are cast: transformers#27707."""
    found = read_labels(pa.chunked_array([column, column.slice(1)]), "label", "a.parquet")
    assert found.type == pa.float32()
    assert found.to_pylist() == [1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None], pa.int64()),
        pa.array([1.0, float("nan")]),
        pa.array(["1", None]),
        pa.array(["1", None]).dictionary_encode(),
        pa.array([True, None]),
    ],
    ids=lambda column: str(column.type),
)
def test_null_is_passed_on_only_where_it_is_allowed(column: pa.Array) -> None:
    column = pa.chunked_array([column])
    assert read_labels(column, "label", "a.parquet", allows_null=True).to_pylist() == [1.0, None]
    with pytest.raises(InputError, match=r"a\.parquet: label column 'label' is null in row 11"):
        read_labels(column, "label", "a.parquet", first_row=10)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([1, -1]),
        pa.array([1, 2**53 + 1]),
        pa.array([1.0, 1.0 + 1e-12]),
        pa.array([1.0, float("inf")]),
        pa.array(["1", "1.0"]),
        pa.array(["1", ""]),
        pa.array(["1", "secret"]),
    ],
    ids=str,
)
def test_other_values_are_refused_without_being_told(column: pa.Array) -> None:
    """transformers#27707: an early error in place of a wrong loss."""
    with pytest.raises(InputError, match="'label' is neither 0 nor 1 in row 1") as caught:
        read_labels(pa.chunked_array([column]), "label", "a.parquet", allows_null=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.date32(), pa.struct([("a", pa.int8())])], ids=str)
def test_other_types_are_refused(kind: pa.DataType) -> None:
    with pytest.raises(ConfigError, match="'label' has type"):
        read_labels(pa.chunked_array([pa.nulls(2, kind)]), "label", "a.parquet", allows_null=True)


def test_no_labels_at_all() -> None:
    assert read_labels(pa.chunked_array([], pa.int64()), "label", "a.parquet").to_pylist() == []
    nulls = pa.chunked_array([pa.nulls(2)])
    assert read_labels(nulls, "label", "a.parquet", allows_null=True).to_pylist() == [None, None]
