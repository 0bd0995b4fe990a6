"""Makes a vector store out of the part files that encode units wrote.

Parts are Parquet, one per unit, in order: id, vector (fixed_size_binary, dim * item bytes), status uint8, text_digest
fixed_size_binary(16). They are streamed, never held; what is held grows with the number of parts. The store's files
are written in a hidden folder and renamed into place, store.json last: a crash at any point leaves an unsealed store,
and the same call does it again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flipkd.errors import ConflictingRecordsError, InputError, OutputError
from flipkd.vectors import layout
from flipkd.vectors.id_types import as_kind, check_id_type, mixed_kinds, widest_kind
from flipkd.vectors.index import MAX_ROWS, build_index
from flipkd.vectors.mapped import PIECE_BYTES, HashedFile, map_file
from flipkd.vectors.rows import STORAGE, check_dtype

SOURCE_KEY = b"flipkd.source"
DIGEST_BYTES = 16

_BATCH_ROWS = 65536  # held at a time
_DIGESTS = "digests.bin"  # lives only while sealing


def seal_store(
    path: str | Path,
    parts: Sequence[str | Path],
    header: Mapping[str, Any],
) -> dict[str, Any]:
    """Stream `parts` into the store folder `path` and seal it; a store that was there is replaced.

    The same id with the same text digest is one record: the first row answers, the others are counted. Rows with a null
    id are kept and counted, and no id finds them.

    Args:
        path: local folder; made if it is not there.
        parts: part files in row order. Their footer key "flipkd.source" holds JSON {"path", "first_row"}: where the
            part's rows stand in the input.
        header: "dtype", and whatever else store.json shall tell (encoder, template, max length, ...). Its "fingerprint"
            is the store's; without one the content_fingerprint is. "dim" matters only where there are no parts to tell
            it (else 1 is taken then).

    Returns:
        The header as stored; see VectorStore.

    Raises:
        ConflictingRecordsError: the same id with different texts; names both places.
        InputError: a part cannot be read, or is not of the form above.
        OutputError: the folder cannot be written.
        ConfigError: an id column of a type that cannot be an id, or an unknown dtype.
    """
    folder = Path(path)
    check_dtype(header["dtype"])
    sealing = folder / layout.SEALING_FOLDER
    plan = _plan(parts, header)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.rmtree(sealing, ignore_errors=True)
        sealing.mkdir(mode=0o700)
        written = _write_rows(sealing, plan, dict(header))
        files = layout.store_files(written)
        _allocate(sealing, files)
        written["counts"]["duplicate_records"] = _index(sealing, plan, written)
        (sealing / _DIGESTS).unlink()
        _publish(folder, sealing, files, written)
    except OSError as error:
        raise OutputError(f"the store {folder} cannot be written: {error.strerror or error}") from error
    return written


@dataclass(frozen=True)
class _Plan:
    parts: list[Path]
    first_rows: list[int]  # of each part, in the store
    sources: list[tuple[str, int]]  # of each part: input file, row there
    rows: int
    dim: int
    kind: str
    id_type: str

    def place(self, row: int) -> str:
        part = bisect_right(self.first_rows, row) - 1
        source, first_row = self.sources[part]
        return f"{source}, row {first_row + row - self.first_rows[part]}"


def _plan(parts: Sequence[str | Path], header: Mapping[str, Any]) -> _Plan:
    """Read the parts' footers: rows, places, width and the one kind that all their ids are kept as."""
    first_rows, sources = [], []
    dim = int(header.get("dim", 1))
    kinds: dict[str, tuple[pa.DataType, str]] = {}
    rows = 0
    for part in parts:
        with _reading(part):
            footer = pq.read_metadata(part)
            schema = footer.schema.to_arrow_schema()
        if "id" not in schema.names or "vector" not in schema.names:
            raise InputError(f"the part {part} has no columns 'id' and 'vector'; {layout.AGAIN}")
        if part is parts[0] and pa.types.is_fixed_size_binary(schema.field("vector").type):
            dim = schema.field("vector").type.byte_width // STORAGE[header["dtype"]].itemsize
        id_type = schema.field("id").type
        source = json.loads((footer.metadata or {}).get(SOURCE_KEY, b"{}"))
        first_rows.append(rows)
        sources.append((str(source.get("path", part)), int(source.get("first_row", 0))))
        kinds.setdefault(check_id_type(id_type, "id"), (id_type, sources[-1][0]))
        rows += footer.num_rows
    if rows > MAX_ROWS:
        raise InputError(f"{rows} records are more than the {MAX_ROWS} that one store holds; split the records table")
    if mixed := mixed_kinds(kinds):
        (one, one_path), (other, other_path) = (kinds[kind] for kind in mixed)
        raise InputError(f"the ids in {one_path} are of type {one}, those in {other_path} of type {other}; cast one")
    kind = widest_kind(kinds)
    id_type = kinds[kind][0] if kinds else pa.null()
    return _Plan([Path(part) for part in parts], first_rows, sources, rows, dim, kind, str(id_type))


