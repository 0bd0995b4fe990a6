"""Texts to tokens while the model works, and token ids to batches in which nothing is padded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flipkd.models.tokens import TokenizedTexts, offsets_in_texts

CHUNK_TEXTS = 1024
Input = TypeVar("Input", contravariant=True)
Tokens = TypeVar("Tokens", covariant=True)


class Tokenizes(Protocol[Input, Tokens]):
    """A tokenizer of texts, or of pairs of them."""

    def tokenize(self, texts: Sequence[Input], /) -> Tokens: ...


def tokenized_chunks(
    tokenizer: Tokenizes[Input, Tokens], texts: Sequence[Input], threads: int = 1
) -> Iterator[tuple[int, Tokens]]:
    """Tokenises in chunks, the next ones in a thread while the caller works on this one (the tokenizer frees the GIL).

    Args:
        tokenizer: what does it; it has threads of its own.
        texts: all of them.
        threads: chunks at once; with two, one is tokenised while the ids of another become Python's.

    Yields:
        the place of the chunk's first text, and the chunk; in the order of the texts.
    """
    starts = range(0, len(texts), CHUNK_TEXTS)
    if len(starts) < 2:
        if texts:
            yield 0, tokenizer.tokenize(texts)
        return
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="flipkd-tokenize") as pool:
        waiting: deque[tuple[int, Future[Tokens]]] = deque()
        for start in starts:
            waiting.append((start, pool.submit(tokenizer.tokenize, texts[start : start + CHUNK_TEXTS])))
            if len(waiting) > 1 + threads:
                first, chunk = waiting.popleft()
                yield first, chunk.result()
        while waiting:
            first, chunk = waiting.popleft()
            yield first, chunk.result()


# Places int64 [texts] in the input, ids int64 [texts, tokens].
_Rows = tuple[NDArray[np.int64], NDArray[np.int64]]


class PackedBatch(NamedTuple):
    """Texts end to end: ``places`` int64 [texts] in the input, ``ids`` int64 [T], ``lengths`` int64 [texts]."""

    places: NDArray[np.int64]
    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]


def equal_length_batches(chunks: Iterable[tuple[int, TokenizedTexts]], max_tokens: int) -> Iterator[_Rows]:
    """Groups texts of equal length, so that no batch needs padding.

    A batch leaves as soon as it holds ``max_tokens`` tokens, so the model starts before the last text is tokenised;
    what is left over goes out at the end, the largest batch first. Which texts share a batch follows from their order.

    Yields:
        places int64 [texts] in the input, and ids int64 [texts, tokens]. Texts without tokens come in no batch. A text
        longer than ``max_tokens`` has a batch of its own.
    """
    waiting: dict[int, _Rows] = {}
    for start, chunk in chunks:
        by_length = _by_length(np.arange(start, start + len(chunk)), chunk.flat, chunk.lengths)
        found, counts = np.unique(by_length.lengths, return_counts=True)
        ends = np.cumsum(counts)
        token = 0
        for length, count, end in zip(found.tolist(), counts.tolist(), ends.tolist(), strict=True):
            places = by_length.places[end - count : end]
            rows = by_length.ids[token : token + count * length].reshape(count, length)
            token += count * length
            if length in waiting:
                before = waiting.pop(length)
                places, rows = np.concatenate([before[0], places]), np.concatenate([before[1], rows])
            full = max(1, max_tokens // length)
            while len(rows) >= full:
                yield places[:full], rows[:full]
                places, rows = places[full:], rows[full:]
            if len(rows):
                waiting[length] = places, rows
    for length in sorted(waiting, key=lambda length: (-waiting[length][1].size, length)):
        yield waiting.pop(length)


def packed_batches(
    chunks: Iterable[tuple[int, TokenizedTexts]], max_tokens: int, mixes_lengths: bool
) -> Iterator[PackedBatch]:
    """Packs texts end to end: batches of one length while the input lasts, then what is left, shortest first.

    For a CPU, where a batch is small and attention over texts of one length is faster.

    Args:
        chunks: as ``tokenized_chunks`` yields them.
        max_tokens: most tokens in a batch; a longer text has one of its own.
        mixes_lengths: whether what is left may stand together whatever its length.

    Yields:
        batches, shortest text first. Texts without tokens come in none.
    """
    small: list[_Rows] = []
    for places, rows in equal_length_batches(chunks, max_tokens):
        if mixes_lengths and 2 * rows.size <= max_tokens:
            small.append((places, rows))
        else:
            yield _end_to_end([(places, rows)])
    left: list[_Rows] = []
    tokens = 0
    for places, rows in sorted(small, key=lambda batch: batch[1].shape[1]):
        if left and tokens + rows.size > max_tokens:
            yield _end_to_end(left)
            left, tokens = [], 0
        left.append((places, rows))
        tokens += rows.size
    if left:
        yield _end_to_end(left)


def full_batches(chunks: Iterable[tuple[int, TokenizedTexts]], max_tokens: int) -> Iterator[PackedBatch]:
    """Packs texts end to end as they come, whatever their lengths, as many as there is room for.

    For a GPU: a batch of one length would not be full before the last text is tokenised, and the GPU would wait.
    Arguments and batches are those of ``packed_batches``.
    """
    places, lengths, flat = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32)
    for start, chunk in chunks:
        places = np.concatenate([places, np.arange(start, start + len(chunk))])
        lengths, flat = np.concatenate([lengths, chunk.lengths]), np.concatenate([flat, chunk.flat])
        while len(flat) > max_tokens:
            ends = np.cumsum(lengths)
            # The first text has a batch of its own if it alone is longer; those without tokens before it go with it.
            count = max(int(np.searchsorted(ends, max_tokens, "right")), int(np.argmax(ends > 0)) + 1)
            token = int(ends[count - 1])
            yield _by_length(places[:count], flat[:token], lengths[:count])
            places, flat, lengths = places[count:], flat[token:], lengths[count:]
    if len(flat):
        yield _by_length(places, flat, lengths)


def _by_length(places: NDArray[np.int64], flat: NDArray[np.int32], lengths: NDArray[np.int64]) -> PackedBatch:
    """The same texts, shortest first, without those that have no tokens; texts of one length stay in their order."""
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]
    starts, sorted_lengths = np.cumsum(lengths) - lengths, lengths[order]
    ids = flat[np.repeat(starts[order], sorted_lengths) + offsets_in_texts(sorted_lengths)]
    return PackedBatch(places[order], ids.astype(np.int64), sorted_lengths)


def _end_to_end(groups: Sequence[_Rows]) -> PackedBatch:
    return PackedBatch(
        np.concatenate([places for places, _ in groups]),
        np.concatenate([rows.reshape(-1) for _, rows in groups]),
        np.concatenate([np.full(len(rows), rows.shape[1]) for _, rows in groups]),
    )
