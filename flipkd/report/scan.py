"""Read all scores once, batch after batch, and keep counts and the few rows that matter: memory grows with those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.find import Shard
from flipkd.data.location import Location
from flipkd.data.pairs import REASONS
from flipkd.data.shards import ShardReader, each_file
from flipkd.errors import ConfigError
from flipkd.run.units import fingerprint

_BATCH_ROWS = 1 << 18
# A score's cell is the highest bits of its float32: exact for the sign and exponent, and 2**-11 of the value.
_CELL_SHIFT = 12
_SIGN = np.uint32(1 << 31)

REASON = "reason"
COLUMN_OPTIONS = "--score-column, --label-column, --weight-column, --key and --slice name columns"
# Why a row has no score where its own column does not tell.
NO_SCORE, NOT_FINITE = "no_score", "not_finite"
_KNOWN = pa.array([name for name in REASONS if name is not None], pa.string())


class ScoreCounts:
    """How many scores lie where, over any number of rows, in 8 MiB."""

    def __init__(self) -> None:
        self._cells = np.zeros(1 << (32 - _CELL_SHIFT), np.int64)
        self.smallest, self.largest = np.inf, -np.inf

    def add(self, scores: npt.NDArray[np.float32]) -> None:
        """Counts [N] finite scores."""
        if len(scores):
            self._cells += np.bincount(_cell(scores), minlength=len(self._cells))
            self.smallest = min(self.smallest, float(scores.min()))
            self.largest = max(self.largest, float(scores.max()))

    @property
    def total(self) -> int:
        """Number of scores."""
        return int(self._cells.sum())

    def add_counts(self, other: ScoreCounts) -> None:
        """Counts what another has counted too."""
        self._cells += other._cells
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)

    def at_least(self, threshold: float) -> int:
        """Scores of at least ``threshold``; those within 0.05 % of it are counted too."""
        return int(self._cells[_cell(np.array([threshold], np.float32))[0] :].sum())

    def between(self, edges: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[E + 1] scores below the first of E rising edges, from each edge to the next, and from the last one on.

        An edge counts as the largest cell edge that is not above it: exact for those of ``equal_shares``.
        """
        bounds = _cell(np.asarray(edges, np.float32))
        sums = np.concatenate([[0], np.cumsum(self._cells)])[np.concatenate([[0], bounds, [len(self._cells)]])]
        found: npt.NDArray[np.int64] = np.diff(sums)
        return found

    def equal_shares(self, steps: int) -> npt.NDArray[np.float32]:
        """[E] rising edges between about ``steps`` steps of equal share; a score of more than that share has its own.

        Without any score there is no edge.
        """
        total = self.total
        if not total:
            return np.empty(0, np.float32)
        places = np.searchsorted(np.cumsum(self._cells), total * np.arange(1, steps) / steps) + 1
        heavy = np.flatnonzero(self._cells * steps >= total)
        return _lowest(np.unique(np.concatenate([places, heavy, heavy + 1])))


