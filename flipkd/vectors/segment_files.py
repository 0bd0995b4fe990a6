"""The files of a namespace of the text cache: how segments come and go. What is in one: flipkd/vectors/segments.py."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flipkd.data.commit import TEMPORARY_SUFFIX, sync
from flipkd.vectors.mapped import map_file
from flipkd.vectors.segments import (
    HEADER,
    MAGIC,
    Rows,
    SegmentKind,
    check_words,
    header_seal,
    open_used,
    segment_arrays,
    segment_bytes,
    used_path,
)

SUFFIX = ".segment"


def write_segment(
    folder: Path, kind: SegmentKind, row_bytes: int, rows: int, blocks: Iterable[Rows], written: int
) -> Path:
    """Writes a segment under a hidden name, flushes and renames it.

    The hidden file is locked while it is written, so that one without a lock is known to be a dead writer's.

    Args:
        folder: where.
        kind: what it is for.
        row_bytes: bytes of a vector.
        rows: rows in all blocks.
        blocks: the rows, in ascending order of key, each key once.
        written: seconds since 1970.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    name = f"{uuid.uuid4().hex}{SUFFIX}"
    hidden = folder / f".{name}{TEMPORARY_SUFFIX}"
    size_bytes = segment_bytes(rows, row_bytes)
    header = HEADER.pack(MAGIC, kind.key_id, rows, row_bytes, written, kind.namespace)
    used_file = used_path(folder / name)
    try:
        with os.fdopen(os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:  # a cleaner was here before the lock
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(hidden))
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # a full disk is an error here, not a SIGBUS later
            file.write(header + header_seal(header))
            file.flush()
            used = _fill(map_file(hidden, np.uint8, writable=True), rows, row_bytes, blocks)
            if (used > written).any():  # rows of older segments
                with open_used(folder / name, rows) as times:
                    times.write(used.tobytes())
            os.fsync(file.fileno())
            os.replace(hidden, folder / name)
    except BaseException:
        for path in (hidden, used_file):
            with suppress(OSError):
                path.unlink()
        raise
    sync(str(folder))
    return folder / name


def _fill(data: NDArray[np.uint8], rows: int, row_bytes: int, blocks: Iterable[Rows]) -> NDArray[np.uint32]:
    prefixes, rests, checks, status, words = segment_arrays(data, rows, row_bytes)
    used = np.empty(rows, np.uint32)
    start = 0
    for block in blocks:
        place = slice(start, start + len(block.keys))
        prefixes[place], rests[place] = block.keys[:, 0], block.keys[:, 1]
        checks[place] = check_words(block.keys, block.status, block.words)
        status[place], words[place], used[place] = block.status, block.words, block.used
        start = place.stop
    assert start == rows, f"{start} rows were given, {rows} were told"
    return used


def remove_segment(path: Path) -> None:
    """Deletes a segment and its times; processes that have it mapped keep it until they let go."""
    for own in (path, used_path(path)):
        own.unlink(missing_ok=True)


def segment_paths(folder: Path) -> list[Path]:
    """The segments of a namespace, in no order of meaning."""
    with suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and not path.name.startswith("."))
    return []


def remove_unfinished(folder: Path, *, wait: bool = False) -> None:
    """Deletes what killed writers left: hidden files without a lock, and times without a segment.

    Args:
        folder: of a namespace.
        wait: wait for live writers, so that none of their files is hidden at the end.
    """
    for path in list(folder.glob(f".*{SUFFIX}{TEMPORARY_SUFFIX}")):
        with suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            path.unlink()  # after a live writer's rename there is nothing of this name
    for path in folder.glob("*.used"):
        if not path.with_suffix(SUFFIX).exists() and not (folder / f".{path.stem}{SUFFIX}{TEMPORARY_SUFFIX}").exists():
            path.unlink(missing_ok=True)
