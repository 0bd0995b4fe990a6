"""The labelled pairs of a run: from labels beside the scores, from a table of labels, or from a labelled sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.columns import take_rows
from flipkd.data.find import Shard
from flipkd.data.labels import read_labels
from flipkd.data.location import Location
from flipkd.report.labels import Floats, LabelTable, read_weights
from flipkd.report.scan import RowCounts, ScoreBatch, scan

Names = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class LabelledPairs:
    """N pairs with a score and a label.

    Args:
        score: [N] float32.
        label: [N] bool; true for a match.
        weight: [N] how many pairs of the run each stands for.
        stratum: [N] what was sampled together; resampling stays inside.
        row: [N] row number in the scores, or in the sample.
        slices: per slice column [N] strings, null where the column is.
    """

    score: npt.NDArray[np.float32]
    label: npt.NDArray[np.bool_]
    weight: Floats
    stratum: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    slices: dict[str, pa.Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.score)

    @property
    def has_both_classes(self) -> bool:
        """Whether anything can be told apart."""
        heavy = self.label[self.weight > 0]
        return bool(heavy.any() and not heavy.all())

    def take(self, places: npt.NDArray[Any]) -> LabelledPairs:
        """The pairs of these places, or where a mask is true."""
        indices = np.flatnonzero(places) if places.dtype == np.bool_ else places
        slices = {name: values.take(pa.array(indices)) for name, values in self.slices.items()}
        return LabelledPairs(
            self.score[indices],
            self.label[indices],
            self.weight[indices],
            self.stratum[indices],
            self.row[indices],
            slices,
        )


@dataclass
class PairCounts:
    """What became of the labels.

    Args:
        unscored: per reason [labelled pairs, matches among them]; they are in no metric but ``recall_ceiling``.
        unscored_match_weight: weight of the matches among them.
        repeated: rows of the scores whose pair stood in an earlier row already; the first one counts.
        unmatched: labelled pairs that the scores do not have, and the matches among them.
        labels: rows of the table of labels, where there is one.
        sample: strata of the sample, where it is one.
    """

    unscored: dict[str, list[int]] = field(default_factory=dict)
    unscored_match_weight: float = 0.0
    repeated: int = 0
    unmatched: int = 0
    unmatched_matches: int = 0
    labels: dict[str, int] | None = None
    sample: dict[str, float] | None = None

    def add_unscored(self, reasons: pa.Array, label: npt.NDArray[np.bool_], weight: Floats) -> None:
        """Counts labelled pairs without a score."""
        self.unscored_match_weight += float(weight[label].sum())
        for reason, is_match in zip(reasons.to_pylist(), label.tolist(), strict=True):
            entry = self.unscored.setdefault(str(reason), [0, 0])
            entry[0] += 1
            entry[1] += int(is_match)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class _Gathered:
    """Labelled rows, batch after batch."""

    def __init__(self, slices: Sequence[str]) -> None:
        self._parts: list[tuple[Any, ...]] = []
        self._slices: dict[str, list[pa.Array]] = {name: [] for name in slices}

    def add(self, batch: ScoreBatch, rows: npt.NDArray[np.int64], label: Names, weight: Floats) -> None:
        """Keeps rows of a batch."""
        self._parts.append((batch.score[rows], label, weight, batch.first_row + rows))
        for name, parts in self._slices.items():
            parts.append(slice_values(take_rows(batch.table.select([name]), pa.array(rows)).column(0)))

    def pairs(self) -> LabelledPairs:
        """All of them."""
        empty = (np.empty(0, np.float32), np.empty(0, np.bool_), np.empty(0), np.empty(0, np.int64))
        score, label, weight, row = (np.concatenate(part) for part in zip(*(self._parts or [empty]), strict=True))
        slices = {name: pa.concat_arrays(parts or [pa.nulls(0, pa.string())]) for name, parts in self._slices.items()}
        return LabelledPairs(score, label, weight, np.zeros(len(score), np.int64), row, slices)


def slice_values(column: pa.ChunkedArray) -> pa.Array:
    """[N] strings; a value of bytes that are no UTF-8 is written as hexadecimal, a nested one as one word."""
    values = column.combine_chunks()
    values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        return values.cast(pa.string())
    except (pa.ArrowException, UnicodeDecodeError):
        if pa.types.is_nested(values.type):
            return pc.if_else(values.is_null(), pa.scalar(None, pa.string()), pa.scalar(str(values.type)))
        return pa.array([None if value is None else _told(value) for value in values.to_pylist()], pa.string())


def _told(value: Any) -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:  # one by one: a value must not be written in two ways, in two batches
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def from_label_column(
    scores: Location,
    shards: Sequence[Shard],
    score_column: str,
    label_column: str,
    weight_column: str | None,
    slices: Sequence[str],
    advance: Callable[[int], object],
) -> tuple[LabelledPairs, RowCounts, PairCounts]:
    """Labels that stand beside the scores; null is unlabelled.

    Raises:
        ConfigError: a column is missing or of a type that cannot be used.
        InputError: a shard cannot be read, or a label is neither 0 nor 1.
    """
    rows, counts, gathered = RowCounts(), PairCounts(), _Gathered(slices)
    columns = [label_column, *slices, *([weight_column] if weight_column is not None else [])]
    for batch in scan(scores, shards, score_column, columns, rows, advance):
        labels = read_labels(
            batch.table.column(label_column), label_column, scores.uri, first_row=batch.first_row, allows_null=True
        )
        labelled = np.asarray(labels.is_valid())
        label = np.asarray(labels.fill_null(0)) > 0.5
        found = np.flatnonzero(labelled)
        weight = np.ones(len(label))
        if weight_column is not None:
            rows_found = batch.first_row + found
            weight[found] = read_weights(take_rows(batch.table, found), weight_column, scores.uri, rows_found)
        _keep(batch, found, label[found], weight[found], gathered, counts)
    return gathered.pairs(), rows, counts


def from_label_table(
    scores: Location,
    shards: Sequence[Shard],
    score_column: str,
    table: LabelTable,
    slices: Sequence[str],
    advance: Callable[[int], object],
) -> tuple[LabelledPairs, RowCounts, PairCounts]:
    """Labels of another table, by the key columns.

    Raises:
        ConfigError: a column is missing or of a type that cannot be used.
        InputError: a shard cannot be read.
    """
    rows, counts, gathered = RowCounts(), PairCounts(), _Gathered(slices)
    seen = np.zeros(len(table.label), np.bool_)
    columns = [*(column.name for column in table.key), *slices]
    for batch in scan(scores, shards, score_column, columns, rows, advance):
        place = table.find(batch.table, scores.uri)
        found = np.flatnonzero(place >= 0)
        _, first = np.unique(place[found], return_index=True)
        fresh = np.zeros(len(found), np.bool_)
        fresh[first] = True
        fresh &= ~seen[place[found]]
        counts.repeated += int(np.count_nonzero(~fresh))
        found = found[fresh]
        seen[place[found]] = True
        _keep(batch, found, table.label[place[found]], table.weight[place[found]], gathered, counts)
    counts.unmatched = int(np.count_nonzero(~seen))
    counts.unmatched_matches = int(np.count_nonzero(table.label & ~seen))
    counts.labels = asdict(table.counts)
    return gathered.pairs(), rows, counts


def _keep(
    batch: ScoreBatch,
    found: npt.NDArray[np.int64],
    label: npt.NDArray[np.bool_],
    weight: Floats,
    gathered: _Gathered,
    counts: PairCounts,
) -> None:
    scored = ~np.isnan(batch.score[found])
    if not scored.all():
        counts.add_unscored(batch.reason.take(pa.array(found[~scored])), label[~scored], weight[~scored])
    gathered.add(batch, found[scored], label[scored], weight[scored])
