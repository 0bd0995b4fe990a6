"""What a night is judged by: counted in one pass over the scores, of which no more than a batch a thread is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from flipkd.config import EncodeConfig
from flipkd.data.columns import as_numbers
from flipkd.data.find import Shard, find_shards
from flipkd.data.location import Location, open_location
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, InputError
from flipkd.nightly.stability import share
from flipkd.report.scan import ScoreCounts
from flipkd.vectors.index import IdIndex
from flipkd.vectors.store import VectorStore

_BATCH_ROWS = 1 << 18
_STEPS = 50  # of the histogram in the report: our choice
# Columns that are looked at, and the range of their histogram.
_RANGES = {"score": (-1.0, 1.0), "probability": (0.0, 1.0)}


@dataclass
class Counted:
    """Rows of scores, counted.

    Args:
        columns: per column the values that are there.
        judged: rows whose ``match`` is not null; ``matches`` those where it is true.
    """

    columns: dict[str, ScoreCounts] = field(default_factory=dict)
    judged: int = 0
    matches: int = 0

    def add(self, other: Counted) -> None:
        """Adds what another has counted."""
        for name, counts in other.columns.items():
            self.columns.setdefault(name, ScoreCounts()).add_counts(counts)
        self.judged += other.judged
        self.matches += other.matches


def count_scores(folder: str, threads: int) -> Counted:
    """Counts all rows of an output of ``score`` or ``rescore``.

    Raises:
        InputError: a file cannot be read.
    """
    location = open_location(folder)
    shards = find_shards(location)
    groups = [shards[start::threads] for start in range(min(threads, len(shards)))]
    total = Counted()
    with ThreadPoolExecutor(max_workers=len(groups)) as pool:
        for counted in pool.map(lambda group: _count(location, group), groups):
            total.add(counted)
    return total


def _count(location: Location, shards: Sequence[Shard]) -> Counted:
    total = Counted()
    for shard in shards:
        with ShardReader(location, shard) as reader:
            names = [name for name in (*_RANGES, "match") if name in reader.schema.names]
            for table in reader.all_batches(names, _BATCH_ROWS) if names else ():
                for name in names:
                    column = table.column(name)
                    if name == "match":
                        total.judged += len(column) - column.null_count
                        total.matches += pc.sum(column).as_py() or 0
                    else:
                        values = as_numbers(column).astype(np.float32)
                        total.columns.setdefault(name, ScoreCounts()).add(values[np.isfinite(values)])
    return total


def column_facts(counts: ScoreCounts, name: str, psi_bins: int) -> dict[str, Any]:
    """What ``night.json`` keeps of a column, for tonight's picture and for the next night to compare with."""
    edges = counts.equal_shares(psi_bins)
    steps = np.linspace(*_RANGES[name], _STEPS + 1)
    heights = counts.between(steps)  # the first and the last are outside: rounding may bring a cosine there
    heights[1] += heights[0]
    heights[-2] += heights[-1]
    return {
        "values": counts.total,
        "edges": [float(edge) for edge in edges],
        "counts": counts.between(edges).tolist(),
        "histogram": {"edges": steps.tolist(), "counts": heights[1:-1].tolist()},
    }


@dataclass(frozen=True)
class RecordFacts:
    """Record tables, side by side with last night's.

    Args:
        records: per table, its rows with an id.
        new: per table, those whose id last night's table did not have; None where that is not known.
    """

    records: Mapping[str, int]
    new: Mapping[str, int | None]

    def shares(self) -> dict[str, float | None]:
        """Per table, the share of new records; None where it is not known, or there are no records."""
        return {name: None if new is None else share(new, self.records[name]) for name, new in self.new.items()}


def count_records(
    tables: Mapping[str, EncodeConfig], last_stores: Path | None, threads: int, skip_bad_shards: bool
) -> RecordFacts:
    """Looks every id up in the index of last night's vector store.

    Args:
        tables: how the record table of each side (``left``, ``right``) is encoded.
        last_stores: folder of last night's stores; None where there was no night.
        threads: used by the look-up.
        skip_bad_shards: whether files that cannot be read are left out.

    Raises:
        InputError: a file of the records cannot be read.
        ConfigError: the id column is missing.
    """
    records: dict[str, int] = {}
    new: dict[str, int | None] = {}
    for side, table in tables.items():
        id_column = table.id_column
        index = None if last_stores is None else _index(last_stores / side)
        records[side], fresh = 0, 0
        location = open_location(table.records)
        for shard in find_shards(location):
            try:
                with ShardReader(location, shard) as reader:
                    for batch in reader.all_batches([id_column], _BATCH_ROWS):
                        ids = batch.column(id_column).drop_null()
                        records[side] += len(ids)
                        fresh += 0 if index is None else int(np.count_nonzero(_unknown(index, ids, id_column, threads)))
            except InputError:
                if not skip_bad_shards:
                    raise
        new[side] = None if index is None else fresh
    return RecordFacts(records, new)


def _index(store: Path) -> IdIndex | None:
    try:
        return VectorStore.open(store).index
    except InputError:  # removed since, or of another version
        return None


def _unknown(index: IdIndex, ids: Any, column: str, threads: int) -> npt.NDArray[np.bool_]:
    try:
        found: npt.NDArray[np.bool_] = index.look_up(ids, threads, column=column) < 0
        return found
    except ConfigError:  # numbers where there were words, or the other way round: no id is the same
        return np.ones(len(ids), np.bool_)
