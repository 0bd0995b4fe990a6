"""One file of the text cache: vectors under sorted 16-byte keys, written once and then mapped.

Little-endian; a header of 64 bytes, then one array after another::

    prefixes  uint64 [rows]   first half of each key, ascending
    rests     uint64 [rows]   second half
    checks    uint64 [rows]   of key, status and vector together; see check_words
    status    uint8  [rows]   bits of STATUS_*, padded to whole words
    vectors   uint64 [rows, words]   rows of the store's dtype, padded to whole words

Every vector is checked when it is handed out, so a segment of any size opens at once and no damaged one is used. Beside
it lies NAME.used, uint32 [rows]: when a row was last handed out, in seconds since 1970. That file alone is written in
place; it may be lost.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flipkd.data.location import reason
from flipkd.errors import InputError
from flipkd.vectors.mapped import map_file

Words = NDArray[np.uint64]

MAGIC = b"flipkdT1"
HEADER = struct.Struct("<8s 8s Q I I 16s")  # magic, id of the key file, rows, row bytes, seconds since 1970, namespace
HEADER_BYTES = 64


class DamagedSegmentError(InputError):
    """A segment that is not what was written; it is not used."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} is damaged: {what}")
        self.path = path


@dataclass(frozen=True)
class SegmentKind:
    """What a segment must be for its vectors to be of use.

    Args:
        key_id: 8 bytes, of the key file that its keys were made with.
        namespace: 16 bytes, of the encoder and the vectors' dtype.
    """

    key_id: bytes
    namespace: bytes


@dataclass(frozen=True)
class Rows:
    """[N] cached vectors with their keys.

    Args:
        keys: [N, 2] uint64, the two halves of the 16-byte keys.
        status: [N] uint8, bits of STATUS_*.
        words: [N, words] uint64: the vectors' bytes, zeros after ``row_bytes``.
        used: [N] uint32, seconds since 1970.
    """

    keys: Words
    status: NDArray[np.uint8]
    words: Words
    used: NDArray[np.uint32]


@dataclass(frozen=True)
class Segment:
    """An open segment: mapped, nothing of it is read.

    Args:
        path: the file.
        row_bytes: bytes of a vector.
        written: seconds since 1970.
        prefixes, rests, checks, status, words: see the module's docstring.
    """

    path: Path
    row_bytes: int
    written: int
    prefixes: Words
    rests: Words
    checks: Words
    status: NDArray[np.uint8]
    words: Words

    def __len__(self) -> int:
        return len(self.prefixes)

    @property
    def size_bytes(self) -> int:
        """Of the file and of the times beside it."""
        return segment_bytes(len(self), self.row_bytes) + 4 * len(self)

    @property
    def bytes_per_row(self) -> int:
        """What a row more costs, rounded up."""
        return 8 * (3 + _words(self.row_bytes)) + 5

    def keys(self, rows: NDArray[Any]) -> Words:
        """[N, 2] keys of rows."""
        return np.stack([self.prefixes[rows], self.rests[rows]], axis=1)

    def find(self, keys: Words) -> NDArray[np.int64]:
        """Row of each key, -1 where it is not there. ``keys`` [N, 2] in ascending order of the first half."""
        rows = np.full(len(keys), -1, np.int64)
        if not len(self):
            return rows
        places = np.searchsorted(self.prefixes, keys[:, 0])
        open_keys = np.arange(len(keys))
        while len(open_keys):  # once, but for keys whose first halves agree
            places, open_keys = places[places < len(self)], open_keys[places < len(self)]
            same = self.prefixes[places] == keys[open_keys, 0]
            found = same & (self.rests[places] == keys[open_keys, 1])
            rows[open_keys[found]] = places[found]
            places, open_keys = places[same & ~found] + 1, open_keys[same & ~found]
        return rows

    def read(self, rows: NDArray[Any]) -> tuple[NDArray[np.uint8], Words]:
        """Copies rows out and checks them.

        Returns:
            Status uint8 [N] and vectors uint64 [N, words].

        Raises:
            DamagedSegmentError: a check does not hold.
        """
        status, words = self.status[rows], self.words[rows]
        if not np.array_equal(check_words(self.keys(rows), status, words), self.checks[rows]):
            raise DamagedSegmentError(self.path, "the check of a vector does not hold")
        return status, words

    def last_used(self, rows: NDArray[Any] | None = None) -> NDArray[np.uint32]:
        """Seconds since 1970, [N]: when rows were last handed out, or else written."""
        used = np.full(len(self) if rows is None else len(rows), self.written, np.uint32)
        with suppress(InputError):
            told = map_file(used_path(self.path), np.uint8)
            if len(told) == 4 * len(self):
                times = told.view("<u4")
                used = np.maximum(used, times if rows is None else times[rows])
        return used

    def mark_used(self, rows: NDArray[Any], now: int) -> None:
        """Notes that rows were handed out. A loss of it costs no more than a vector that is dropped too early."""
        with suppress(OSError, ValueError), open_used(self.path, len(self)) as file:
            mapped = mmap.mmap(file.fileno(), 0)
            times = np.frombuffer(mapped, "<u4")
            times[rows] = np.maximum(times[rows], now)  # clocks of several machines may differ


