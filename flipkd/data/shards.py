"""Find, read and commit Parquet shards, on a local disk or any filesystem that pyarrow or fsspec knows.

A *shard* is one input file. A *commit* is the rename of a hidden temporary file to its final name (on an object store:
the one PUT that closes the upload); a reader never sees half a file, and a file that is there is whole.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import posixpath
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from flipkd.errors import ConfigError, InputError, OutputError

logger = logging.getLogger(__name__)

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
TEMPORARY_SUFFIX = ".tmp"
# Native pyarrow filesystems; every other scheme goes through fsspec.
_ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs")


@dataclass(frozen=True)
class Location:
    """A folder or file on some filesystem.

    Args:
        uri: as the user gave it (made absolute when local), so that another process can open it again.
        path: the path that ``filesystem`` knows.
        filesystem: a pyarrow filesystem.
    """

    uri: str
    path: str
    filesystem: pafs.FileSystem

    @property
    def is_local(self) -> bool:
        """Whether the files can be mapped and renamed by the operating system."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> Location:
        """The location of ``name`` below this one."""
        return Location(f"{self.uri.rstrip('/')}/{name}", posixpath.join(self.path, name), self.filesystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_location, (self.uri,))


def open_location(uri: str | os.PathLike[str]) -> Location:
    """Opens a local path or a URI such as ``s3://bucket/folder``.

    Raises:
        ConfigError: the scheme is not known, or its fsspec package is not installed.
    """
    text = os.fspath(uri)
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if scheme in ("", "file"):
        path = os.path.abspath(urllib.parse.unquote(text[len("file://") :]) if scheme else text)
        return Location(path, path, pafs.LocalFileSystem())
    try:
        if scheme in _ARROW_SCHEMES:
            filesystem, path = pafs.FileSystem.from_uri(text)
            return Location(text, path, filesystem)
        import fsspec

        remote, path = fsspec.core.url_to_fs(text)
        return Location(text, path, pafs.PyFileSystem(pafs.FSSpecHandler(remote)))
    except (ValueError, ImportError, pa.ArrowException) as error:
        raise ConfigError(f"cannot open the location {text!r}: {error}") from error


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a table.

    Args:
        path: path on its filesystem.
        name: path below the table's root, ``/`` between its parts.
        size_bytes: size of the file.
        modified_ns: time of the last change, nanoseconds since 1970 (0 where the filesystem tells none).
        partitions: hive partition columns from the folder names, values kept as the text they are (``007`` stays
            ``007``); None for hive's null.
    """

    path: str
    name: str
    size_bytes: int
    modified_ns: int
    partitions: tuple[tuple[str, str | None], ...] = ()


def find_shards(location: Location) -> list[Shard]:
    """Lists the Parquet files of a folder (or the one file), sorted by name.

    Names that start with ``_`` or ``.`` (``_SUCCESS``, ``_metadata``, checksums, temporary files) and files of other
    endings are not part of the table.

    Raises:
        InputError: the path does not exist, or holds no Parquet file.
    """
    info = location.filesystem.get_file_info(location.path)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{location.uri} does not exist")
    if info.type == pafs.FileType.File:
        return [_shard(info, posixpath.basename(location.path))]
    shards, others = [], 0
    selector = pafs.FileSelector(location.path, recursive=True)
    try:
        found = location.filesystem.get_file_info(selector)
    except OSError as error:
        raise InputError(f"cannot list {location.uri}: {_reason(error)}") from error
    root = location.path.rstrip("/") + "/"
    for info in found:
        name = info.path[len(root) :] if info.path.startswith(root) else info.path.lstrip("/")
        if info.type != pafs.FileType.File or any(_is_hidden(part) for part in name.split("/")):
            continue
        if name.lower().endswith(PARQUET_SUFFIXES):
            shards.append(_shard(info, name))
        else:
            others += 1
    if others:
        logger.warning("%s: %d files that do not end in .parquet are not read", location.uri, others)
    if not shards:
        raise InputError(f"{location.uri} holds no .parquet file")
    return sorted(shards, key=lambda shard: shard.name)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _shard(info: Any, name: str) -> Shard:
    partitions = []
    for part in name.split("/")[:-1]:
        key, separator, value = part.partition("=")
        if separator:
            text = urllib.parse.unquote(value)
            partitions.append((urllib.parse.unquote(key), None if text == HIVE_NULL else text))
    return Shard(info.path, name, info.size or 0, info.mtime_ns or 0, tuple(partitions))


class ShardReader:
    """An open shard. A context manager; every error of the file becomes an InputError that names it.

    Args:
        location: root of the table.
        shard: the file.
    """

    def __init__(self, location: Location, shard: Shard) -> None:
        self._location, self._shard = location, shard
        with self._naming():
            if location.is_local:
                self._source: Any = pa.memory_map(shard.path) if shard.size_bytes else pa.BufferReader(b"")
            else:
                self._source = location.filesystem.open_input_file(shard.path)
            try:
                self._file = pq.ParquetFile(self._source)
                self.schema: pa.Schema = self._file.schema_arrow
            except BaseException:
                self._source.close()
                raise

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._source.close()

    @property
    def row_group_rows(self) -> list[int]:
        """Rows of each row group."""
        footer = self._file.metadata
        return [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]

    def check_columns(self, columns: Sequence[str]) -> None:
        """Refuses columns that the shard does not have, or has twice.

        Raises:
            ConfigError: names the file, the column and the columns there are.
        """
        place = f"{self._shard.name} of {self._location.uri}"
        known = [*self.schema.names, *(key for key, _ in self._shard.partitions)]
        for column in columns:
            count = self.schema.names.count(column)
            if count > 1:
                raise ConfigError(f"{place} has {count} columns named {column!r}")
            if column not in known:
                raise ConfigError(f"{place} has no column {column!r}; it has {', '.join(known)}")

    def batches(
        self, columns: Sequence[str], batch_rows: int, *, row_groups: tuple[int, int], skip_rows: int, rows: int
    ) -> Iterator[pa.Table]:
        """Reads a range of rows, columns matched by name, as tables of at most ``batch_rows`` rows.

        Only ``columns`` are decoded. Hive partition columns that are asked for come as string columns. A range without
        rows gives one empty table, so that the schema is known.

        Args:
            columns: names, in the wanted order.
            batch_rows: rows of a table at most.
            row_groups: start and stop of the row groups that hold the rows.
            skip_rows: rows of these row groups before the range.
            rows: rows in the range.

        Raises:
            InputError: the file cannot be read.
            ConfigError: a column is not there.
        """
        self.check_columns(columns)
        stored = [column for column in columns if column in self.schema.names]
        if not rows or not stored:  # nothing to decode: the number of rows is all there is
            empty = pa.schema([self.schema.field(column) for column in stored]).empty_table()
            yield _with_partitions(empty, self._shard, columns, rows)
            return
        seen = 0
        with self._naming():
            batches = self._file.iter_batches(
                batch_rows, row_groups=list(range(*row_groups)), columns=stored, use_threads=False
            )
        while seen < skip_rows + rows:
            with self._naming():
                batch = next(batches)
            start, stop = max(skip_rows - seen, 0), min(skip_rows + rows - seen, batch.num_rows)
            seen += batch.num_rows
            if start < stop:
                table = pa.Table.from_batches([batch.slice(start, stop - start)]).select(stored)
                yield _with_partitions(table.replace_schema_metadata(None), self._shard, columns, stop - start)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, StopIteration) as error:
            raise InputError(
                f"cannot read {self._shard.name} of {self._location.uri}: {_reason(error) or 'rows are missing'}; "
                "mend or remove the file, or pass --on-bad-shard skip"
            ) from error


def _with_partitions(table: pa.Table, shard: Shard, columns: Sequence[str], rows: int) -> pa.Table:
    values = dict(shard.partitions)
    for position, column in enumerate(columns):
        if column not in table.schema.names:
            constant = pa.repeat(pa.scalar(values[column], pa.string()), rows)
            table = table.add_column(position, pa.field(column, pa.string()), constant)
    return table


class ShardWriter:
    """Writes one output shard under a hidden temporary name and publishes it on ``commit``.

    Used as a context manager: leaving it without ``commit`` removes the temporary file.

    Args:
        root: the output folder.
        name: final name below it.
        schema: Arrow schema of the rows.
        metadata: key-value pairs for the Parquet footer.
        options: further keyword arguments of ``pyarrow.parquet.ParquetWriter``.
    """

    def __init__(
        self, root: Location, name: str, schema: pa.Schema, metadata: dict[str, str], options: dict[str, Any]
    ) -> None:
        self._final = root.child(name)
        folder, base = posixpath.split(self._final.path)
        temporary = posixpath.join(folder, f".{base}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
        # An object store shows a key only when its upload is closed, so the final name itself is written there.
        self._path = temporary if root.is_local else self._final.path
        self._local = root.is_local
        self._closed = False
        try:
            with writing(self._final.uri):
                if self._local:
                    make_private_folder(folder)
                    os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                self._sink = root.filesystem.open_output_stream(self._path)
                self._writer = pq.ParquetWriter(self._sink, schema, **options)
                self._writer.add_key_value_metadata(metadata)
        except BaseException:
            self._remove()
            raise

    def write(self, table: pa.Table, row_group_rows: int | None = None) -> None:
        """Appends rows; each call starts a new row group (or several of at most ``row_group_rows``)."""
        with writing(self._final.uri):
            self._writer.write_table(table, row_group_size=row_group_rows)

    def add_metadata(self, metadata: dict[str, str]) -> None:
        """Adds key-value pairs to the footer."""
        self._writer.add_key_value_metadata(metadata)

    def commit(self) -> None:
        """Flushes to the disk and renames; after this the shard is there, whole."""
        with writing(self._final.uri):
            self._writer.close()
            self._sink.close()
            if self._local:
                sync(self._path)
                os.replace(self._path, self._final.path)
                sync(os.path.dirname(self._final.path))
        self._closed = True

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._closed:
            return
        if not self._local:
            # Closing would publish half an object: the upload is given up instead.
            abort = getattr(self._sink, "abort", None)
            if abort is not None:
                with contextlib.suppress(OSError):
                    abort()
            return
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
            self._sink.close()
        self._remove()

    def _remove(self) -> None:
        if self._local:
            with contextlib.suppress(OSError):
                Path(self._path).unlink()


@contextlib.contextmanager
def writing(target: str) -> Iterator[None]:
    """Turns errors of the operating system while writing ``target`` into an OutputError that names it."""
    try:
        yield
    except OSError as error:
        hint = "free some space and run again, finished units are kept" if error.errno == errno.ENOSPC else "run again"
        raise OutputError(f"cannot write {target}: {_reason(error)}; {hint}") from error


def make_private_folder(path: str) -> None:
    """Makes a local folder and its parents; new ones get mode 0700."""
    Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)


def sync(path: str) -> None:
    """Waits until a local file or folder is on the disk, so that a power cut cannot empty a committed name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error).split("\n")[0]
