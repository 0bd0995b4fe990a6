"""Batches in which nothing is padded and nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flipkd.models.batches import equal_length_batches, full_batches, packed_batches
from flipkd.models.tokens import TokenizedTexts

LENGTHS = st.lists(st.integers(0, 9), max_size=60)


def chunks_of(rows: list[list[int]], chunk: int) -> Iterator[tuple[int, TokenizedTexts]]:
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        yield start, TokenizedTexts.of_lists(part, [False] * len(part))


@settings(max_examples=60)
@given(lengths=LENGTHS, chunk=st.integers(1, 20), max_tokens=st.integers(1, 40))
def test_batches_hold_every_text_once_without_padding(lengths: list[int], chunk: int, max_tokens: int) -> None:
    rows = [[place * 100 + offset for offset in range(length)] for place, length in enumerate(lengths)]
    seen: list[int] = []
    for places, ids in equal_length_batches(chunks_of(rows, chunk), max_tokens):
        assert ids.size <= max_tokens or len(ids) == 1
        for place, row in zip(places.tolist(), ids, strict=True):
            np.testing.assert_array_equal(row, rows[place])
            seen.append(place)
    assert sorted(seen) == [place for place, length in enumerate(lengths) if length]


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    chunk=st.integers(1, 20),
    max_tokens=st.integers(1, 40),
    kind=st.sampled_from(["one", "mix", "full"]),
)
def test_packed_batches_hold_every_text_once(lengths: list[int], chunk: int, max_tokens: int, kind: str) -> None:
    rows = [[place * 100 + offset for offset in range(length)] for place, length in enumerate(lengths)]
    chunks = chunks_of(rows, chunk)
    batches = list(
        full_batches(chunks, max_tokens) if kind == "full" else packed_batches(chunks, max_tokens, kind == "mix")
    )
    seen: list[int] = []
    for places, ids, counts in batches:
        assert ids.size <= max_tokens or len(places) == 1
        assert kind != "one" or len(set(counts.tolist())) == 1
        assert counts.tolist() == sorted(counts.tolist())
        ends = np.cumsum(counts)
        for place, count, end in zip(places.tolist(), counts.tolist(), ends.tolist(), strict=True):
            np.testing.assert_array_equal(ids[end - count : end], rows[place])
            seen.append(place)
    assert sorted(seen) == [place for place, length in enumerate(lengths) if length]
    if kind == "full":  # two neighbours would not have fitted in one
        sizes = [batch.ids.size for batch in batches]
        assert all(sum(pair) > max_tokens for pair in itertools.pairwise(sizes))