def _cell(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """[N] cells, in the order of the scores: bits of negative floats are turned, so that bits compare like floats."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return (ordered >> np.uint32(_CELL_SHIFT)).astype(np.int64)


def _lowest(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """[N] float32, the lowest score of each cell."""
    ordered = cells.astype(np.uint32) << np.uint32(_CELL_SHIFT)
    return np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered).astype(np.uint32).view(np.float32)


@dataclass
class RowCounts:
    """Rows of the scores.

    Args:
        rows: all of them.
        unscored: rows without a score, per reason.
        scores: the scores.
    """

    rows: int = 0
    unscored: Counter[str] = field(default_factory=Counter)
    scores: ScoreCounts = field(default_factory=ScoreCounts)


@dataclass(frozen=True, eq=False)
class ScoreBatch:
    """A batch of N rows.

    Args:
        table: the columns asked for.
        first_row: number of its first row among all rows.
        score: [N] float32; NaN where there is none.
        reason: [N] why a row has no score; null where it has one.
    """

    table: pa.Table
    first_row: int
    score: npt.NDArray[np.float32]
    reason: pa.Array


def scores_identity(location: Location, shards: Sequence[Shard]) -> str:
    """Fingerprint of a scores folder: names and sizes, so that a copy is the same; flipkd's names tell the run."""
    return fingerprint({"scores": [(shard.name, shard.size_bytes) for shard in shards]})


def column_names(location: Location, shards: Sequence[Shard]) -> list[str]:
    """Columns of the first shard, hive partitions too."""
    with ShardReader(location, shards[0]) as reader:
        return [*reader.schema.names, *(name for name, _ in shards[0].partitions if name not in reader.schema.names)]


def count_rows(location: Location, shards: Sequence[Shard]) -> int:
    """Rows of all shards, from their footers."""

    def rows(shard: Shard) -> int:
        with ShardReader(location, shard) as reader:
            return sum(reader.row_group_rows)

    return sum(each_file(rows, shards))


def scan(
    location: Location,
    shards: Sequence[Shard],
    score_column: str,
    columns: Sequence[str],
    counts: RowCounts,
    advance: Callable[[int], object] = lambda rows: None,
) -> Iterator[ScoreBatch]:
    """Gives all rows in order, and counts them.

    Args:
        location: root of the scores.
        shards: its files.
        score_column: name of the score.
        columns: further columns to read; those that a shard lacks are an error.
        counts: filled on the way.
        advance: told the rows of each batch, for a progress bar.

    Raises:
        ConfigError: a column is missing, or the score is no number.
        InputError: a shard cannot be read.
    """
    has_reason = REASON in column_names(location, shards)
    wanted = list(dict.fromkeys([score_column, *([REASON] if has_reason else []), *columns]))
    for shard in shards:
        with ShardReader(location, shard) as reader:
            groups = reader.row_group_rows
            rows = sum(groups)
            reader.check_columns(wanted, COLUMN_OPTIONS)
            for table in reader.batches(wanted, _BATCH_ROWS, row_groups=(0, len(groups)), skip_rows=0, rows=rows):
                score = _scores(table.column(score_column), score_column, location.naming(shard.name))
                why = _reasons(table, score, score_column, has_reason)
                scored = score[~np.isnan(score)]
                counts.scores.add(scored)
                for value in pc.value_counts(why.drop_null()).to_pylist():
                    counts.unscored[value["values"]] += value["counts"]
                yield ScoreBatch(table, counts.rows, score, why)
                counts.rows += table.num_rows
                advance(table.num_rows)


def _scores(column: pa.ChunkedArray, name: str, source: str) -> npt.NDArray[np.float32]:
    """[N] float32, NaN for null; an infinite score is none either."""
    check_score_type(column.type, name, source)
    values = column.cast(pa.float64(), safe=False).cast(pa.float32(), safe=False)
    found = np.array(values.combine_chunks().fill_null(np.nan).to_numpy(zero_copy_only=False), np.float32)
    found[~np.isfinite(found)] = np.nan
    return found


def check_score_type(kind: pa.DataType, name: str, source: str) -> None:
    """Refuses a column that holds no numbers.

    Raises:
        ConfigError: names the file, the column and its type.
    """
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise ConfigError(f"{source}: column {name!r} has type {kind}, which is no score; name one with --score-column")


def _reasons(table: pa.Table, score: npt.NDArray[np.float32], score_column: str, has_reason: bool) -> pa.Array:
    own = pc.if_else(table.column(score_column).combine_chunks().is_null(), pa.scalar(NO_SCORE), pa.scalar(NOT_FINITE))
    if has_reason:
        told = table.column(REASON).combine_chunks().cast(pa.string())
        # A column of that name that is not flipkd's may hold anything, and reports hold nothing of records.
        told = pc.if_else(pc.is_in(told, _KNOWN), told, pa.scalar(None, pa.string()))
        own = pc.coalesce(told, own)
    return pc.if_else(pa.array(np.isnan(score)), own, pa.scalar(None, pa.string()))
