"""Texts to tokens while the model works, and token ids to batches in which nothing is padded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from flipkd.models.tokens import TokenizedTexts

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


def equal_length_batches(
    chunks: Iterable[tuple[int, TokenizedTexts]], max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups texts of equal length, so that no batch needs padding.

    A batch leaves as soon as it holds ``max_tokens`` tokens, so the model starts before the last text is tokenised;
    what is left over goes out at the end, the largest batch first. Which texts share a batch follows from their order.

    Yields:
        places int64 [texts] in the input, and ids int64 [texts, tokens]. Texts without tokens come in no batch. A text
        longer than ``max_tokens`` has a batch of its own.
    """
    rows: dict[int, list[list[int]]] = {}
    places: dict[int, list[int]] = {}

    def batch(length: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array(places.pop(length), dtype=np.int64), np.array(rows.pop(length), dtype=np.int64)

    for start, chunk in chunks:
        for offset, ids in enumerate(chunk.ids):
            length = len(ids)
            if not length:
                continue
            group = rows.setdefault(length, [])
            group.append(ids)
            places.setdefault(length, []).append(start + offset)
            if (len(group) + 1) * length > max_tokens:
                yield batch(length)
    for length in sorted(rows, key=lambda length: (-length * len(rows[length]), length)):
        yield batch(length)


def packed_batches(
    chunks: Iterable[tuple[int, TokenizedTexts]], max_tokens: int, mixes_lengths: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Packs texts end to end: batches of one length while the input lasts, then what is left, shortest first.

    Args:
        chunks: as ``tokenized_chunks`` yields them.
        max_tokens: most tokens in a batch; a longer text has one of its own.
        mixes_lengths: whether what is left may stand together whatever its length.

    Yields:
        places int64 [texts] in the input, ids int64 [T], positions int64 [T] (each text starts at 0), and the tokens of
        each text int64 [texts]. Texts without tokens come in no batch.
    """
    left_places: list[np.ndarray] = []
    left_rows: list[np.ndarray] = []
    tokens = 0

    def left() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        lengths = np.concatenate([np.full(len(rows), rows.shape[1]) for rows in left_rows])
        positions = np.concatenate([np.tile(np.arange(rows.shape[1]), len(rows)) for rows in left_rows])
        flat = np.concatenate([rows.reshape(-1) for rows in left_rows])
        made = np.concatenate(left_places), flat, positions, lengths
        left_places.clear()
        left_rows.clear()
        return made

    small: list[tuple[np.ndarray, np.ndarray]] = []
    for places, rows in equal_length_batches(chunks, max_tokens):
        if mixes_lengths and 2 * rows.size <= max_tokens:
            small.append((places, rows))
            continue
        left_places.append(places)
        left_rows.append(rows)
        yield left()
    for places, rows in sorted(small, key=lambda batch: batch[1].shape[1]):
        if left_rows and tokens + rows.size > max_tokens:
            yield left()
            tokens = 0
        left_places.append(places)
        left_rows.append(rows)
        tokens += rows.size
    if left_rows:
        yield left()
