"""``--top-k``: the K best pairs of each left record over the whole job, exactly.

Each unit keeps the best K of what it saw, with the row of the left record beside it; these candidates, a small part of
all pairs, are compared over all units once; then each unit writes those of its own that remain. A tie goes to the pair
that stands first in the input.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.columns import take_rows
from flipkd.data.commit import ShardWriter
from flipkd.data.encodings import write_options
from flipkd.data.location import Location
from flipkd.data.shards import each_file
from flipkd.run.manifest import UnitReport, read_output, read_reports
from flipkd.run.units import WorkUnit

LEFT_ROW = "flipkd_left_row"
SCORE = "flipkd_score"
_KEPT = pa.schema([("place", pa.int64())])
# Candidates are compared in so many parts, one after another: what a comparison takes is small beside them then.
_PARTS = 16
Positions = npt.NDArray[np.int64]


def best_positions(left: npt.NDArray[np.integer], score: npt.NDArray[np.float32], k: int) -> Positions:
    """Places of the K best scores of each left row, in input order; NaN is never among them.

    Args:
        left: [P] row of the left record.
        score: [P] scores.
        k: at least 1.
    """
    places = np.flatnonzero(~np.isnan(score))
    order = places[np.lexsort((-score[places], left[places]))]  # stable: ties stay in input order
    if not len(order):
        return order
    sorted_left = left[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_left[1:] != sorted_left[:-1])))
    sizes = np.diff(np.append(starts, len(order)))
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    return np.sort(order[rank < k])


def compare_candidates(candidates: Location, names: Sequence[str], k: int, kept: Location) -> None:
    """Writes, for each unit's candidates, the places of those that are among the K best of all.

    Needs about 16 bytes of memory per candidate while it runs.

    Args:
        candidates: folder of the candidates.
        names: of the units' outputs there.
        k: at least 1.
        kept: folder for the places, one file per unit, of the same name.

    Raises:
        InputError: candidates are damaged.
        OutputError: the places cannot be written.
    """
    stops = np.cumsum([report.rows_out for report in read_reports(candidates, names)], dtype=np.int64)
    starts = np.concatenate([[0], stops[:-1]]) if names else stops
    rows = stops[-1] if names else 0
    left, score = np.empty(rows, np.uint32), np.empty(rows, np.float32)
    for name, start, stop in zip(names, starts, stops, strict=True):
        table = read_output(candidates, name, [LEFT_ROW, SCORE])
        left[start:stop], score[start:stop] = table.column(LEFT_ROW).to_numpy(), table.column(SCORE).to_numpy()
    part = (left % _PARTS).astype(np.uint8)
    best = np.zeros(rows, np.bool_)
    for number in range(_PARTS):
        places = np.flatnonzero(part == number)
        best[places[best_positions(left[places], score[places], k)]] = True

    def write(unit: tuple[str, int, int]) -> None:
        name, start, stop = unit
        table = pa.table([pa.array(np.flatnonzero(best[start:stop]))], schema=_KEPT)
        with ShardWriter(kept, name, _KEPT, {}, write_options(table)) as writer:
            writer.write(table)
            writer.commit()

    each_file(write, zip(names, starts, stops, strict=True))


@dataclass(frozen=True)
class TopKTask:
    """What a worker needs to write a unit's survivors.

    Args:
        candidates: folder of the candidates, one file per unit.
        kept: folder of the survivors' places among a unit's candidates, see ``compare_candidates``.
        output: the output folder.
        run_fingerprint: of the run.
        basis: fingerprint of the units whose candidates were compared; see ``UnitReport``.
    """

    candidates: Location
    kept: Location
    output: Location
    run_fingerprint: str
    basis: str


class TopKWorker:
    """Writes the survivors among a unit's candidates."""

    def __init__(self, task: TopKTask, threads: int) -> None:
        del threads
        self._task = task

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        task, started = self._task, time.perf_counter()
        table = read_output(task.candidates, unit.output, None).drop_columns([LEFT_ROW, SCORE])
        table = take_rows(table, read_output(task.kept, unit.output, None).column("place").combine_chunks())
        (seen,) = read_reports(task.candidates, [unit.output])
        report = replace(seen, rows_out=table.num_rows, basis=task.basis)
        metadata = report.footer("score", task.run_fingerprint, unit.fingerprint)
        with ShardWriter(task.output, unit.output, table.schema, metadata, write_options(table)) as writer:
            writer.write(table, 1 << 20)
            writer.commit()
        return replace(report, seconds={"top_k": time.perf_counter() - started})
