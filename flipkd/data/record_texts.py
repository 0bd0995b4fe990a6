"""A record table in memory, as texts by id: joins the texts to pairs that hold ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.find import Shard
from flipkd.data.location import Location
from flipkd.data.records import DIGEST_BYTES, keyed_digests, render_texts
from flipkd.data.shards import ShardReader
from flipkd.data.template import template_fields
from flipkd.errors import ConflictingRecordsError
from flipkd.vectors.id_types import as_kind, check_id_type, check_ids_fit, common_kind

_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class RecordTexts:
    """The texts of a record table.

    Args:
        ids: [N] int64, uint64 or large_binary ids, each once, none null.
        texts: [N] large_string, normalised; null where missing or invalid.
        invalid: [N] bool; True where the bytes were not UTF-8.
        kind: how ids are compared; see ``flipkd.vectors.id_types``.
    """

    ids: pa.Array
    texts: pa.LargeStringArray
    invalid: npt.NDArray[np.bool_]
    kind: str

    def look_up(self, ids: pa.ChunkedArray, column: str) -> npt.NDArray[np.int64]:
        """The record's place for each of [P] ids; -1 where the id is null or of no record.

        Integers are compared by value, whatever their width; strings and binaries by their bytes.

        Raises:
            ConfigError: integers against strings, or a type that cannot be an id; names the column.
        """
        check_ids_fit(ids.type, column, self.kind)
        # A column of nothing but nulls, or records without any: no id is found.
        if not len(self.ids) or pa.types.is_null(ids.type):
            return np.full(len(ids), -1, np.int64)
        keys = as_kind(ids, self.kind)
        numbers, order = self._sorted
        wanted = _numbers(keys)
        place = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
        rows = np.where((numbers[place] == wanted) & np.asarray(keys.is_valid()), order[place], -1)
        if self.kind == "bytes":
            hits = np.flatnonzero(rows >= 0)
            same = pc.equal(self.ids.take(pa.array(rows[hits])), keys.take(pa.array(hits)))
            if not pc.all(same, min_count=0).as_py():  # two ids of one number: about once in 10^7 tables of 10^6 ids
                rows = np.asarray(pc.fill_null(pc.index_in(keys, self.ids, skip_nulls=True), -1).cast(pa.int64()))
        return rows

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids' numbers in ascending order, and the row of each: sorted once, and not hashed for every batch."""
        numbers = _numbers(self.ids)
        order = np.argsort(numbers, kind="stable")
        return numbers[order], order


def _numbers(ids: pa.Array) -> npt.NDArray[Any]:
    """[N] numbers to sort ids by: integers themselves, of others the first 8 bytes of a digest. 0 for null."""
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.fill_null(0))
    digests = b"".join(digest or b"" for digest in keyed_digests(ids.fill_null(b""), b"flipkd ids"))
    return np.frombuffer(digests, np.uint64)[:: DIGEST_BYTES // 8]


def read_record_texts(location: Location, shards: Sequence[Shard], id_column: str, template: str) -> RecordTexts:
    """Reads a whole record table: ids and texts are kept in memory.

    Rows without an id are left out. The same id with the same text is one record.

    Raises:
        ConflictingRecordsError: the same id stands twice with different texts; names both places.
        ConfigError: a column is missing, or of a type that cannot be used.
        InputError: a file cannot be read, or ids of some files are strings and of others integers.
    """
    columns = list(dict.fromkeys([id_column, *template_fields(template)]))
    chunks: list[pa.ChunkedArray] = []
    texts: list[pa.Array] = []
    invalid: list[npt.NDArray[np.bool_]] = []
    rows: list[int] = []
    for shard in shards:
        with ShardReader(location, shard) as reader:
            check_id_type(reader.column_type(id_column), id_column)
            table = pa.concat_tables(reader.all_batches(columns, _BATCH_ROWS))
            rendered = render_texts(table, template)
        chunks.append(table.column(id_column))
        texts.append(rendered.values)
        invalid.append(rendered.invalid)
        rows.append(table.num_rows)
    kinds = {check_id_type(chunk.type, id_column): shard.name for chunk, shard in zip(chunks, shards, strict=True)}
    kind = common_kind(kinds, id_column)
    keys = [as_kind(column, kind, shard.name) for shard, column in zip(shards, chunks, strict=True)]
    ids = pa.concat_arrays(keys)
    values, flags = pa.concat_arrays(texts), np.concatenate(invalid)
    first = _first_of_each(ids, values, flags, shards, rows)
    taken = pa.array(first)
    return RecordTexts(ids.take(taken), values.take(taken), flags[first], kind)


def _first_of_each(
    ids: pa.Array,
    texts: pa.LargeStringArray,
    invalid: npt.NDArray[np.bool_],
    shards: Sequence[Shard],
    rows: Sequence[int],
) -> npt.NDArray[np.int64]:
    """The first row of each id that is not null, in order."""
    present = np.flatnonzero(np.asarray(ids.is_valid()))
    if not len(present):
        return present
    codes = np.asarray(ids.take(pa.array(present)).dictionary_encode().indices)
    first, inverse = np.unique(codes, return_index=True, return_inverse=True)[1:]
    again = np.flatnonzero(first[inverse] != np.arange(len(codes)))
    if len(again):
        one, other = present[first[inverse[again]]], present[again]
        same = pc.equal(texts.take(pa.array(one)), texts.take(pa.array(other)))
        both_null = np.asarray(texts.take(pa.array(one)).is_null()) & np.asarray(texts.take(pa.array(other)).is_null())
        agree = np.asarray(pc.fill_null(same, False)) | (both_null & (invalid[one] == invalid[other]))
        conflicts = np.flatnonzero(~agree)
        if len(conflicts):
            places = [_place(int(side[conflicts[0]]), shards, rows) for side in (one, other)]
            more = f" ({len(conflicts) - 1} more such rows)" if len(conflicts) > 1 else ""
            raise ConflictingRecordsError(
                f"the same record id stands twice with different texts: {places[0]} and {places[1]} (rows counted from "
                f"0){more}; keep one row per id in the records table"
            )
    return present[np.sort(first)]


def _place(row: int, shards: Sequence[Shard], rows: Sequence[int]) -> str:
    for shard, count in zip(shards, rows, strict=True):
        if row < count:
            return f"{shard.name}, row {row}"
        row -= count
    raise AssertionError("the row is in one of the shards")
