"""What a job says of itself: a report per unit, the plan file while it runs, and ``_manifest.json`` at its end.

Counts also stand in each output's footer, so that a folder tells its own state without any other file.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.data.commit import read_json
from flipkd.data.json_files import check_fields, parse_object
from flipkd.data.location import Location, may_pass, reason
from flipkd.data.shards import each_file
from flipkd.errors import InputError

MANIFEST = "_manifest.json"
WORK_FOLDER = ".flipkd"
PLAN = f"{WORK_FOLDER}/plan.json"
UNIT_KEY = "flipkd.unit"
SOURCE_KEY = "flipkd.source"
_END_BYTES = 1 << 16  # what Arrow reads first too: the footer of nearly every output


class DamagedOutputError(InputError):
    """A file that is not an output of flipkd, or not whole; proven by its bytes."""


def glance(output: Location, name: str) -> dict[str, Any]:
    """What a JSON file of a job tells; nothing where it is not there or damaged: it is written again."""
    try:
        return read_json(output, name) or {}
    except InputError:
        return {}


@dataclass(frozen=True)
class UnitReport:
    """What one unit did.

    Args:
        output: name of the file it committed.
        rows_in: rows read.
        rows_out: rows written.
        reasons: rows that have no score, per reason.
        counts: further counts (``truncated``, ``distinct_texts``, ``tokens`` ...).
        seconds: time per stage; kept out of the footer, where it would change the bytes.
        error: why the unit failed, when failures are counted and not raised.
        basis: fingerprint of what else than its own rows and options has decided the output, such as the other units
            that it was compared with; empty for nothing.
    """

    output: str
    rows_in: int
    rows_out: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    basis: str = ""

    def footer(self, kind: str, run_fingerprint: str, unit_fingerprint: str) -> dict[str, str]:
        """Key-value pairs for the output's Parquet footer: the same bytes whoever computes the unit, and when."""
        facts = {
            "kind": kind,
            "run": run_fingerprint,
            "unit": unit_fingerprint,
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "reasons": {reason: count for reason, count in sorted(self.reasons.items()) if count},
            "counts": dict(sorted(self.counts.items())),
            **({"basis": self.basis} if self.basis else {}),
        }
        return {UNIT_KEY: json.dumps(facts, sort_keys=True)}


def read_report(root: Location, name: str, unit_fingerprint: str | None = None) -> UnitReport:
    """What ``UnitReport.footer`` wrote into a committed output.

    Args:
        root: the output folder.
        name: of the output.
        unit_fingerprint: of the unit whose output it must be; None takes any.

    Raises:
        DamagedOutputError: the file is not an output of flipkd, or not whole. Pages are not read: who reads them finds
            by their checksums whether they are what was written.
        InputError: the file cannot be read now; of what it holds nothing is known.
    """
    end, size_bytes = _read_end(root, name)
    try:
        footer = pq.ParquetFile(pa.BufferReader(end)).metadata
        facts = parse_object((footer.metadata or {})[UNIT_KEY.encode()])
        check_fields(facts, rows_in=int, rows_out=int, reasons=dict, counts=dict)
        for numbers in (facts["reasons"], facts["counts"]):
            check_fields(numbers, **dict.fromkeys(numbers, int))
        counted = (facts["rows_in"], facts["rows_out"], facts["reasons"], facts["counts"])
        report = UnitReport(name, *counted, basis=str(facts.get("basis", "")))
        if footer.num_rows != report.rows_out or _end_of_pages(footer) > size_bytes - footer.serialized_size - 8:
            raise ValueError("rows or pages are missing")
        if unit_fingerprint not in (None, facts["unit"]):
            raise ValueError("another unit's")
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        told = f"{name} of {root.uri} is not a whole output of flipkd; remove it and run again"
        raise DamagedOutputError(told) from error
    return report


def _read_end(root: Location, name: str) -> tuple[bytes, int]:
    """The last bytes of a file, its footer among them, and its size.

    They are read apart from being looked at: an error of reading tells nothing of the bytes. Arrow raises OSError for
    both, and a store that is busy or wants new credentials must not cost finished outputs.

    Raises:
        InputError: the file cannot be read.
    """
    target = root.child(name)
    try:
        with root.filesystem.open_input_file(target.path) as source:
            size_bytes = source.size()
            end = source.read_at(min(_END_BYTES, size_bytes), max(0, size_bytes - _END_BYTES))
            footer_bytes = int.from_bytes(end[-8:-4], "little") + 8
            if len(end) < footer_bytes <= size_bytes:
                end = source.read_at(footer_bytes, size_bytes - footer_bytes)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {target.uri}: {reason(error)}; run again") from error
    return end, size_bytes


def read_output(root: Location, name: str, columns: list[str] | None) -> pa.Table:
    """Reads a whole file that an earlier stage has written.

    Raises:
        InputError: it is damaged, or cannot be read now.
    """
    try:
        with root.filesystem.open_input_file(root.child(name).path) as source:
            return pq.ParquetFile(source, page_checksum_verification=True).read(columns)
    except (OSError, pa.ArrowException) as error:
        way_out = "run again" if may_pass(error) else "remove it and run again"
        raise InputError(f"cannot read {root.child(name).uri}: {reason(error)}; {way_out}") from error


def _end_of_pages(footer: pq.FileMetaData) -> int:
    """Where the last page ends. A file that has lost a piece of its middle ends its pages after its footer begins."""
    if not footer.num_row_groups or not footer.num_columns:
        return 0
    column = footer.row_group(footer.num_row_groups - 1).column(footer.num_columns - 1)
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    return int(start + column.total_compressed_size)


def read_reports(root: Location, names: Iterable[str]) -> list[UnitReport]:
    """Reports of committed outputs, from their footers.

    Raises:
        InputError: see ``read_report``.
    """
    return each_file(lambda name: read_report(root, name), names)


def read_whole_reports(root: Location, units: Mapping[str, str | None]) -> list[UnitReport | DamagedOutputError]:
    """Reports of committed outputs, or why one is not whole.

    Args:
        root: the output folder.
        units: unit fingerprint of each output, by its name; None for any.

    Raises:
        InputError: one cannot be read now.
    """

    def one(name: str) -> UnitReport | DamagedOutputError:
        try:
            return read_report(root, name, units[name])
        except DamagedOutputError as error:
            return error

    return each_file(one, units)


@dataclass
class Totals:
    """Running sums over unit reports; grows with the kinds of counts, not with units or rows."""

    units: int = 0
    failed_units: int = 0
    rows_in: int = 0
    rows_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, report: UnitReport) -> None:
        """Adds one report."""
        if report.error is not None:
            self.failed_units += 1
            return
        self.units += 1
        self.rows_in += report.rows_in
        self.rows_out += report.rows_out
        self.reasons.update(report.reasons)
        self.counts.update(report.counts)
        for stage, seconds in report.seconds.items():
            self.seconds[stage] += seconds  # type: ignore[assignment]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; zero counts are left out."""
        return {
            "units": self.units,
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "reasons": {reason: count for reason, count in sorted(self.reasons.items()) if count},
            "counts": {name: count for name, count in sorted(self.counts.items()) if count},
            "seconds": {stage: round(seconds, 3) for stage, seconds in sorted(self.seconds.items())},
        }


def versions() -> dict[str, str]:
    """Versions of what can change a score."""
    found = {"python": platform.python_version()}
    for package in ("flipkd", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "ray"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
