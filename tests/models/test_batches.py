"""Batches in which nothing is padded and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flipkd.models.batches import equal_length_batches, packed_batches
from flipkd.models.tokens import TokenizedTexts


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=60),
    chunk=st.integers(1, 20),
    max_tokens=st.integers(1, 40),
)
def test_batches_hold_every_text_once_without_padding(lengths: list[int], chunk: int, max_tokens: int) -> None:
    rows = [[place * 100 + offset for offset in range(length)] for place, length in enumerate(lengths)]

    def chunks() -> Iterator[tuple[int, TokenizedTexts]]:
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            yield start, TokenizedTexts(part, [False] * len(part))

    seen: list[int] = []
    for places, ids in equal_length_batches(chunks(), max_tokens):
        assert ids.size <= max_tokens or len(ids) == 1
        for place, row in zip(places.tolist(), ids, strict=True):
            np.testing.assert_array_equal(row, rows[place])
            seen.append(place)
    assert sorted(seen) == [place for place, length in enumerate(lengths) if length]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=60),
    chunk=st.integers(1, 20),
    max_tokens=st.integers(1, 40),
    mixes=st.booleans(),
)
def test_packed_batches_hold_every_text_once(lengths: list[int], chunk: int, max_tokens: int, mixes: bool) -> None:
    rows = [[place * 100 + offset for offset in range(length)] for place, length in enumerate(lengths)]
    chunks = (
        (start, TokenizedTexts(rows[start : start + chunk], [False] * len(rows[start : start + chunk])))
        for start in range(0, len(rows), chunk)
    )
    seen: list[int] = []
    for places, ids, positions, counts in packed_batches(chunks, max_tokens, mixes):
        assert ids.size <= max_tokens or len(places) == 1
        assert mixes or len(set(counts.tolist())) == 1
        assert counts.tolist() == sorted(counts.tolist())
        ends = np.cumsum(counts)
        for place, count, end in zip(places.tolist(), counts.tolist(), ends.tolist(), strict=True):
            np.testing.assert_array_equal(ids[end - count : end], rows[place])
            np.testing.assert_array_equal(positions[end - count : end], range(count))
            seen.append(place)
    assert sorted(seen) == [place for place, length in enumerate(lengths) if length]
