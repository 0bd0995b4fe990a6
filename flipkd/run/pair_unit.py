"""One unit of pairs to one file, whatever the score: read, score, write, count, commit."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.commit import ShardWriter
from flipkd.data.encodings import write_options
from flipkd.data.location import Location
from flipkd.data.pairs import REASONS
from flipkd.data.shards import ShardReader
from flipkd.run.manifest import UnitReport
from flipkd.run.units import WorkUnit

T = TypeVar("T")


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of P pairs, scored.

    Args:
        table: the rows to write.
        reason: [P] uint8 position in ``REASONS``, or None when every pair was scored.
        truncated: [P] bool, or None when no text was cut.
        counts: further counts.
    """

    table: pa.Table
    reason: npt.NDArray[np.uint8] | None
    truncated: npt.NDArray[np.bool_] | None
    counts: Mapping[str, int] = field(default_factory=dict)


class StageClock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, function: Callable[..., T], *arguments: Any) -> T:
        """Calls the function and adds the time it took to the stage."""
        started = time.perf_counter()
        result = function(*arguments)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        return result


def write_scored(
    unit: WorkUnit,
    reader: ShardReader,
    batches: Iterator[pa.Table],
    score: Callable[[pa.Table, StageClock], ScoredBatch],
    *,
    output: Location,
    kind: str,
    run_fingerprint: str,
    metadata: Mapping[str, str] | None = None,
    basis: str = "",
) -> UnitReport:
    """Scores the batches of a unit and commits its output.

    Args:
        unit: the unit.
        reader: of its file.
        batches: its rows, at least one table.
        score: from a batch to what is written of it.
        output: the output folder.
        kind: of the job, for the footer.
        run_fingerprint: of the run.
        metadata: further key-value pairs for the footer.
        basis: see ``UnitReport``.
    """
    clock = StageClock()
    rows_in = rows_out = 0
    counts: Counter[str] = Counter(truncated=0)
    reasons = np.zeros(len(REASONS), np.int64)
    with contextlib.ExitStack() as stack:
        writer: ShardWriter | None = None
        while (table := clock.timed("read", next, batches, None)) is not None:
            scored = score(table, clock)
            if writer is None:
                options = write_options(scored.table)
                schema = _with_whole_table(scored.table.schema, reader)
                shard = ShardWriter(output, unit.output, schema, dict(metadata or {}), options)
                writer = stack.enter_context(shard)
            clock.timed("write", writer.write, scored.table)
            rows_in += table.num_rows
            rows_out += scored.table.num_rows
            if scored.reason is not None:
                reasons += np.bincount(scored.reason, minlength=len(REASONS))
            if scored.truncated is not None:
                counts["truncated"] += int(np.count_nonzero(scored.truncated))
            counts.update(scored.counts)
        assert writer is not None  # a reader gives at least one table
        counted = {name: int(count) for name, count in zip(REASONS, reasons, strict=True) if name is not None}
        report = UnitReport(unit.output, rows_in, rows_out, counted, counts, clock.seconds, basis=basis)
        writer.add_metadata(report.footer(kind, run_fingerprint, unit.fingerprint))
        clock.timed("write", writer.commit)
    return report


def _with_whole_table(schema: pa.Schema, reader: ShardReader) -> pa.Schema:
    """The schema with what the input tells of its columns (pandas' types and index, GeoParquet), where all are written.

    Spark's and other keys stay behind: their readers would not see the new columns.
    """
    is_whole = set(reader.schema.names) <= set(schema.names)
    kept = {key: value for key, value in reader.metadata.items() if is_whole and key in ("pandas", "geo")}
    return schema.with_metadata(kept) if kept else schema


def reason_column(codes: npt.NDArray[np.uint8] | None, rows: int) -> pa.Array:
    """[rows] strings, null where the code is 0 (or there are no codes)."""
    if codes is None or not codes.any():
        return pa.nulls(rows, pa.string())
    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int8) - 1, mask=codes == 0), pa.array(REASONS[1:], pa.string())
    ).cast(pa.string())
