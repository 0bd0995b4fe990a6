"""What a job says of itself: a report per unit, the plan file while it runs, and ``_manifest.json`` at its end.

Counts also stand in each output's footer, so that a folder tells its own state without any other file.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.data.json_files import check_fields, parse_object
from flipkd.data.location import Location
from flipkd.errors import InputError

MANIFEST = "_manifest.json"
WORK_FOLDER = ".flipkd"
PLAN = f"{WORK_FOLDER}/plan.json"
UNIT_KEY = "flipkd.unit"
SOURCE_KEY = "flipkd.source"


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
    """

    output: str
    rows_in: int
    rows_out: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

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
        }
        return {UNIT_KEY: json.dumps(facts, sort_keys=True)}


def read_footer(root: Location, name: str) -> dict[str, Any]:
    """The facts of a committed output, as ``UnitReport.footer`` wrote them.

    Raises:
        InputError: the file is not one of flipkd's outputs.
    """
    try:
        with root.filesystem.open_input_file(root.child(name).path) as source:
            found = pq.ParquetFile(source).metadata.metadata or {}
        facts = parse_object(found[UNIT_KEY.encode()])
        check_fields(facts, rows_in=int, rows_out=int, reasons=dict, counts=dict)
        for counted in (facts["reasons"], facts["counts"]):
            check_fields(counted, **dict.fromkeys(counted, int))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(f"{name} of {root.uri} is not an output of flipkd") from error
    return facts


def read_reports(root: Location, names: Iterable[str]) -> list[UnitReport]:
    """Reports of committed outputs, from their footers."""

    def one(name: str) -> UnitReport:
        facts = read_footer(root, name)
        return UnitReport(name, facts["rows_in"], facts["rows_out"], facts["reasons"], facts["counts"])

    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(one, names))


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
