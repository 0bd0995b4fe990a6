"""Files that are written once and then mapped."""

from __future__ import annotations

import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flipkd.data.location import may_pass
from flipkd.errors import InputError

PIECE_BYTES = 8 << 20


def map_file(path: Path, dtype: Any, *, writable: bool = False) -> NDArray[Any]:
    """Map a whole file as a 1-d array; all processes that do share its pages.

    Huge pages are asked for. Where the file system's page cache knows large folios (ext4 from Linux 6.16, xfs), a file
    that was written in large pieces, or is first read through such a mapping, is then mapped by huge pages: measured,
    random rows are gathered 1.3 to 2 times as fast as through 4 KiB pages, as fast as from anonymous huge pages.
    MADV_RANDOM is not asked for: it does nothing for a warm file, and gathering from a cold one of 1 GiB took 25 s with
    it and 2 s without.

    Raises:
        InputError: the file cannot be opened.
    """
    try:
        with path.open("r+b" if writable else "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
                return np.empty(0, dtype)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        way_out = "run again" if may_pass(error) else "encode the records again"
        raise InputError(f"{path} cannot be mapped ({error}); {way_out}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, dtype)


class HashedFile:
    """A new file of mode 0600 as it grows, and the hash of what went in. On disk when its `with` ends well.

    Written in aligned pieces of 8 MiB, so that the page cache can hold it in huge pages (see map_file).

    Args:
        path: the file.
        hashed: False spares the time of hashing, where nobody asks for it.
    """

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        self._hashed = hashed
        self.hash = hashlib.blake2b(digest_size=16)
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0)
        self._piece = bytearray(PIECE_BYTES)
        self._filled = 0

    def write(self, array: NDArray[Any]) -> None:
        """Append a C-contiguous array."""
        data = array.view(np.uint8).data
        if self._hashed:
            self.hash.update(data)
        while len(data):
            taken = min(len(data), PIECE_BYTES - self._filled)
            self._piece[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if self._filled == PIECE_BYTES:
                self._flush()

    def _flush(self) -> None:
        data = memoryview(self._piece)[: self._filled]
        while len(data):
            data = data[self._file.write(data) :]
        self._filled = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._flush()
            os.fsync(self._file.fileno())
        self._file.close()
