"""Ids of pairs to places of records, against a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flipkd.data import record_texts
from flipkd.data.record_texts import RecordTexts

NOTHING: Any = None  # texts, which are not looked at here
IDS = {
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)),
    "uint64": (pa.uint64(), st.integers(0, 2**64 - 1) | st.integers(0, 5)),
    "bytes": (pa.large_binary(), st.binary(max_size=3)),
}


def expected(known: Sequence[Any], asked: Sequence[Any]) -> list[int]:
    places = {one: place for place, one in enumerate(known)}
    return [places.get(one, -1) if one is not None else -1 for one in asked]


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(list(IDS)), cut=st.integers(0, 6))
def test_look_up_is_that_of_a_dictionary(data: st.DataObject, kind: str, cut: int) -> None:
    arrow, one = IDS[kind]
    known = data.draw(st.lists(one, unique=True, max_size=12))
    asked = data.draw(st.lists(one | st.none() | (st.sampled_from(known) if known else st.none()), max_size=12))
    records = RecordTexts(pa.array(known, arrow), NOTHING, NOTHING, kind)
    column = pa.chunked_array([pa.array(asked[:cut], arrow), pa.array(asked[cut:], arrow)])
    for _ in range(2):
        assert records.look_up(column, "left_id").tolist() == expected(known, asked)


def test_ids_of_one_digest_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_texts, "keyed_digests", lambda ids, _: [bytes(16)] * len(ids))
    records = RecordTexts(pa.array([b"a", b"b", b"c"], pa.large_binary()), NOTHING, np.zeros(3, bool), "bytes")
    asked = [b"c", None, b"x", b"a", b"b"]
    found = records.look_up(pa.chunked_array([pa.array(asked, pa.large_binary())]), "left_id")
    assert found.tolist() == [2, -1, -1, 0, 1]