@contextmanager
def _reading(part: str | Path) -> Iterator[None]:
    """Turns what goes wrong while reading a part into InputError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"the part {part} cannot be read ({error}); remove it and {layout.AGAIN}") from error


def _write_rows(sealing: Path, plan: _Plan, header: dict[str, Any]) -> dict[str, Any]:
    """Write all files but the table, and return the header with everything but duplicate_records."""
    vector_type = pa.binary(plan.dim * STORAGE[header["dtype"]].itemsize)
    counts = np.zeros(4, np.int64)
    id_bytes = 0
    with ExitStack() as stack:
        names = ("vectors.bin", "status.bin", "ids.bin", "offsets.bin", _DIGESTS)
        vectors, status_file, ids_file, offsets, digests = (
            stack.enter_context(HashedFile(sealing / name, hashed=name != _DIGESTS)) for name in names
        )
        if plan.kind == "bytes":
            offsets.write(np.zeros(1, np.uint64))
        for part, batch in _batches(plan.parts, vector_type):
            ids = as_kind(batch.column("id"), plan.kind, f"the part {part}")
            status = np.asarray(batch.column("status"), np.uint8) & np.uint8(7)
            status |= np.asarray(ids.is_null(), np.uint8) * np.uint8(layout.STATUS_NULL_ID)
            counts += [np.count_nonzero(status & bit) for bit in (1, 2, 4, 8)]
            vectors.write(_fixed_bytes(batch.column("vector")))
            digests.write(_fixed_bytes(batch.column("text_digest").fill_null(bytes(DIGEST_BYTES))))
            status_file.write(status)
            if plan.kind == "bytes":
                ends, data = _binary_parts(ids)
                ids_file.write(data)
                offsets.write((ends + id_bytes).astype(np.uint64))
                id_bytes += len(data)
            elif plan.kind != "null":
                ids_file.write(np.asarray(ids.fill_null(0)))
        hashes = [column.hash.digest() for column in (vectors, status_file, ids_file, offsets)]
    if plan.kind != "bytes":
        (sealing / "offsets.bin").unlink()
    if plan.kind == "null":
        (sealing / "ids.bin").unlink()
    told = f"{plan.kind} {header['dtype']} {plan.dim}".encode()
    content = hashlib.blake2b(told + b"".join(hashes), digest_size=16).hexdigest()
    counted = zip(("missing_text", "truncated", "invalid_text", "null_ids"), counts.tolist(), strict=True)
    return header | {
        "format_version": layout.FORMAT_VERSION,
        "rows": plan.rows,
        "dim": plan.dim,
        "id_kind": plan.kind,
        "id_type": plan.id_type,
        "id_bytes": id_bytes,
        "counts": dict(counted),
        "content_fingerprint": content,
        "fingerprint": header.get("fingerprint", content),
    }


def _batches(parts: list[Path], vector_type: pa.DataType) -> Iterator[tuple[Path, pa.RecordBatch]]:
    expected = {"vector": vector_type, "status": pa.uint8(), "text_digest": pa.binary(DIGEST_BYTES)}
    for part in parts:
        with ExitStack() as stack:
            with _reading(part):
                file = stack.enter_context(pq.ParquetFile(part, memory_map=True, page_checksum_verification=True))
            schema = file.schema_arrow
            for name, wanted in expected.items():
                if name not in schema.names or schema.field(name).type != wanted:
                    raise InputError(f"the part {part} has no column {name!r} of type {wanted}; {layout.AGAIN}")
            batches = file.iter_batches(_BATCH_ROWS, columns=["id", *expected])
            while True:
                with _reading(part):
                    batch = next(batches, None)
                if batch is None:
                    break
                if batch.column("vector").null_count or batch.column("status").null_count:
                    raise InputError(f"the part {part} has null vectors or status; {layout.AGAIN}")
                yield part, batch


def _fixed_bytes(array: pa.Array) -> NDArray[np.uint8]:
    width = array.type.byte_width
    return np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width : (array.offset + len(array)) * width]


def _binary_parts(ids: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Where each of the large_binary ids ends, counted from the first one's start, and their bytes."""
    if ids.null_count:
        ids = ids.fill_null(b"")
    _, offsets_buffer, data_buffer = ids.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    return offsets[1:] - offsets[0], data[offsets[0] : offsets[-1]]


