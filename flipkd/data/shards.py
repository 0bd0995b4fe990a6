"""Reads the Parquet files of a table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flipkd.data.find import Shard
from flipkd.data.location import Location, reason
from flipkd.errors import ColumnError, ConfigError, InputError

One = TypeVar("One")
Found = TypeVar("Found")
_AT_ONCE = 16
_BUFFER_BYTES = 1 << 16  # measured: larger ones cost more, since they do not stay in the cache


def each_file(look: Callable[[One], Found], files: Iterable[One]) -> list[Found]:
    """What ``look`` finds in each file, in order.

    Threads hide the latency of a footer's few small reads, on a disk and still more on an object store.

    Args:
        look: takes one of ``files``, on any thread; what it raises for the first of them is raised.
        files: shards, names, or whatever else stands for a file.
    """
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return list(pool.map(look, files))


class ShardReader:
    """An open shard. A context manager; every error of the file becomes an InputError that names it.

    Args:
        location: root of the table.
        shard: the file.
        may_skip: whether the command can go on without the file; errors say so.
    """

    def __init__(self, location: Location, shard: Shard, may_skip: bool = False) -> None:
        self._location, self._shard = location, shard
        self._way_out = (
            "mend or remove the file, or pass --on-bad-shard skip" if may_skip else "mend or remove the file"
        )
        with self._naming():
            if location.is_local:
                # Read, not mapped: a mapped file that is cut off under its reader, or that the disk cannot give, is a
                # SIGBUS that ends the process.
                self._source: Any = pa.OSFile(shard.path)
            else:
                self._source = location.filesystem.open_input_file(shard.path)
            try:
                self._check_unchanged()
                # Checksums are there only where the writer has been told to write them.
                buffer_bytes = _BUFFER_BYTES if location.is_local else 0
                self._file = pq.ParquetFile(
                    self._source,
                    buffer_size=buffer_bytes,
                    page_checksum_verification=True,
                    # Spark's own precision; in nanoseconds, Arrow's usual choice, years like 1 and 9999 would wrap.
                    coerce_int96_timestamp_unit="us",
                )
                self.schema = pa.schema([_with_wide_indices(field) for field in self._file.schema_arrow])
                self.schema.names  # noqa: B018  (fails where a name is not UTF-8)
            except BaseException:
                self._source.close()
                raise

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        self._source.close()
        if isinstance(error, ColumnError):  # of many files it may be one alone whose types are others
            raise ColumnError(f"{self._location.naming(self._shard.name)}: {error}") from error

    def _check_unchanged(self) -> None:
        """Refuses a file that is not the one that was listed: its rows would go out under the other one's name."""
        shard = self._shard
        if self._location.is_local:
            status, unit_ns = os.stat(shard.path), 1
            size, modified_ns = status.st_size, status.st_mtime_ns
        else:  # where a listing may tell fractions of a second that a look at one object does not
            info, unit_ns = self._location.filesystem.get_file_info(shard.path), 10**9
            size, modified_ns = info.size, info.mtime_ns or 0
        is_another = shard.modified_ns and modified_ns // unit_ns != shard.modified_ns // unit_ns
        if size != shard.size_bytes or is_another:
            raise InputError(
                f"{self._location.naming(shard.name)} has changed since it was listed; run again when it is at rest"
            )

    @property
    def row_group_rows(self) -> list[int]:
        """Rows of each row group.

        Raises:
            InputError: the footer contradicts itself: what it tells may be fewer rows than there are.
        """
        with self._naming():
            footer = self._file.metadata
            groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
            rows = [group.num_rows for group in groups]
            if min(rows, default=0) < 0 or sum(rows) != footer.num_rows:
                raise pa.ArrowInvalid("its footer contradicts itself in the number of rows")
        return rows

    @property
    def metadata(self) -> dict[str, str]:
        """Key-value pairs of the footer."""
        found = self._file.metadata.metadata or {}
        return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in found.items()}

    def column_type(self, column: str) -> pa.DataType:
        """Type of a column that is there; those from folder names are strings."""
        return self.schema.field(column).type if column in self.schema.names else pa.string()

    def check_columns(self, columns: Sequence[str], way_out: str = "") -> None:
        """Refuses columns that the shard does not have, or has twice.

        Args:
            columns: names.
            way_out: what to do about a column that is not there.

        Raises:
            ConfigError: names the file, the column and the columns there are.
        """
        place = self._location.naming(self._shard.name)
        known = [*self.schema.names, *(key for key, _ in self._shard.partitions)]
        for column in columns:
            count = self.schema.names.count(column)
            if count > 1:
                raise ConfigError(f"{place} has {count} columns named {column!r}; rename or drop one")
            if column not in known:
                told = f"{place} has no column {column!r}; it has {', '.join(known)}"
                raise ConfigError(f"{told}; {way_out}" if way_out else told)

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
            batches = self._decoded(stored, batch_rows, row_groups)
        while seen < skip_rows + rows:
            with self._naming():
                batch = next(batches)
                for column in batch.columns:
                    _check_dictionary(column)
            start, stop = max(skip_rows - seen, 0), min(skip_rows + rows - seen, batch.num_rows)
            seen += batch.num_rows
            if start < stop:
                table = _widened(batch.slice(start, stop - start)).select(stored)
                yield _with_partitions(table, self._shard, columns, stop - start)
        with self._naming():
            self._check_unchanged()

    def _decoded(self, stored: list[str], batch_rows: int, row_groups: tuple[int, int]) -> Iterator[pa.RecordBatch]:
        groups = range(*row_groups)
        # Arrow cannot read a list of dictionaries over the border of two row groups.
        one_by_one = any(_holds_dictionary(self.schema.field(column).type) for column in stored)
        for some in [[group] for group in groups] if one_by_one else [list(groups)]:
            yield from self._file.iter_batches(batch_rows, row_groups=some, columns=stored, use_threads=False)

    def all_batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
        """Reads all rows; see ``batches``."""
        groups = self.row_group_rows
        return self.batches(columns, batch_rows, row_groups=(0, len(groups)), skip_rows=0, rows=sum(groups))

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, StopIteration, UnicodeDecodeError, OverflowError, MemoryError) as error:
            name = self._location.naming(self._shard.name)
            raise InputError(f"cannot read {name}: {reason(error) or 'rows are missing'}; {self._way_out}") from error


