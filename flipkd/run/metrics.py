"""The metrics of a command, whatever they are published with. Names follow Prometheus' conventions.

Counters are of the output, as its manifest is: a run that goes on where another was killed starts with what that one
has done. So they never fall, and at the end they are the manifest's sums; jobs of one kind, such as two ``encode``, are
counted together. No label holds anything of a record, and each has a handful of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from flipkd.run.manifest import Totals
from flipkd.run.observe import CommandState, StageState

Labels = tuple[str, ...]

# In these jobs a row without a reason has a score, or an answer.
_SCORING = ("candidates", "score", "teach", "rescore")


@dataclass(frozen=True)
class Metric:
    """A counter or a gauge, and its values.

    Args:
        name: without the ``_total`` of a counter.
        documentation: one line.
        is_counter: whether it never falls.
        labels: names of the labels.
        values: by the labels' values.
    """

    name: str
    documentation: str
    is_counter: bool
    labels: Labels
    values: Mapping[Labels, float]


def metrics(state: CommandState) -> list[Metric]:
    """All metrics of a command."""
    jobs = _by_kind(state.stages)
    found = [
        _each(jobs, "rows_read", "Input rows of finished units.", lambda job: job.totals.rows_in, is_counter=True),
        _each(jobs, "rows_written", "Rows written.", lambda job: job.totals.rows_out, is_counter=True),
        _each(
            {kind: job for kind, job in jobs.items() if kind in _SCORING},
            "rows_scored",
            "Input rows that have a score, or an answer.",
            lambda job: job.totals.rows_in - job.totals.reasons.total(),
            is_counter=True,
        ),
        _parts(jobs, "rows_unscored", "Input rows that have none.", "reason", lambda job: job.totals.reasons),
        _each(jobs, "units_finished", "Finished work units.", lambda job: job.totals.units, is_counter=True),
        _each(jobs, "units_failed", "Skipped work units.", lambda job: job.totals.failed_units, is_counter=True),
        _parts(jobs, "stage_seconds", "Workers' time, by stage of a unit.", "stage", lambda job: job.totals.seconds),
        _parts(jobs, "items", "Truncated texts, tokens and the like.", "item", lambda job: job.totals.counts),
        _each(jobs, "rows_planned", "Input rows in all.", lambda job: job.rows),
        _each(jobs, "units_planned", "Work units in all.", lambda job: job.units),
        _each(jobs, "units_resumed", "Units that an earlier run did.", lambda job: job.resumed_units),
        _each(jobs, "files_skipped", "Input files that cannot be read.", lambda job: job.skipped_files),
        _each(jobs, "rows_per_second", "Input rows that this run did, over its time.", lambda job: job.rows_per_second),
    ]
    succeeded = state.updated if state.state == "finished" else None
    for name, documentation, value in (
        ("up", "1 while the command is running.", float(state.state == "running")),
        ("complete", "1 when it has ended and nothing is missing.", float(state.state == "finished")),
        ("start_time_seconds", "When it started, since 1970.", state.started),
        ("update_time_seconds", "When these numbers were taken, since 1970.", state.updated),
        ("last_success_time_seconds", "When a run last ended and nothing was missing.", succeeded),
    ):
        found.append(Metric(f"flipkd_{name}", documentation, False, (), {} if value is None else {(): value}))
    return found


def _each(
    jobs: Mapping[str, StageState],
    name: str,
    documentation: str,
    value: Callable[[StageState], float],
    is_counter: bool = False,
) -> Metric:
    values: dict[Labels, float] = {(kind,): value(job) for kind, job in jobs.items()}
    return Metric(f"flipkd_{name}", documentation, is_counter, ("kind",), values)


def _parts(
    jobs: Mapping[str, StageState],
    name: str,
    documentation: str,
    label: str,
    parts: Callable[[StageState], Mapping[str, float]],
) -> Metric:
    values: dict[Labels, float] = {
        (kind, part): number for kind, job in jobs.items() for part, number in parts(job).items()
    }
    return Metric(f"flipkd_{name}", documentation, True, ("kind", label), values)


def _by_kind(stages: Iterable[StageState]) -> dict[str, StageState]:
    found: dict[str, StageState] = {}
    for stage in stages:
        known = found.get(stage.kind)
        found[stage.kind] = stage if known is None else _together(known, stage)
    return found


def _together(one: StageState, other: StageState) -> StageState:
    names = ("units", "rows", "skipped_files", "resumed_units", "resumed_rows", "seconds")
    sums = {name: getattr(one, name) + getattr(other, name) for name in names}
    totals = Totals(
        **{name: number + getattr(other.totals, name) for name, number in vars(one.totals).items()}  # numbers, Counters
    )
    return replace(one, **sums, totals=totals, under_way={**one.under_way, **other.under_way})
