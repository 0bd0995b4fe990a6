"""Labels kept apart from the scores: a small table in memory, joined to the scores by ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.find import Shard
from flipkd.data.labels import read_labels
from flipkd.data.location import Location
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, InputError
from flipkd.vectors.id_types import as_kind, check_id_type, mixed_kinds

# Options that name columns of a table of labels, for messages.
LABEL_OPTIONS = "--key, --label-column and --weight-column"

# Far from where sums of squares leave the range of a float64.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-30, 1e30

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class KeyColumn:
    """The distinct ids of one key column of the labels.

    Args:
        name: of the column.
        kind: ``int64``, ``uint64`` or ``bytes``; see ``flipkd.vectors.id_types``.
        values: [V] distinct, without null.
    """

    name: str
    kind: str
    values: pa.Array

    def codes(self, column: pa.ChunkedArray, source: str) -> npt.NDArray[np.int64]:
        """[N] place of each id among the values; -1 for a null and for an id that is not there.

        Raises:
            ConfigError: the ids are of another kind.
        """
        if mixed_kinds(dict.fromkeys([check_id_type(column.type, self.name), self.kind])):
            raise ConfigError(
                f"key column {self.name!r} has type {column.type} in {source} and other ids in --labels; "
                "cast one of them: both must be integers, or both strings"
            )
        places = pc.index_in(as_kind(column, self.kind), self.values, skip_nulls=True)
        return np.asarray(places.fill_null(-1)).astype(np.int64)


@dataclass(frozen=True)
class LabelCounts:
    """Rows of the table of labels; pairs are told apart by their keys.

    Args:
        rows: all of them.
        unlabelled: with a null label.
        null_key: with a label and a null id.
        duplicates: that repeat a pair with the same label; one is used.
        conflicts: that give a pair both labels; none of them is used.
        pairs: labelled pairs that remain.
    """

    rows: int
    unlabelled: int
    null_key: int
    duplicates: int
    conflicts: int
    pairs: int


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Labels of L pairs.

    Args:
        key: the key columns.
        code: [L] strictly increasing, one number for all key columns.
        label: [L] bool.
        weight: [L].
        counts: what became of the rows.
    """

    key: tuple[KeyColumn, ...]
    code: npt.NDArray[np.int64]
    label: npt.NDArray[np.bool_]
    weight: Floats
    counts: LabelCounts

    def find(self, table: pa.Table, source: str) -> npt.NDArray[np.int64]:
        """[N] place of each row's pair among the labels, or -1."""
        code = _combined([column.codes(table.column(column.name), source) for column in self.key], self.key)
        if not len(self.code):
            return np.full(len(code), -1, np.int64)
        place = np.searchsorted(self.code, code)
        place[place == len(self.code)] = 0
        return np.where((code >= 0) & (self.code[place] == code), place, -1)


def _combined(codes: Sequence[npt.NDArray[np.int64]], key: Sequence[KeyColumn]) -> npt.NDArray[np.int64]:
    """[N] one number for the codes of all key columns; -1 where any is."""
    total = codes[0].copy()
    for code, column in zip(codes[1:], key[1:], strict=True):
        total = np.where((total < 0) | (code < 0), -1, total * len(column.values) + code)
    return total


def read_table(location: Location, shards: Sequence[Shard], columns: Sequence[str] | None) -> pa.Table:
    """All rows of a small table, and the columns asked for (None: all of them); types follow the first shard.

    Raises:
        ConfigError: a column is missing.
        InputError: a file cannot be read, or its types do not fit the first one's.
    """
    tables: list[pa.Table] = []
    for shard in shards:
        with ShardReader(location, shard) as reader:
            groups = reader.row_group_rows
            wanted = columns if columns is not None else reader.schema.names
            reader.check_columns(wanted, f"{LABEL_OPTIONS} name columns")
            tables += reader.batches(wanted, 1 << 20, row_groups=(0, len(groups)), skip_rows=0, rows=sum(groups))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the files of {location.uri} have columns of one name and types that do not fit") from error


def read_weights(table: pa.Table, column: str, source: str, rows: npt.NDArray[np.int64] | None = None) -> Floats:
    """[N] weights from a column; ``rows`` are the numbers of the table's rows in the source, where they differ.

    Raises:
        ConfigError: it holds no numbers.
        InputError: a weight is null, negative or not finite, or its square may not be; named by its row.
    """
    kind = table.schema.field(column).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ConfigError(f"{source}: weight column {column!r} has type {kind}; weights are numbers")
    values = np.asarray(table.column(column).cast(pa.float64(), safe=False).fill_null(np.nan))
    bad = ~(np.isfinite(values) & (values >= 0))
    extreme = (values != 0) & ~bad & ~((values >= _LEAST_WEIGHT) & (values <= _MOST_WEIGHT))
    for wrong in (bad, extreme):
        if not wrong.any():
            continue
        row = int(np.argmax(wrong)) if rows is None else int(rows[np.argmax(wrong)])
        if wrong is extreme:
            told = f"is neither 0 nor from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g} in row {row}; scale the weights"
            raise InputError(f"{source}: weight column {column!r} {told}")
        raise InputError(f"{source}: weight column {column!r} is null, negative or not finite in row {row}; mend it")
    return values


def read_label_table(
    location: Location, shards: Sequence[Shard], key: Sequence[str], label_column: str, weight_column: str | None
) -> LabelTable:
    """Reads labels and keys.

    Raises:
        ConfigError: a column is missing or of a type that cannot be used.
        InputError: a file cannot be read, or a label is neither 0 nor 1.
    """
    columns = [*key, label_column, *([weight_column] if weight_column is not None else [])]
    table = read_table(location, shards, columns)
    source = location.uri
    labels = read_labels(table.column(label_column), label_column, source, allows_null=True)
    labelled = np.asarray(labels.is_valid())
    key_columns = tuple(_key_column(table.column(name), name) for name in key)
    code = _combined([column.codes(table.column(column.name), source) for column in key_columns], key_columns)
    spread = 1
    for column in key_columns:
        spread *= max(len(column.values), 1)
    if spread >= 2**63:
        raise InputError(f"{source}: too many distinct ids in the key columns; name fewer with --key")
    used = np.flatnonzero(labelled & (code >= 0))
    weight = np.ones(len(code)) if weight_column is None else read_weights(table, weight_column, source)
    label = np.asarray(labels.fill_null(0)) > 0.5
    distinct, first, inverse, repeats = np.unique(
        code[used], return_index=True, return_inverse=True, return_counts=True
    )
    matches = np.bincount(inverse, weights=label[used], minlength=len(distinct))
    agrees = (matches == 0) | (matches == repeats)
    kept = used[first[agrees]]
    counts = LabelCounts(
        rows=len(code),
        unlabelled=int(np.count_nonzero(~labelled)),
        null_key=int(np.count_nonzero(labelled & (code < 0))),
        duplicates=int((repeats[agrees] - 1).sum()),
        conflicts=int(repeats[~agrees].sum()),
        pairs=len(kept),
    )
    return LabelTable(key_columns, distinct[agrees], label[kept], weight[kept], counts)


def _key_column(column: pa.ChunkedArray, name: str) -> KeyColumn:
    kind = check_id_type(column.type, name)
    return KeyColumn(name, kind, pc.unique(as_kind(column, kind)).drop_null())
