"""Work units: the plan of a job, made from the input's footers alone.

A *unit* is a range of rows of one input file: whole row groups where scoring reads them, a slice of one where encoding
it takes minutes. The name of its output is a function of the unit and of the run's fingerprint, so listing the output
folder tells which units are done and whose they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from flipkd.data.find import Shard, is_hidden
from flipkd.data.location import Location
from flipkd.data.shards import ShardReader, each_file
from flipkd.errors import InputError

FINGERPRINT_CHARACTERS = 12


def fingerprint(values: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a mapping of plain values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class WorkUnit:
    """One piece of work: a range of rows of one shard, and the name of what it makes.

    Args:
        shard: the input file.
        first_row: first row in the file, from 0.
        rows: number of rows; 0 for an empty file, whose output is empty too.
        row_groups: start and stop of the row groups that hold the rows.
        skip_rows: rows of the first of these row groups that belong to an earlier unit.
        output: name of the output below the output folder.
        fingerprint: of the run, the input file's name, size and time, and the rows.
    """

    shard: Shard
    first_row: int
    rows: int
    row_groups: tuple[int, int]
    skip_rows: int
    output: str
    fingerprint: str

    def read(self, reader: ShardReader, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
        """The unit's rows; see ``ShardReader.batches``."""
        return reader.batches(columns, batch_rows, row_groups=self.row_groups, skip_rows=self.skip_rows, rows=self.rows)


@dataclass(frozen=True)
class Plan:
    """All units of a job, in input order.

    Args:
        units: the work.
        bad_shards: (name, error) of files whose footer cannot be read, when those are skipped.
        bytes_in: size of the input files.
    """

    units: list[WorkUnit]
    bad_shards: list[tuple[str, str]] = field(default_factory=list)
    bytes_in: int = 0

    @property
    def rows(self) -> int:
        """Rows of all units."""
        return sum(unit.rows for unit in self.units)


Footer = list[int] | InputError
Check = Callable[[Shard, ShardReader], object]


def plan_fingerprint(plan: Plan, run_fingerprint: str) -> str:
    """Of one run over one input, so that work for another input is never taken for this one's."""
    return fingerprint({"run": run_fingerprint, "units": [unit.fingerprint for unit in plan.units]})


def work_name(plan: Plan, run_fingerprint: str) -> str:
    """Name of the folder for the work of one run over one input."""
    return f"work-{plan_fingerprint(plan, run_fingerprint)[:16]}"


def without_failed(plan: Plan, found: Plan, done: Container[str]) -> Plan:
    """The plan of a job after a stage before it: the units that the stage passed on, and those that are done already.

    A unit that failed in the stage, and was skipped, must not be worked on by halves.

    Args:
        plan: of the job.
        found: the units that the stage passed on; they replace the plan's.
        done: outputs of the job that are there.
    """
    passed = {unit.output: unit for unit in found.units}
    units = [passed.get(unit.output, unit) for unit in plan.units if unit.output in passed or unit.output in done]
    return replace(plan, units=units)


def plan_units(
    location: Location,
    shards: Sequence[Shard],
    rows_per_unit: int,
    run_fingerprint: str,
    *,
    split_row_groups: bool = False,
    skip_bad_shards: bool = False,
    check: Check | None = None,
) -> Plan:
    """Reads the footers of the shards and cuts them into units; see ``read_footers`` and ``cut_units``."""
    footers = read_footers(location, shards, skip_bad_shards, check)
    return cut_units(shards, footers, rows_per_unit, run_fingerprint, split_row_groups)


def read_footers(
    location: Location, shards: Sequence[Shard], skip_bad_shards: bool, check: Check | None = None
) -> list[Footer]:
    """Opens each file once.

    Args:
        location: root of the table.
        shards: its files.
        skip_bad_shards: give the error of an unreadable file in place of raising it.
        check: looks at each file while it is open; it may be called on several threads.

    Returns:
        For each shard the rows of its row groups, or why they cannot be read.

    Raises:
        InputError: a footer cannot be read, or a file that was named itself has a name that says that it is no data:
            the outputs, named after it, would say so too.
        FlipkdError: what ``check`` raises.
    """
    for shard in shards:
        if is_hidden(posixpath.basename(shard.name)):
            raise InputError(f"{shard.path}: names that begin with _ or . are of files that are no data; rename it")
    return each_file(lambda shard: _read_footer(location, shard, skip_bad_shards, check), shards)


def cut_units(
    shards: Sequence[Shard],
    footers: Sequence[Footer],
    rows_per_unit: int,
    run_fingerprint: str,
    split_row_groups: bool = False,
) -> Plan:
    """Cuts the shards into units of about ``rows_per_unit`` rows.

    Args:
        shards: files of a table.
        footers: of each, from ``read_footers``; one that could not be read is listed in the plan.
        rows_per_unit: rows of a unit; a larger row group is one unit, unless ``split_row_groups`` cuts it.
        run_fingerprint: of everything that decides the output besides the input.
        split_row_groups: whether units may begin and end inside a row group (worth it where reading is the small part).
    """
    units: list[WorkUnit] = []
    bad: list[tuple[str, str]] = []
    for shard, rows in zip(shards, footers, strict=True):
        if isinstance(rows, InputError):
            bad.append((shard.name, str(rows)))
            continue
        cut = _split if split_row_groups else _group
        units.extend(_unit(shard, *piece, run_fingerprint) for piece in cut(rows, rows_per_unit) or [(0, 0, (0, 0), 0)])
    return Plan(units, bad, sum(shard.size_bytes for shard in shards))


_Piece = tuple[int, int, tuple[int, int], int]  # first row, rows, row groups, rows to skip


def _group(rows: Sequence[int], rows_per_unit: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    start = first_row = 0
    while start < len(rows):
        stop, count = start, 0
        while stop < len(rows) and (stop == start or count + rows[stop] <= rows_per_unit):
            count += rows[stop]
            stop += 1
        pieces.append((first_row, count, (start, stop), 0))
        start, first_row = stop, first_row + count
    return pieces


def _split(rows: Sequence[int], rows_per_unit: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    total, first_row, group, group_row = sum(rows), 0, 0, 0
    while first_row < total:
        while group_row + rows[group] <= first_row:
            group_row += rows[group]
            group += 1
        count = min(rows_per_unit, total - first_row)
        stop, stop_row = group, group_row
        while stop_row < first_row + count:
            stop_row += rows[stop]
            stop += 1
        pieces.append((first_row, count, (group, stop), first_row - group_row))
        first_row += count
    return pieces


def _read_footer(location: Location, shard: Shard, keep_error: bool, check: Check | None) -> Footer:
    with contextlib.ExitStack() as opened:
        try:
            reader = opened.enter_context(ShardReader(location, shard, may_skip=True))
            rows = reader.row_group_rows
        except InputError as error:
            if keep_error:
                return error
            raise
        if check is not None:
            check(shard, reader)
    return rows


def _unit(
    shard: Shard, first_row: int, rows: int, row_groups: tuple[int, int], skip_rows: int, run_fingerprint: str
) -> WorkUnit:
    own = fingerprint(
        {
            "run": run_fingerprint,
            "name": shard.name,
            "size_bytes": shard.size_bytes,
            "modified_ns": shard.modified_ns,
            "rows": (first_row, rows),
        }
    )
    stem = posixpath.splitext(shard.name)[0]
    output = f"{stem}.rows{first_row:012d}-{first_row + rows:012d}.{own[:FINGERPRINT_CHARACTERS]}.parquet"
    return WorkUnit(shard, first_row, rows, row_groups, skip_rows, output, own)
