"""Ids in the one type of their kind."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from flipkd.errors import InputError
from flipkd.vectors.id_types import TYPES, as_kind

UINT64 = pa.array([5, 2**63, None], pa.uint64())


@pytest.mark.parametrize(
    ("ids", "kind", "expected"),
    [
        (pa.array([1, -1, None], pa.int8()), "int64", [1, -1, None]),
        (pa.array([1, -1, None], pa.int8()), "uint64", [1, None, None]),
        (UINT64, "int64", [5, None, None]),
        (UINT64, "uint64", [5, 2**63, None]),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array([7, None])), "int64", [7, None, None]),
        (pa.array(["a", None, "ü"]), "bytes", [b"a", None, "ü".encode()]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), "bytes", [b"a", b"b", b"a"]),
        (pa.array([b"ab", None, b"cd"], pa.binary(2)), "bytes", [b"ab", None, b"cd"]),
        (pa.array(["a", None, "c"], pa.string_view()), "bytes", [b"a", None, b"c"]),
        (pa.nulls(3), "bytes", [None, None, None]),
        (UINT64, "null", [None, None, None]),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_ids_of_one_kind(ids: pa.Array, kind: str, expected: list[Any], chunks: int) -> None:
    given = pa.chunked_array([ids] * chunks, ids.type) if chunks else ids
    found = as_kind(given, kind)
    assert found.type == TYPES[kind]
    assert found.to_pylist() == expected * max(chunks, 1)
    assert as_kind(pa.chunked_array([], ids.type), kind).type == TYPES[kind]


def test_no_id_of_a_record_is_lost() -> None:
    with pytest.raises(InputError, match="part 3 has negative ids"):
        as_kind(pa.array([1, -1]), "uint64", "part 3")
    null = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([7, None], pa.int64()))
    assert as_kind(null, "uint64", "part 3").to_pylist() == [7, None]