def _allocate(sealing: Path, files: dict[str, int]) -> None:
    """Write the empty table. A full disk is then an error here, not a SIGBUS in the middle of a mapping."""
    if "slots.bin" in files:
        zeros = np.zeros(PIECE_BYTES, np.uint8)
        with HashedFile(sealing / "slots.bin", hashed=False) as file:
            for start in range(0, files["slots.bin"], PIECE_BYTES):
                file.write(zeros[: files["slots.bin"] - start])


def _index(sealing: Path, plan: _Plan, header: dict[str, Any]) -> int:
    """Build the table; return the number of duplicates, or raise if two of them differ in text."""
    status = map_file(sealing / "status.bin", np.uint8)
    digests = map_file(sealing / _DIGESTS, np.dtype((np.void, DIGEST_BYTES)))
    duplicates, conflicts, example = 0, 0, ""
    for block in build_index(sealing, plan.kind, status, layout.STATUS_NULL_ID):
        differs = np.flatnonzero(digests[block[:, 0]] != digests[block[:, 1]])
        if len(differs) and not conflicts:
            first, second = block[differs[0]].tolist()
            example = f"{plan.place(first)} and {plan.place(second)}"
        duplicates += len(block)
        conflicts += len(differs)
    if conflicts:
        more = f" ({conflicts - 1} more such rows)" if conflicts > 1 else ""
        raise ConflictingRecordsError(
            f"the same record id stands twice with different texts: {example} (rows counted from 0){more}; "
            "keep one row per id in the records table"
        )
    return duplicates


def _publish(folder: Path, sealing: Path, files: dict[str, int], header: dict[str, Any]) -> None:
    for name in files:
        _sync(sealing / name)
    temporary = sealing / layout.HEADER_FILE
    with HashedFile(temporary) as file:
        file.write(np.frombuffer(json.dumps(header, indent=1, default=str).encode(), np.uint8))
    # From here to the last rename a store that was there before is unsealed. Who has it mapped keeps the old files.
    (folder / layout.HEADER_FILE).unlink(missing_ok=True)
    for name in files:
        os.replace(sealing / name, folder / name)
    _sync(folder)
    os.replace(temporary, folder / layout.HEADER_FILE)
    _sync(folder)
    shutil.rmtree(sealing)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