def segment_bytes(rows: int, row_bytes: int) -> int:
    """Size of a segment's file."""
    return HEADER_BYTES + 8 * (3 * rows + (rows + 7) // 8 + rows * _words(row_bytes))


def _words(row_bytes: int) -> int:
    return (row_bytes + 7) // 8


def to_words(vectors: NDArray[Any]) -> Words:
    """[N, d] rows of any dtype as [N, words] uint64, zeros at the end."""
    raw = np.ascontiguousarray(vectors).view(np.uint8).reshape(len(vectors), vectors.shape[1] * vectors.itemsize)
    width = 8 * _words(raw.shape[1])
    if raw.shape[1] != width:
        raw = np.concatenate([raw, np.zeros((len(raw), width - raw.shape[1]), np.uint8)], axis=1)
    return raw.view("<u8")


def check_words(keys: Words, status: NDArray[np.uint8], words: Words) -> Words:
    """[N] uint64: sum over a row's words of word times an odd constant of its place, modulo 2^64.

    Our choice: it sees every change of a single word for certain (odd constants have inverses) and any other one but
    for a chance of 2^-63 or so; it costs 0.03 s for a million rows of 384 bytes. Key and status are words too, so a
    vector that stands under a wrong key is damage as well.
    """
    odd = _odd_constants(words.shape[1] + 3)
    with np.errstate(over="ignore"):
        total: Words = words @ odd[3:]
        total += keys @ odd[:2]
        total += status.astype(np.uint64) * odd[2]
    return total


@functools.cache
def _odd_constants(count: int) -> Words:
    data = hashlib.shake_128(b"flipkd text cache").digest(8 * count)
    return np.frombuffer(data, "<u8") | np.uint64(1)


def open_segment(path: Path, kind: SegmentKind) -> Segment | None:
    """Maps a segment. None where it is of another kind: then it is of a key file that is lost.

    Raises:
        DamagedSegmentError: the header is damaged, or the file has not the length that it tells.
        FileNotFoundError: it was there a moment ago; a compaction has replaced it.
        OSError, InputError: it cannot be read now.
    """
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES or raw[:8] != MAGIC or header_seal(raw[: HEADER.size]) != raw[HEADER.size :]:
        raise DamagedSegmentError(path, "its header is not whole")
    _, key_id, rows, row_bytes, written, namespace = HEADER.unpack(raw[: HEADER.size])
    if key_id != kind.key_id or namespace != kind.namespace:
        return None
    if size_bytes != segment_bytes(rows, row_bytes):
        raise DamagedSegmentError(path, f"it has {size_bytes} bytes, not {segment_bytes(rows, row_bytes)}")
    arrays = segment_arrays(map_file(path, np.uint8), rows, row_bytes)
    return Segment(path, row_bytes, written, *arrays)


def segment_arrays(data: NDArray[np.uint8], rows: int, row_bytes: int) -> tuple[Words, Words, Words, Any, Words]:
    words = data[HEADER_BYTES:].view("<u8")
    start = 3 * rows + (rows + 7) // 8
    status = words[3 * rows : start].view(np.uint8)[:rows]
    vectors = words[start:].reshape(rows, _words(row_bytes))
    return words[:rows], words[rows : 2 * rows], words[2 * rows : 3 * rows], status, vectors


def header_seal(header: bytes) -> bytes:
    return hashlib.blake2b(header, digest_size=HEADER_BYTES - HEADER.size).digest()


def used_path(path: Path) -> Path:
    return path.with_suffix(".used")


def open_used(path: Path, rows: int) -> Any:
    """The file of times of a segment, made if it is not there: zeros, so that the time of writing counts."""
    descriptor = os.open(used_path(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    file = os.fdopen(descriptor, "r+b")
    os.ftruncate(descriptor, 4 * rows)
    return file


@dataclass(frozen=True)
class Opened:
    """What became of the segments of a folder.

    Args:
        segments: open, the largest first.
        foreign: files of another kind.
        damaged: why others are not used; each names its file.
        unreadable: why others cannot be read now, by file; of these nothing is known.
    """

    segments: list[Segment]
    foreign: list[Path]
    damaged: list[DamagedSegmentError]
    unreadable: dict[Path, str]


def open_all(paths: Iterable[Path], kind: SegmentKind) -> Opened:
    """Opens segments. Those that are not there any more are left out: a compaction has replaced them.

    Args:
        paths: the files.
        kind: what they must be.
    """
    opened = Opened([], [], [], {})
    for path in paths:
        try:
            segment = open_segment(path, kind)
        except DamagedSegmentError as error:
            opened.damaged.append(error)
            continue
        except (OSError, InputError) as error:  # too many open files, a disk that is away: no word about the bytes
            cause = error.__cause__ if isinstance(error, InputError) else error
            if not isinstance(cause, FileNotFoundError):
                opened.unreadable[path] = reason(cause or error)
            continue
        if segment is None:
            opened.foreign.append(path)
        else:
            opened.segments.append(segment)
    opened.segments.sort(key=len, reverse=True)
    return opened
