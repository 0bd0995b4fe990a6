"""The text cache: vectors of texts that were encoded before, on any night, for any table.

A folder, private to its owner::

    key                  32 random bytes; without them nobody can tell whether a guessed text is in the cache
    lock                 held by what replaces segments, flipkd/vectors/cache_tidy.py; never while texts are encoded
    NAMESPACE/*.segment  one folder for each encoder and dtype of vectors; flipkd/vectors/segments.py

A vector is found by BLAKE2b-128, under the key file's key, of the normalised text as the encoder gets it. The
namespace, which also salts the hash, is that of everything else that decides a vector: the encoder's files (its prompt
is in one of them), the longest text, the dtype of its arithmetic and that of the vectors. A template needs no place of
its own: it makes the text, and two templates that make the same text may share its vector.

What is kept are rows of the store's dtype (our choice): int8 rows are a quarter of float32 ones and need no work when
they are found. A night with another ``--dtype`` encodes anew.

Any number of processes read and write at once. Writers add files under names of their own; readers list the folder
before every look-up. Two writers that encode the same text keep it twice, until the next compaction.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from flipkd.data.commit import make_private_folder, write_private_file, writing
from flipkd.data.records import keyed_digests
from flipkd.errors import ConfigError
from flipkd.vectors.rows import STORAGE, VectorRows, check_dtype
from flipkd.vectors.segment_files import remove_segment, segment_paths, write_segment
from flipkd.vectors.segments import DamagedSegmentError, Opened, Rows, Segment, SegmentKind, Words, open_all, to_words

logger = logging.getLogger(__name__)

CACHE_FOLDER = "texts"  # below --cache DIR
KEY_FILE = "key"
LOCK_FILE = "lock"
_FORMAT = 1
_KEY_BYTES = 32
NAMESPACE_BYTES = 16
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Hits:
    """What the cache has of N texts.

    Args:
        found: [N] bool.
        rows: [N, d] their vectors, of no meaning where none was found; None where none was found at all.
        status: [N] uint8, bits of STATUS_*; likewise.
    """

    found: NDArray[np.bool_]
    rows: VectorRows | None
    status: NDArray[np.uint8]


class TextCache:
    """The cached vectors of one encoder in one dtype. Use ``open_cache`` to get one.

    Args:
        folder: of the namespace.
        key: the key file's bytes.
        namespace: 16 bytes.
        dtype: of the vectors.
    """

    def __init__(self, folder: Path, key: bytes, namespace: bytes, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.kind = kind_of(key, namespace)
        self._key = key
        self._segments: dict[Path, Segment] = {}

    @property
    def segment_count(self) -> int:
        """Segments that the last look-up has seen."""
        return len(self._segments)

    def keys(self, texts: pa.LargeStringArray) -> Words:
        """[N, 2] uint64 keys of N texts, none of them null."""
        return text_keys(texts, self._key, self.kind.namespace)

    def look_up(self, keys: Words) -> Hits:
        """Finds the vectors of N keys; see ``Hits``. What it finds is noted as used."""
        order = np.argsort(keys[:, 0])
        ordered, left, now = keys[order], np.arange(len(keys)), int(time.time())
        found, status = np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.uint8)
        words, row_bytes = np.empty((0, 0), np.uint64), 0
        for segment in self._open_segments() if len(keys) else ():
            rows = segment.find(ordered[left])
            hit = rows >= 0
            if not hit.any():
                continue
            if not row_bytes:
                words, row_bytes = np.zeros((len(keys), segment.words.shape[1]), np.uint64), segment.row_bytes
            places, rows = order[left[hit]], rows[hit]
            try:
                # In blocks that stay in the processor's cache: new memory of the size of everything is what costs most.
                for start in range(0, len(places), _BLOCK_ROWS):
                    block = places[start : start + _BLOCK_ROWS]
                    status[block], words[block] = segment.read(rows[start : start + _BLOCK_ROWS])
            except DamagedSegmentError as error:
                drop_damaged(error)
                continue
            found[places] = True
            segment.mark_used(rows, now)
            left = left[~hit]
            if not len(left):
                break
        if not found.any():
            return Hits(found, None, status)
        raw = np.ascontiguousarray(words.view(np.uint8)[:, :row_bytes])
        return Hits(found, VectorRows(raw.view(STORAGE[self.dtype]), self.dtype), status)

    def put(self, keys: Words, rows: VectorRows, status: NDArray[np.uint8]) -> None:
        """Adds the vectors of N texts. A cache that cannot be written is no reason to stop: then there is a warning.

        Args:
            keys: [N, 2], see ``keys``; one that stands twice is kept once.
            rows: [N, d] of the cache's dtype.
            status: [N] uint8, bits of STATUS_*.
        """
        if not len(keys):
            return
        now = int(time.time())
        order = first_of_each(keys)
        row_bytes = rows.dim * STORAGE[rows.dtype].itemsize
        used = np.full(len(order), now, np.uint32)
        block = Rows(keys[order], status[order], to_words(rows.values[order]), used)
        for attempt in (1, 2):  # a cleaner may take the new file of the first one for a dead writer's
            try:
                make_private_folder(str(self.folder))
                write_segment(self.folder, self.kind, row_bytes, len(order), [block], now)
                return
            except FileNotFoundError:
                if attempt == 2:
                    logger.warning("vectors were not kept in the cache %s: it is being deleted", self.folder)
            except OSError as error:
                logger.warning("vectors were not kept in the cache %s: %s", self.folder, os.strerror(error.errno or 0))
                return

    def _open_segments(self) -> list[Segment]:
        """All segments that are there now, the largest first."""
        present = segment_paths(self.folder)
        kept = [self._segments[path] for path in present if path in self._segments]
        fresh = open_whole([path for path in present if path not in self._segments], self.kind)
        self._segments = {segment.path: segment for segment in (*kept, *fresh.segments)}
        return sorted(self._segments.values(), key=len, reverse=True)


def open_cache(folder: str | Path, encoder: str, dtype: str) -> TextCache:
    """Opens the cache in a folder, which is made (with a new key) if it is not there.

    Args:
        folder: local; see the module's docstring.
        encoder: fingerprint of the encoder, of its longest text and of the dtype of its arithmetic.
        dtype: of the vectors.

    Raises:
        ConfigError: the key file is damaged.
        OutputError: the folder cannot be written.
    """
    check_dtype(dtype)
    root = Path(folder)
    told = f"{_FORMAT} {encoder} {dtype}".encode()
    namespace = hashlib.blake2b(told, digest_size=NAMESPACE_BYTES).digest()
    return TextCache(root / namespace.hex(), read_key(root), namespace, dtype)


def read_key(root: Path) -> bytes:
    """The key of a cache; a new one where there is none yet.

    Whoever has the key can tell whether a text that he guesses is in the cache. A key that its group can read is warned
    of and no more: storage classes of Kubernetes set that themselves.

    Raises:
        ConfigError: the file is damaged, or everybody can read or write it.
        OutputError: the folder cannot be written.
    """
    path = root / KEY_FILE
    if not path.exists():
        with writing(str(root)):
            make_private_folder(str(root))
            with cache_lock(root):
                if not path.exists():
                    write_private_file(str(path), os.urandom(_KEY_BYTES))
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o007:
        raise ConfigError(
            f"{path} has mode {mode:04o}: everybody on this machine can test guessed texts with it; if nobody has, "
            f"chmod 600 it, else remove the folder {root}, texts are then encoded anew with another key"
        )
    if mode & 0o070:
        logger.warning("%s has mode %04o: its group can test guessed texts with it; chmod 600 it", path, mode)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{path} is damaged; remove the folder {root}, texts are then encoded anew")
    return key


def cache_lock(root: Path) -> FileLock:
    """The lock of what makes the key or replaces segments; it ends with its process, however that ends."""
    return FileLock(str(root / LOCK_FILE), mode=0o600)


def kind_of(key: bytes, namespace: bytes) -> SegmentKind:
    """What the segments of a namespace must be; of the key they tell only a hash."""
    return SegmentKind(hashlib.blake2b(b"", digest_size=8, key=key).digest(), namespace)


def text_keys(texts: pa.LargeStringArray, key: bytes, namespace: bytes) -> Words:
    """[N, 2] uint64: the two halves of BLAKE2b-128 of N texts, none of them null."""
    digests = cast(list[bytes], keyed_digests(texts, key, namespace))
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def first_of_each(keys: Words) -> NDArray[np.intp]:
    """Places of the distinct ones of [N, 2] keys, in ascending order of key; of equal ones the first place."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    fresh = np.ones(len(keys), np.bool_)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[fresh]


def open_whole(paths: Iterable[Path], kind: SegmentKind) -> Opened:
    """Opens segments; those that are damaged are deleted, those that cannot be read now are left alone, with warnings.

    Args:
        paths: the files.
        kind: what they must be.
    """
    opened = open_all(paths, kind)
    for error in opened.damaged:
        drop_damaged(error)
    if opened.unreadable:
        path, why = next(iter(opened.unreadable.items()))
        told = "%d files of the cache cannot be read now (%s: %s); they stay, and what they hold is encoded again"
        logger.warning(told, len(opened.unreadable), path, why)
    return opened


def drop_damaged(error: DamagedSegmentError) -> None:
    """Deletes a damaged segment, with a warning: what it held is encoded again."""
    logger.warning("%s; it is removed, and what it held is encoded again", error)
    with suppress(OSError):
        remove_segment(error.path)
