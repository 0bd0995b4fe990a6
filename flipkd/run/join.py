"""Pairs of ids to pairs of texts: one unit in, one file out, whose rows are the unit's with both texts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.location import Location
from flipkd.data.pairs import first_reasons, id_reasons, text_reasons
from flipkd.data.record_texts import RecordTexts, read_record_texts
from flipkd.data.records import Texts
from flipkd.data.shards import Shard, ShardReader, find_shards
from flipkd.data.template import template_fields
from flipkd.run.manifest import UnitReport
from flipkd.run.score import TEXT_BATCH_ROWS
from flipkd.run.scored import ScoredBatch, StageClock, write_scored
from flipkd.run.units import Plan, WorkUnit, plan_units
from flipkd.vectors.id_types import check_id_type

# uint8 position in ``flipkd.data.pairs.REASONS``: why a pair has not got both texts.
JOIN_REASON = "flipkd.reason"


@dataclass(frozen=True)
class RecordTable:
    """A record table and its files."""

    location: Location
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class JoinTask:
    """What a worker needs to join any unit of a job.

    Args:
        pairs: root of the pair table.
        output: folder for the joined pairs.
        run_fingerprint: of the run.
        tables: record table of the left records, and of the right ones where they differ.
        id_column: of the records.
        template: of the records' texts.
        id_columns: names of the left and the right column of ids in the pairs.
        text_columns: names of the text columns that are added.
    """

    pairs: Location
    output: Location
    run_fingerprint: str
    tables: tuple[RecordTable, ...]
    id_column: str
    template: str
    id_columns: tuple[str, str]
    text_columns: tuple[str, str]


class JoinWorker:
    """Reads the record tables once and joins units: all columns, the two normalised texts, and ``JOIN_REASON``."""

    def __init__(self, task: JoinTask, threads: int) -> None:
        del threads  # one unit is one thread's work
        self._task = task
        tables = [
            read_record_texts(table.location, table.shards, task.id_column, task.template) for table in task.tables
        ]
        self._sides: tuple[RecordTexts, RecordTexts] = (tables[0], tables[-1])

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        task = self._task
        with ShardReader(task.pairs, unit.shard) as reader:
            names = reader.schema.names
            columns = list(dict.fromkeys([*task.id_columns, *names]))

            def joined(table: pa.Table, clock: StageClock) -> ScoredBatch:
                return ScoredBatch(clock.timed("join", self._join, table, names), None, None)

            return write_scored(
                unit,
                unit.read(reader, columns, TEXT_BATCH_ROWS),
                joined,
                output=task.output,
                kind="join",
                run_fingerprint=task.run_fingerprint,
            )

    def _join(self, table: pa.Table, names: list[str]) -> pa.Table:
        task = self._task
        result, reasons = table.select(names), []
        for records, id_column, text_column in zip(self._sides, task.id_columns, task.text_columns, strict=True):
            texts, own = texts_of_ids(records, table.column(id_column), id_column)
            reasons.append(own)
            result = result.append_column(pa.field(text_column, pa.large_string()), texts)
        return result.append_column(JOIN_REASON, pa.array(first_reasons(*reasons)))


def texts_of_ids(
    records: RecordTexts, ids: pa.ChunkedArray, id_column: str
) -> tuple[pa.LargeStringArray, npt.NDArray[np.uint8]]:
    """The normalised texts of [N] ids, null where there is none, and [N] position in ``REASONS`` of why."""
    places = records.look_up(ids, id_column)
    found = places >= 0
    texts = records.texts.take(pa.array(places, mask=~found))
    invalid = np.zeros(len(places), np.bool_)
    invalid[found] = records.invalid[places[found]]
    own = id_reasons(ids, found)
    return texts, np.where(own != 0, own, text_reasons(Texts(texts, invalid)))


def id_kind(table: RecordTable, id_column: str, template: str) -> str:
    """How the ids of a record table are compared; also looks for its columns, so that a wrong name fails early."""
    with ShardReader(table.location, table.shards[0]) as reader:
        reader.check_columns([id_column, *template_fields(template)])
        return check_id_type(reader.column_type(id_column), id_column)


def joined_plan(plan: Plan, joined: Location, failed: set[str]) -> Plan:
    """The plan of a job over joined pairs: the same units, read from the files that the join made of them.

    Args:
        plan: over the pairs of ids.
        joined: folder of the joined pairs.
        failed: outputs of units that were skipped.
    """
    units = [unit for unit in plan.units if unit.output not in failed]
    if not units:
        return replace(plan, units=[])
    whole = plan_units(joined, find_shards(joined), 2**62, "")
    by_name = {unit.shard.name: unit for unit in whole.units}
    made = [by_name[unit.output] for unit in units]
    return replace(
        plan,
        units=[
            replace(unit, shard=file.shard, row_groups=file.row_groups, skip_rows=0)
            for unit, file in zip(units, made, strict=True)
        ],
    )
