"""What replaces segments of the text cache: compaction, the limit of its size, and forgetting texts.

A new segment is there before the old ones are deleted, and whoever has those mapped keeps them until the next look-up.
One process at a time replaces segments (the cache's lock); readers and writers never wait for it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import Timeout
from numpy.typing import NDArray

from flipkd.data.commit import writing
from flipkd.errors import OutputError
from flipkd.vectors.cache import (
    KEY_FILE,
    NAMESPACE_BYTES,
    TextCache,
    cache_lock,
    drop_damaged,
    first_of_each,
    kind_of,
    open_whole,
    read_key,
    text_keys,
)
from flipkd.vectors.segment_files import remove_segment, remove_unfinished, segment_paths, write_segment
from flipkd.vectors.segments import DamagedSegmentError, Rows, Segment, SegmentKind

logger = logging.getLogger(__name__)

# Our choices. A segment larger than this is not merged any more: it bounds what a deletion has to write again.
FULL_ROWS = 1 << 24
_BLOCK_ROWS = 1 << 16  # rows merged at a time
_GROWTH = 2  # a segment is left alone while it has more than so many times the rows of all smaller ones
_FREE_SHARE = 0.1  # of the limit, made free when it is reached, so that not every night writes large segments again
_HOUR_S = 3600


def tidy(cache: TextCache, limit_bytes: int | None = None) -> dict[str, int]:
    """Merges small segments, removes what killed writers left, and drops what was not used for longest.

    Args:
        cache: its namespace is compacted.
        limit_bytes: of all namespaces together; while segments are merged, old and new ones are both there.

    Returns:
        ``texts``, ``bytes`` and ``segments`` of the namespace afterwards, ``dropped_texts`` of all namespaces.

    Raises:
        OutputError: the cache cannot be written.
    """
    root = cache.folder.parent
    dropped = 0
    with writing(str(root)), cache_lock(root):
        remove_unfinished(cache.folder)
        _compact(cache.folder, cache.kind)
        if limit_bytes is not None:
            dropped = _drop_to(root, limit_bytes)
    segments = open_whole(segment_paths(cache.folder), cache.kind).segments
    return {
        "texts": sum(map(len, segments)),
        "bytes": sum(segment.size_bytes for segment in segments),
        "segments": len(segments),
        "dropped_texts": dropped,
    }


def compact_if_free(cache: TextCache) -> None:
    """Merges small segments, unless another process is at it. An error is left to ``tidy`` to report."""
    with suppress(Timeout, OSError), cache_lock(cache.folder.parent).acquire(timeout=0):
        _compact(cache.folder, cache.kind)


def forget_texts(root: Path, texts: pa.LargeStringArray) -> int:
    """Deletes the vectors of N texts from all namespaces, for every encoder that has seen them.

    Returns:
        How many were deleted.

    Raises:
        OutputError: the cache cannot be read or written; some of the texts may be there still.
    """
    if not (root / KEY_FILE).exists():
        return 0
    key, deleted = read_key(root), 0
    with writing(str(root)), cache_lock(root):
        for folder, kind in _namespaces(root, key):
            keys = text_keys(texts, key, kind.namespace)
            keys = keys[np.argsort(keys[:, 0])]
            found = -1
            while found:  # again where a writer has added a segment meanwhile
                remove_unfinished(folder, wait=True)
                found = 0
                for segment in _all_of(folder, kind, must_read=True):  # what is not seen is not forgotten
                    rows = segment.find(keys)
                    if (rows >= 0).any():
                        keep = np.ones(len(segment), np.bool_)
                        keep[rows[rows >= 0]] = False
                        found += _rewrite(folder, kind, segment, keep)
                deleted += found
    return deleted


def _namespaces(root: Path, key: bytes) -> Iterator[tuple[Path, SegmentKind]]:
    for folder in sorted(root.iterdir()):
        with suppress(ValueError):  # a folder that is not ours
            namespace = bytes.fromhex(folder.name)
            if folder.is_dir() and len(namespace) == NAMESPACE_BYTES:
                yield folder, kind_of(key, namespace)


def _all_of(folder: Path, kind: SegmentKind, must_read: bool = False) -> list[Segment]:
    """The segments of a namespace. Those of a lost key are deleted: nobody can find anything in them.

    Raises:
        OutputError: with ``must_read``, one cannot be read now.
    """
    opened = open_whole(segment_paths(folder), kind)
    for path in opened.foreign:
        remove_segment(path)
    for path, why in opened.unreadable.items():
        if must_read:
            raise OutputError(f"cannot read {path}: {why}; run again")
    return opened.segments


def _compact(folder: Path, kind: SegmentKind) -> None:
    """Merges the smaller segments, so that their number grows with the logarithm of the texts."""
    segments = [segment for segment in _all_of(folder, kind) if len(segment) < FULL_ROWS // 2]
    while segments and len(segments[0]) > _GROWTH * sum(map(len, segments[1:])):
        segments.pop(0)
    while sum(map(len, segments)) > FULL_ROWS:
        segments.pop(0)
    if len(segments) > 1:
        _merge(folder, kind, segments, [np.ones(len(segment), np.bool_) for segment in segments])


def _rewrite(folder: Path, kind: SegmentKind, segment: Segment, keep: NDArray[np.bool_]) -> int:
    """Replaces a segment by its rows of ``keep``; returns how many rows it lost."""
    _merge(folder, kind, [segment], [keep])
    return int(np.count_nonzero(~keep))


def _merge(folder: Path, kind: SegmentKind, segments: list[Segment], keep: list[NDArray[np.bool_]]) -> None:
    """Writes one segment in place of several; one that turns out to be damaged is left out."""
    rows = sum(len(places) for _, places in _ranges(segments, keep))
    blocks = (_gather(segments, owners, places) for owners, places in _ranges(segments, keep))
    if rows:
        try:
            written = min(segment.written for segment in segments)
            write_segment(folder, kind, segments[0].row_bytes, rows, blocks, written)
        except DamagedSegmentError as error:
            drop_damaged(error)
            whole = [number for number, segment in enumerate(segments) if segment.path != error.path]
            if whole:
                _merge(folder, kind, [segments[number] for number in whole], [keep[number] for number in whole])
            return
    for segment in segments:
        remove_segment(segment.path)


def _ranges(segments: list[Segment], keep: list[NDArray[np.bool_]]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The kept rows of all segments in ascending order of key, each key once: number of the segment, row in it.

    Keys are hashes, so equal ranges of them hold about equal numbers of rows.
    """
    pieces = sum(map(len, segments)) // _BLOCK_ROWS + 1
    cuts = np.array([piece * 2**64 // pieces for piece in range(1, pieces)], np.uint64)
    edges = [np.concatenate([[0], np.searchsorted(one.prefixes, cuts), [len(one)]]) for one in segments]
    for piece in range(pieces):
        owners, places, keys = [], [], []
        for number, segment in enumerate(segments):
            start, stop = edges[number][piece : piece + 2]
            rows = start + np.flatnonzero(keep[number][start:stop])
            owners.append(np.full(len(rows), number))
            places.append(rows)
            keys.append(segment.keys(rows))
        order = first_of_each(np.concatenate(keys))
        yield np.concatenate(owners)[order], np.concatenate(places)[order]


def _gather(segments: list[Segment], owners: NDArray[Any], places: NDArray[Any]) -> Rows:
    """The rows at these places of these segments."""
    rows = Rows(
        np.empty((len(places), 2), np.uint64),
        np.empty(len(places), np.uint8),
        np.empty((len(places), segments[0].words.shape[1]), np.uint64),
        np.empty(len(places), np.uint32),
    )
    for number, segment in enumerate(segments):
        own = owners == number
        rows.keys[own], rows.used[own] = segment.keys(places[own]), segment.last_used(places[own])
        rows.status[own], rows.words[own] = segment.read(places[own])
    return rows


def _drop_to(root: Path, limit_bytes: int) -> int:
    """Drops the rows that were not used for longest, to the hour, until the rest is below the limit."""
    key = read_key(root)
    found = [(folder, kind, one) for folder, kind in _namespaces(root, key) for one in _all_of(folder, kind)]
    if sum(segment.size_bytes for _, _, segment in found) <= limit_bytes:
        return 0
    hours: Counter[int] = Counter()
    for _, _, segment in found:
        values, counts = np.unique(segment.last_used() // _HOUR_S, return_counts=True)
        hours.update({hour: count * segment.bytes_per_row for hour, count in zip(values, counts, strict=True)})
    free = float(limit_bytes * (1 - _FREE_SHARE))
    for oldest in sorted(hours, reverse=True):
        if hours[oldest] > free:  # of this hour's rows a part fits
            break
        free -= hours[oldest]
    else:
        return 0
    dropped = 0
    for folder, kind, segment in found:
        hour = segment.last_used() // _HOUR_S
        keep = hour > oldest
        fitting = np.flatnonzero(hour == oldest)[: int(free // segment.bytes_per_row)]
        keep[fitting] = True
        free -= len(fitting) * segment.bytes_per_row
        if not keep.all():
            dropped += _rewrite(folder, kind, segment, keep)
    logger.info("dropped %d texts from %s to keep to its limit", dropped, root)
    return dropped
