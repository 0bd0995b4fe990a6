"""Pairs of ids to pairs of texts: one unit in, one file out, whose rows are the unit's with both texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.find import Shard, find_shards
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import first_reasons, id_reasons, text_reasons
from flipkd.data.record_texts import RecordTexts, read_record_texts
from flipkd.data.records import Texts
from flipkd.data.shards import ShardReader, each_file
from flipkd.record_sides import RecordSide
from flipkd.run.manifest import UnitReport
from flipkd.run.pair_unit import ScoredBatch, StageClock, write_scored
from flipkd.run.record_schema import RecordSchema
from flipkd.run.score_unit import TEXT_BATCH_ROWS
from flipkd.run.units import Plan, WorkUnit, plan_units

# uint8 position in ``flipkd.data.pairs.REASONS``: why a pair has not got both texts.
JOIN_REASON = "flipkd.reason"


@dataclass(frozen=True)
class RecordTable:
    """A record table whose schema has been looked at.

    Args:
        location: its root.
        shards: its files.
        id_column: of the records.
        template: of their texts.
        id_kind: how their ids are compared; see ``flipkd.vectors.id_types``.
    """

    location: Location
    shards: tuple[Shard, ...]
    id_column: str
    template: str
    id_kind: str

    def facts(self) -> dict[str, Any]:
        """What decides the texts: for the fingerprint of a run."""
        return {"id_column": self.id_column, "template": self.template, "shards": shard_facts(self.shards)}

    def read(self) -> RecordTexts:
        """The whole table; see ``read_record_texts``."""
        return read_record_texts(self.location, self.shards, self.id_column, self.template)


def shard_facts(shards: Sequence[Shard]) -> list[tuple[str, int, int]]:
    """Name, size and time of each file: for the fingerprint of a run."""
    return [(shard.name, shard.size_bytes, shard.modified_ns) for shard in shards]


def record_tables(sides: Sequence[RecordSide]) -> tuple[RecordTable, ...]:
    """Finds the files of each side's table and looks at all their schemas.

    Raises:
        ConfigError: a column is missing, or of a type that cannot be used.
        InputError: a file cannot be read, or the ids of some are integers and of others strings.
    """
    return tuple(map(_record_table, sides))


def _record_table(side: RecordSide) -> RecordTable:
    location = open_location(side.records)
    schema = RecordSchema(side.id_column, side.text_template, side.is_right)
    shards = tuple(find_shards(location))

    def look(shard: Shard) -> None:
        with ShardReader(location, shard) as reader:
            schema.look(shard, reader)

    each_file(look, shards)
    return RecordTable(location, shards, side.id_column, side.text_template, schema.id_kind)


@dataclass(frozen=True)
class JoinTask:
    """What a worker needs to join any unit of a job.

    Args:
        pairs: root of the pair table.
        output: folder for the joined pairs.
        run_fingerprint: of the run.
        tables: record table of the left records, and of the right ones where they differ.
        id_columns: names of the left and the right column of ids in the pairs.
        text_columns: names of the text columns that are added.
    """

    pairs: Location
    output: Location
    run_fingerprint: str
    tables: tuple[RecordTable, ...]
    id_columns: tuple[str, str]
    text_columns: tuple[str, str]


class JoinWorker:
    """Reads the record tables once and joins units: all columns, the two normalised texts, and ``JOIN_REASON``."""

    def __init__(self, task: JoinTask, threads: int) -> None:
        del threads  # one unit is one thread's work
        self._task = task
        tables = [table.read() for table in task.tables]
        self._sides: tuple[RecordTexts, RecordTexts] = (tables[0], tables[-1])

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        task = self._task
        with ShardReader(task.pairs, unit.shard, may_skip=True) as reader:
            names = reader.schema.names
            columns = list(dict.fromkeys([*task.id_columns, *names]))

            def joined(table: pa.Table, clock: StageClock) -> ScoredBatch:
                return ScoredBatch(clock.timed("join", self._join, table, names), None, None)

            return write_scored(
                unit,
                reader,
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
