"""The vector store: one row per record in mapped files, shared by all processes of a node.

A folder. `store.json` is written last, so its presence says that the rest is whole::

    store.json    the header: see VectorStore.header
    vectors.bin   [rows, dim] float32, bf16 or int8
    status.bin    [rows] uint8, bits of STATUS_*
    ids.bin, offsets.bin, slots.bin    the id index (flipkd/vectors/index.py)

Built by flipkd/vectors/seal.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flipkd.errors import ConfigError
from flipkd.vectors.index import IdIndex
from flipkd.vectors.layout import (
    STATUS_INVALID_TEXT,
    STATUS_MISSING_TEXT,
    STATUS_NULL_ID,
    STATUS_TRUNCATED,
    check_files,
    is_sealed,
    read_header,
)
from flipkd.vectors.mapped import map_file
from flipkd.vectors.rows import STORAGE, VectorRows

__all__ = [
    "STATUS_INVALID_TEXT",
    "STATUS_MISSING_TEXT",
    "STATUS_NULL_ID",
    "STATUS_TRUNCATED",
    "VectorStore",
    "is_sealed",
    "read_header",
]


@dataclass(frozen=True)
class VectorStore:
    """An open store. Opening maps files and reads none of them; nothing in it grows with the number of records.

    Args:
        path: the folder.
        rows: the vectors, mapped.
        status: [rows] uint8, mapped; bits of STATUS_*.
        index: from record ids to row numbers.
        header: what the builder was given (dtype, encoder, template, ...) and, of its own, format_version, rows, dim,
            id_kind, id_type, id_bytes, counts (missing_text, truncated, invalid_text, null_ids, duplicate_records),
            content_fingerprint (a hash of vectors, status and ids) and fingerprint.
    """

    path: Path
    rows: VectorRows
    status: NDArray[np.uint8]
    index: IdIndex
    header: dict[str, Any]

    @staticmethod
    def open(path: str | Path) -> VectorStore:
        """Map the store in folder `path`.

        Raises:
            ConfigError: `path` is a URL; a store is mapped, so it has to be on a file system of this machine.
            InputError: not a sealed store, of a newer format, or a file is not of the size that the header says.
        """
        if "://" in str(path):
            raise ConfigError(f"the store {path} must be a local folder, because it is mapped; copy it to this machine")
        folder = Path(path)
        header = read_header(folder)
        rows, dim, dtype = header["rows"], header["dim"], header["dtype"]
        check_files(folder, header)
        values = map_file(folder / "vectors.bin", STORAGE[dtype]).reshape(rows, dim)
        status = map_file(folder / "status.bin", np.uint8)
        index = IdIndex.open(folder, header["id_kind"], header["id_type"], rows)
        return VectorStore(folder, VectorRows(values, dtype), status, index, header)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Hex: the builder's own name for what is in the store, or else header["content_fingerprint"]."""
        return str(self.header["fingerprint"])