def _check_dictionary(column: pa.Array) -> None:
    """Arrow does not check a dictionary's indices when it reads them from a file as they are."""
    if pa.types.is_dictionary(column.type):
        last = pc.max(column.indices).as_py()
        if last is not None and (last >= len(column.dictionary) or pc.min(column.indices).as_py() < 0):
            raise pa.ArrowInvalid("an index points outside its dictionary")
    elif _holds_dictionary(column.type):
        column.validate(full=True)


def _holds_dictionary(kind: pa.DataType) -> bool:
    children = [kind.field(position).type for position in range(kind.num_fields)]
    return any(pa.types.is_dictionary(child) or _holds_dictionary(child) for child in children)


def _with_wide_indices(field: pa.Field) -> pa.Field:
    """Of a dictionary column: as wide as the dictionaries of many row groups together may need."""
    kind = field.type
    if not pa.types.is_dictionary(kind) or kind.index_type.bit_width >= 32:
        return field
    return field.with_type(pa.dictionary(pa.int32(), kind.value_type, kind.ordered))


def _widened(batch: pa.RecordBatch) -> pa.Table:
    """The batch without metadata of the file, its dictionaries as ``_with_wide_indices`` says."""
    fields = [_with_wide_indices(field) for field in batch.schema]
    columns = [
        column
        if column.type == field.type
        else pa.DictionaryArray.from_arrays(
            column.indices.cast(pa.int32()), column.dictionary, ordered=column.type.ordered
        )
        for column, field in zip(batch.columns, fields, strict=True)
    ]
    return pa.table(columns, schema=pa.schema(fields))


def _with_partitions(table: pa.Table, shard: Shard, columns: Sequence[str], rows: int) -> pa.Table:
    """The columns in the wanted order, those of the folder names among them."""
    if len(columns) == table.num_columns:
        return table
    values = dict(shard.partitions)
    constants = {
        column: pa.repeat(pa.scalar(values[column], pa.string()), rows)
        for column in columns
        if column not in table.schema.names
    }
    fields = [pa.field(name, pa.string()) if name in constants else table.schema.field(name) for name in columns]
    return pa.table(
        [constants[name] if name in constants else table.column(name) for name in columns], schema=pa.schema(fields)
    )
