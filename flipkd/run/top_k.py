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
from flipkd.data.commit import ShardWriter, write_options
from flipkd.data.location import Location
from flipkd.run.manifest import UnitReport, read_output, read_reports
from flipkd.run.units import WorkUnit

LEFT_ROW = "flipkd_left_row"
SCORE = "flipkd_score"
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


def compare_candidates(candidates: Location, names: Sequence[str], k: int) -> list[Positions]:
    """For each unit's candidates, the places of those that are among the K best of all.

    Needs about 40 bytes of memory per candidate while it runs.
    """
    tables = [read_output(candidates, name, [LEFT_ROW, SCORE]) for name in names]
    if not tables:
        return []
    table = pa.concat_tables(tables)
    best = best_positions(table.column(LEFT_ROW).to_numpy(), table.column(SCORE).to_numpy(), k)
    ends = np.cumsum([part.num_rows for part in tables])
    starts = ends - [part.num_rows for part in tables]
    return [best[slice(*np.searchsorted(best, (start, end)))] - start for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class TopKTask:
    """What a worker needs to write a unit's survivors.

    Args:
        candidates: folder of the candidates, one file per unit.
        output: the output folder.
        run_fingerprint: of the run.
        keep: per unit output name, the places of the survivors.
        basis: fingerprint of the units whose candidates were compared; see ``UnitReport``.
    """

    candidates: Location
    output: Location
    run_fingerprint: str
    keep: dict[str, Positions]
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
        table = take_rows(table, pa.array(task.keep[unit.output]))
        (seen,) = read_reports(task.candidates, [unit.output])
        report = replace(seen, rows_out=table.num_rows, basis=task.basis)
        metadata = report.footer("score", task.run_fingerprint, unit.fingerprint)
        with ShardWriter(task.output, unit.output, table.schema, metadata, write_options(table)) as writer:
            writer.write(table, 1 << 20)
            writer.commit()
        return replace(report, seconds={"top_k": time.perf_counter() - started})
