"""From record ids to row numbers: a hash table in a file, mapped by every process of a node and loaded by none.

Files, beside the vectors: ids.bin (int64 or uint64 [rows], or the bytes of all ids), offsets.bin (uint64 [rows + 1],
bytes only), slots.bin (the table; index.cpp tells its form). Integers are compared by value, strings by their bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flipkd.errors import InputError
from flipkd.kernels.native import native
from flipkd.vectors import index_reference as reference
from flipkd.vectors.id_types import check_ids_fit, plain
from flipkd.vectors.mapped import map_file

Array = NDArray[Any]

MAX_ROWS = 2**32 - 2  # a slot keeps row + 1 in 32 bits

# Share of the slots that are taken. A fuller table is smaller and has more keys outside their home bucket.
_LOAD = 0.6
_BUILD_ROWS = 1 << 22  # rows inserted per call: Ctrl-C is heard between calls
_DUPLICATES = 1 << 16  # duplicate pairs handed out at a time


def bucket_count(kind: str, rows: int) -> int:
    """Number of 64-byte buckets of a table for `rows` ids. Always at least one free slot."""
    slots = {"bytes": 4, "null": 0}.get(kind, 5)
    return int(rows / (slots * _LOAD)) + 1 if slots else 0


def index_files(kind: str, rows: int, id_bytes: int) -> dict[str, int]:
    """The index's file names and sizes in bytes. `id_bytes`: total length of byte ids."""
    if kind == "null":
        return {}
    files = {"slots.bin": 64 * bucket_count(kind, rows), "ids.bin": id_bytes if kind == "bytes" else 8 * rows}
    return files | ({"offsets.bin": 8 * (rows + 1)} if kind == "bytes" else {})


@dataclass(frozen=True)
class IdIndex:
    """Answers ids with row numbers.

    Args:
        folder: of the store; for messages.
        kind: one of id_types.KINDS.
        id_type: the records' Arrow type, as text; for messages.
        rows: rows of the store.
        table: the mapped table; its dtype is one of index_reference's buckets.
        ids: mapped ids in row order: uint64 [rows] or uint8 [id_bytes].
        offsets: mapped, uint64 [rows + 1] for kind "bytes", else empty.
    """

    folder: Path
    kind: str
    id_type: str
    rows: int
    table: Array
    ids: Array
    offsets: Array

    @staticmethod
    def open(folder: Path, kind: str, id_type: str, rows: int) -> IdIndex:
        """Map the index files of `folder`, whose sizes the caller has checked (see index_files)."""
        if kind == "null":
            nothing = np.empty(0, "<u8")
            return IdIndex(folder, kind, id_type, rows, np.empty(0, reference.INT_BUCKET), nothing, nothing)
        is_bytes = kind == "bytes"
        table = map_file(folder / "slots.bin", reference.BYTES_BUCKET if is_bytes else reference.INT_BUCKET)
        ids = map_file(folder / "ids.bin", "u1" if is_bytes else "<u8")
        offsets = map_file(folder / "offsets.bin", "<u8") if is_bytes else np.empty(0, "<u8")
        return IdIndex(folder, kind, id_type, rows, table, ids, offsets)

    def look_up(self, ids: pa.Array | pa.ChunkedArray, threads: int = 1, *, column: str = "id") -> Array:
        """Return the row number of every id.

        Args:
            ids: [N] integers (any width), strings, binary (any form), or a dictionary of those. Dictionary values are
                looked up once each.
            threads: used by the compiled library.
            column: the ids' column name; for messages.

        Returns:
            [N] int32, or int64 if the store has 2**31 rows or more. -1 where the id is null or not in the store; of ids
            that stand twice in the records, the first row.

        Raises:
            ColumnError: a type that cannot be an id, or integers against a store of strings or the other way round.
            InputError: the index is damaged: it answers with a row that is not there.
        """
        check_ids_fit(ids.type, column, self.kind, f"of type {self.id_type}")
        chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
        out = np.empty(len(ids), np.int32 if self.rows < 2**31 else np.int64)
        start = 0
        for chunk in chunks:
            self._look_up_into(chunk, out[start : start + len(chunk)], threads)
            start += len(chunk)
        if len(out) and (out.max() >= self.rows or out.min() < -1):
            raise InputError(f"the id index of the store {self.folder} is damaged; remove the store and encode again")
        return out

    def _look_up_into(self, ids: pa.Array, out: Array, threads: int) -> None:
        ids = plain(ids)
        if not len(ids):
            return
        if self.rows == 0 or self.kind == "null" or pa.types.is_null(ids.type):
            out[:] = -1
        elif pa.types.is_dictionary(ids.type):
            values = np.empty(len(ids.dictionary) + 1, out.dtype)
            self._look_up_into(ids.dictionary, values[:-1], threads)
            values[-1] = -1  # null indices are made to point here
            indices = ids.indices.cast(pa.int64()).fill_null(len(values) - 1)
            np.take(values, indices.to_numpy(), out=out, mode="clip")
        elif self.kind == "bytes":
            self._look_up_bytes(ids, out, threads)
        else:
            self._look_up_ints(ids, out, threads)

    def _look_up_ints(self, ids: pa.Array, out: Array, threads: int) -> None:
        library = native()
        if library is None:
            valid = np.asarray(ids.is_valid())
            values = np.asarray(ids.fill_null(0)) if ids.null_count else np.asarray(ids)
            if self.kind == "uint64" and values.dtype.kind == "i":
                valid = valid & (values >= 0)
            elif self.kind == "int64" and values.dtype == np.uint64:
                valid = valid & (values < 2**63)
            # int64 in between, so that narrow signed values are sign-extended as in C++
            keys = values if values.dtype == np.uint64 else values.astype(np.int64).view(np.uint64)
            out[:] = reference.look_up_ints(keys, valid, self.table)
            return
        width = ids.type.bit_width // 8
        validity, values_buffer = ids.buffers()
        code = library.flipkd_index_look_up_ints(
            _pointer(values_buffer, ids.offset * width),
            ctypes.c_int32(-width if pa.types.is_signed_integer(ids.type) else width),
            _pointer(validity),
            ctypes.c_int64(ids.offset),
            ctypes.c_int64(len(ids)),
            _array(self.table),
            ctypes.c_uint64(len(self.table)),
            ctypes.c_int32(self.kind == "uint64"),
            _array(out),
            ctypes.c_int32(out.itemsize),
            ctypes.c_int32(threads),
        )
        assert code == 0, f"index.cpp does not know {ids.type}"

    def _look_up_bytes(self, ids: pa.Array, out: Array, threads: int) -> None:
        library = native()
        if library is None:
            out[:] = reference.look_up_bytes(ids.cast(pa.large_binary()), self.table, self.ids, self.offsets)
            return
        if pa.types.is_fixed_size_binary(ids.type):
            validity, data = ids.buffers()
            width, stride_bytes = 0, ids.type.byte_width
            data_pointer, offsets_pointer = _pointer(data, ids.offset * stride_bytes), None
        else:
            validity, offsets, data = ids.buffers()
            width = 8 if pa.types.is_large_string(ids.type) or pa.types.is_large_binary(ids.type) else 4
            stride_bytes, data_pointer, offsets_pointer = 0, _pointer(data), _pointer(offsets, ids.offset * width)
        code = library.flipkd_index_look_up_bytes(
            data_pointer,
            offsets_pointer,
            ctypes.c_int32(width),
            ctypes.c_uint64(stride_bytes),
            _pointer(validity),
            ctypes.c_int64(ids.offset),
            ctypes.c_int64(len(ids)),
            _array(self.table),
            ctypes.c_uint64(len(self.table)),
            _array(self.ids),
            _array(self.offsets),
            ctypes.c_uint64(len(self.ids)),
            ctypes.c_uint64(self.rows),
            _array(out),
            ctypes.c_int32(out.itemsize),
            ctypes.c_int32(threads),
        )
        assert code == 0, f"index.cpp does not know {ids.type}"


