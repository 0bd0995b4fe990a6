"""A stratified sample of a huge run to label: drawn in two passes over the scores, read back with its weights.

Strata are equal steps of the score between the lowest and the highest. Matches are rare and score high: in a plain
sample most pairs would be obvious non-matches. Each stratum gives about as many pairs as any other (our choice), drawn
at random, and each of them stands for (rows of the stratum) / (pairs drawn from it). Sums over the sample with these
weights are unbiased estimates of sums over the run (Horvitz and Thompson); precision and recall are ratios of them.

What no labelled pair shows, no interval knows: a few matches among very many low scores are most often missed, and then
recall and ROC AUC look too good (``unseen_matches_limit`` says how many there can be). Over 100 samples of 400 from
20,000 made-up pairs with 2 % matches, the 95 % interval held the truth 95 times for recall at precision 0.95, 89 times
for precision at recall 0.5, 79 times for average precision, and 51 times for ROC AUC.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.columns import first_clash, take_rows
from flipkd.data.commit import ShardWriter
from flipkd.data.find import Shard
from flipkd.data.json_files import parse_object
from flipkd.data.labels import read_labels
from flipkd.data.location import Location
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, InputError
from flipkd.report.labels import read_table
from flipkd.report.pairs import LabelledPairs, PairCounts, slice_values
from flipkd.report.scan import RowCounts, column_names, scan

STRATUM, STRATUM_ROWS, WEIGHT = "sample_stratum", "sample_stratum_rows", "sample_weight"
SAMPLE_KEY = "flipkd.sample"
_STRATA = 20
# A stratum's spread cannot be told from one pair.
_LEAST_PER_STRATUM = 2


@dataclass(frozen=True, eq=False)
class Strata:
    """Equal steps of the score.

    Args:
        edges: [H - 1] inner edges, increasing; a score on an edge is above it.
    """

    edges: npt.NDArray[np.float32]

    def of(self, score: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """[N] stratum of each score, 0 the lowest."""
        return np.searchsorted(self.edges, score, side="right").astype(np.int64)

    def __len__(self) -> int:
        return len(self.edges) + 1


def equal_steps(smallest: float, largest: float, strata: int = _STRATA) -> Strata:
    """Strata between two scores."""
    return Strata(np.unique(np.linspace(smallest, largest, strata + 1)[1:-1].astype(np.float32)))


def random_numbers(seed: int) -> np.random.Generator:
    """Random numbers of our own: made-up data that was drawn with the plain seed must not be sampled by the numbers
    that made it."""
    return np.random.default_rng([seed, int.from_bytes(b"flipkd")])


class Reservoirs:
    """The rows of least random priority of each stratum, over any number of batches: a uniform sample of each.

    Args:
        strata: the strata.
        capacity: rows kept of each.
        generator: of the priorities.
    """

    def __init__(self, strata: Strata, capacity: int, generator: np.random.Generator) -> None:
        self._strata, self._capacity, self._generator = strata, capacity, generator
        self.rows = np.zeros(len(strata), np.int64)
        self._kept: list[pa.Table | None] = [None] * len(strata)
        self._priority = [np.empty(0) for _ in range(len(strata))]

    def add(self, table: pa.Table, score: npt.NDArray[np.float32]) -> None:
        """Takes a batch of N rows; those without a score (NaN) are not sampled."""
        stratum = np.where(np.isnan(score), -1, self._strata.of(score))
        self.rows += np.bincount(stratum[stratum >= 0], minlength=len(self._strata))
        priority = self._generator.random(len(score))
        for number in np.unique(stratum[stratum >= 0]):
            kept, priorities = self._kept[number], self._priority[number]
            places = np.flatnonzero(stratum == number)
            if len(priorities) == self._capacity:
                places = places[priority[places] < priorities.max()]
            if len(places) > self._capacity:
                places = places[np.argpartition(priority[places], self._capacity)[: self._capacity]]
            if not len(places):
                continue
            fresh = take_rows(table, pa.array(np.sort(places)))
            both = np.concatenate([priorities, priority[np.sort(places)]])
            whole = fresh if kept is None else pa.concat_tables([kept, fresh])
            if len(both) > self._capacity:
                best = np.sort(np.argpartition(both, self._capacity)[: self._capacity])
                whole, both = take_rows(whole, pa.array(best)), both[best]
            self._kept[number], self._priority[number] = whole, both

    def draw(self, size: int) -> pa.Table:
        """About ``size`` rows over all strata, with stratum, its rows, weight, and an empty label to fill in."""
        shares = allocate(self.rows, size)
        parts = []
        for number, (share, kept) in enumerate(zip(shares.tolist(), self._kept, strict=True)):
            if kept is None or not share:
                continue
            best = np.sort(np.argsort(self._priority[number], kind="stable")[:share])
            part = take_rows(kept, pa.array(best))
            rows = int(self.rows[number])
            for name, value in ((STRATUM, number), (STRATUM_ROWS, rows)):
                part = part.append_column(name, pa.array(np.full(len(best), value, np.int64)))
            parts.append(part.append_column(WEIGHT, pa.array(np.full(len(best), rows / len(best)))))
        return pa.concat_tables(parts)


def allocate(rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """[H] pairs to draw of each stratum: equal, at least two (one where ``size`` is below 2 H), at most what it has.

    What is left goes to others.
    """
    shares = np.minimum(rows, min(_LEAST_PER_STRATUM, max(size // len(rows), 1)))
    while (left := size - int(shares.sum())) > 0 and (room := np.flatnonzero(shares < rows)).size:
        step = max(left // len(room), 1)
        for place in room[:left] if step == 1 else room:
            shares[place] = min(rows[place], shares[place] + step)
    return shares


def check_sample_columns(scores: Location, shards: Sequence[Shard], label_column: str) -> None:
    """Refuses scores that have columns of the names that the sample adds.

    Raises:
        ConfigError: names one.
    """
    names = column_names(scores, shards)
    clash = first_clash(names, (label_column, STRATUM, STRATUM_ROWS, WEIGHT))
    if clash is not None:
        raise ConfigError(
            f"the scores have a column {clash!r} already; name another with --label-column"
            if clash.casefold() == label_column.casefold()
            else f"the scores have a column {clash!r}, which the sample adds; rename it"
        )


def draw_sample(
    scores: Location,
    shards: Sequence[Shard],
    score_column: str,
    label_column: str,
    size: int,
    seed: int,
    advance: Callable[[int], object],
) -> tuple[pa.Table, RowCounts]:
    """Draws a sample of the pairs with a score; ``check_sample_columns`` has looked at the scores before.

    Raises:
        InputError: no row has a score, or a shard cannot be read.
    """
    names = column_names(scores, shards)
    counts = RowCounts()
    for _ in scan(scores, shards, score_column, [], counts, advance):
        pass
    if not counts.scores.total:
        raise InputError(f"{scores.uri} has no row with a score to sample")
    few = min(_STRATA, max(size // _LEAST_PER_STRATUM, 1))  # or a small sample would be larger than was asked for
    strata = equal_steps(counts.scores.smallest, counts.scores.largest, few)
    reservoirs = Reservoirs(strata, size, random_numbers(seed))
    for batch in scan(scores, shards, score_column, names, RowCounts(), advance):
        reservoirs.add(batch.table.select(names), batch.score)
    table = reservoirs.draw(size)
    return table.append_column(label_column, pa.nulls(table.num_rows, pa.int8())), counts


def write_sample(table: pa.Table, target: Location, facts: dict[str, str | int]) -> None:
    """Publishes the sample as one file."""
    folder, _, name = target.path.rpartition("/")
    root = Location(folder or "/", folder or "/", target.filesystem)
    with ShardWriter(root, name, table.schema, {SAMPLE_KEY: json.dumps(facts, sort_keys=True)}, {}) as writer:
        writer.write(table)
        writer.commit()


def is_sample(location: Location, shards: Sequence[Shard]) -> bool:
    """Whether a table of labels is a sample drawn here: it has the strata with it."""
    return {STRATUM, STRATUM_ROWS} <= set(column_names(location, shards))


def sample_facts(location: Location, shard: Shard) -> dict[str, str | int]:
    """What the footer says of where the sample is from; empty where another program has written the file anew."""
    with ShardReader(location, shard) as reader:
        value = reader.metadata.get(SAMPLE_KEY, "{}")
    try:
        return parse_object(value)
    except ValueError as error:
        raise InputError(f"{location.uri}: its footer {SAMPLE_KEY} is damaged: {error}") from error


def read_sample(
    location: Location, shards: Sequence[Shard], score_column: str, label_column: str, slices: Sequence[str]
) -> tuple[LabelledPairs, PairCounts]:
    """Reads a sample whose labels are filled in; scores are its own.

    A pair stands for (rows of its stratum) / (labelled pairs of it): where some stayed unlabelled, the others of the
    stratum stand for them too. A stratum without any label is not represented.

    Raises:
        ConfigError: a column is missing, or of a type that cannot be used.
        InputError: a label is neither 0 nor 1, or a stratum or score is null.
    """
    table = read_table(
        location, shards, list(dict.fromkeys([score_column, label_column, STRATUM, STRATUM_ROWS, *slices]))
    )
    labels = read_labels(table.column(label_column), label_column, location.uri, allows_null=True)
    labelled = np.flatnonzero(np.asarray(labels.is_valid()))
    try:
        stratum, rows = (np.asarray(table.column(name).cast(pa.int64())) for name in (STRATUM, STRATUM_ROWS))
        score = np.asarray(table.column(score_column).cast(pa.float32(), safe=False)).astype(np.float32)
    except pa.ArrowException:  # left out of the chain: it quotes a value
        raise ConfigError(f"{location.uri}: {STRATUM}, {STRATUM_ROWS} and {score_column} must be numbers") from None
    nulls = [name for name in (STRATUM, STRATUM_ROWS, score_column) if table.column(name).null_count]
    if nulls:
        raise InputError(
            f"{location.uri}: column {nulls[0]!r} is null in some row; keep what the sample was drawn with"
        )
    label = np.asarray(labels.fill_null(0)) > 0.5
    strata, first, drawn = np.unique(stratum, return_index=True, return_counts=True)
    place = np.searchsorted(strata, stratum[labelled])
    answered = np.bincount(place, minlength=len(strata))
    weight = rows[first][place] / answered[place]
    counts = PairCounts()
    counts.sample = {
        "pairs": int(drawn.sum()),
        "labelled": len(labelled),
        "strata": len(strata),
        "strata_without_labels": int(np.count_nonzero(answered == 0)),
        "rows_represented": int(rows[first][answered > 0].sum()),
        "unseen_matches_limit": _unseen(rows[first], answered, np.bincount(place, weights=label[labelled])),
    }
    values = {name: slice_values(take_rows(table.select([name]), pa.array(labelled)).column(0)) for name in slices}
    pairs = LabelledPairs(
        score[labelled], label[labelled], weight, stratum[labelled], labelled.astype(np.int64), values
    )
    return pairs, counts


def _unseen(rows: npt.NDArray[np.int64], answered: npt.NDArray[np.int64], matches: npt.NDArray[Any]) -> int:
    """Matches that strata without a labelled match can hold, 95 % upper bound.

    No match among the labelled pairs has probability prod (1 - p_h)^n_h <= exp(-sum n_h p_h), which is at least 0.05
    only if sum n_h p_h <= 3; then sum N_h p_h is at most 3 times the largest N_h / n_h.
    """
    matches = np.pad(matches, (0, len(rows) - len(matches)))
    empty = (matches == 0) & (answered > 0) & (answered < rows)
    if not empty.any():
        return 0
    return int(np.ceil(-np.log(0.05) * (rows[empty] / answered[empty]).max()))