def build_index(folder: Path, kind: str, status: Array, skip_mask: int) -> Iterator[Array]:
    """Fill slots.bin of `folder`, which is there and all zeros, from ids.bin and offsets.bin.

    Rows whose status has a bit of `skip_mask` are left out; the first row of an id wins. Yields the duplicates met,
    [n, 2] int64 (first row, row), a block at a time. The table is whole when the iterator is at its end.
    """
    rows = len(status)
    if kind == "null" or rows == 0:
        return
    is_bytes = kind == "bytes"
    ids = map_file(folder / "ids.bin", "u1" if is_bytes else "<u8")
    offsets = map_file(folder / "offsets.bin", "<u8") if is_bytes else np.empty(0, "<u8")
    bucket = reference.BYTES_BUCKET if is_bytes else reference.INT_BUCKET
    table = map_file(folder / "slots.bin", bucket, writable=True)
    library = native()
    if library is None:
        indexed = (np.asarray(status) & skip_mask) == 0
        if is_bytes:
            yield reference.build_bytes(ids, offsets, indexed, table)
        else:
            yield reference.build_ints(ids, indexed, table)
    else:
        insert: Callable[..., int] = library.flipkd_index_build_bytes if is_bytes else library.flipkd_index_build_ints
        insert.restype = ctypes.c_int64  # type: ignore[attr-defined]
        keys: list[Any] = [_array(ids)]
        if is_bytes:
            keys += [_array(offsets), ctypes.c_uint64(len(ids)), ctypes.c_uint64(rows)]
        row = 0
        while row < rows:
            duplicates = np.empty((_DUPLICATES, 2), np.int64)
            found = ctypes.c_int64()
            row = insert(
                *keys,
                _array(status),
                ctypes.c_uint8(skip_mask),
                ctypes.c_int64(row),
                ctypes.c_int64(min(row + _BUILD_ROWS, rows)),
                _array(table),
                ctypes.c_uint64(len(table)),
                _array(duplicates),
                ctypes.c_int64(_DUPLICATES),
                ctypes.byref(found),
            )
            if found.value:
                yield duplicates[: found.value]


def _pointer(buffer: pa.Buffer | None, offset_bytes: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if buffer is None else buffer.address + offset_bytes)


def _array(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
