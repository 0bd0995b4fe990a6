"""One job: a plan of units, a worker for them, an output folder. The same for every command."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flipkd.config import RunOptions
from flipkd.data.commit import write_json
from flipkd.data.location import Location
from flipkd.errors import ClusterError
from flipkd.models.progress import Listener
from flipkd.run.local import UnitFunction, run_local
from flipkd.run.lock import check_locks
from flipkd.run.manifest import MANIFEST, PLAN, Totals, UnitReport, versions
from flipkd.run.observe import observed
from flipkd.run.output import check_space, prepare, remove_manifest
from flipkd.run.units import Plan, WorkUnit

logger = logging.getLogger(__name__)

Kind = Literal["encode", "texts", "join", "candidates", "score", "teach", "rescore"]


@dataclass(frozen=True)
class Job:
    """A planned job.

    Args:
        kind: what it computes.
        output: folder of its outputs, locked by the caller.
        plan: its units.
        fingerprint: of everything that decides the outputs besides the input files.
        make_worker: from a number of threads to a worker, which loads what it needs (a model, mapped stores) once and
            is then called with unit after unit; pickled to Ray workers.
        run: how to run.
        unit_name: what a row is, for the progress bar.
        uses_model: whether a worker runs a model: then one at a time in process (it uses all cores by itself), and a
            GPU each on Ray, but for a ``device`` of ``cpu``.
        output_bytes: size of the outputs, estimated.
        about: further facts for the manifest.
        skipped_units: units that a stage before could not do, and that are not in the plan for that reason: each with
            its ``output`` and the ``error``.
        device: of the model: ``cpu``, ``cuda`` or ``auto``.
    """

    kind: Kind
    output: Location
    plan: Plan
    fingerprint: str
    make_worker: Callable[[int], UnitFunction]
    run: RunOptions
    unit_name: str
    uses_model: bool
    output_bytes: int
    about: Mapping[str, Any]
    skipped_units: Sequence[Mapping[str, str]] = ()
    device: str = "auto"


def begin(job: Job) -> dict[str, UnitReport]:
    """Makes the locked folder ready before any stage of the job; see ``prepare`` for what it returns and raises.

    From here to its end the folder tells that this job is not finished, whatever an earlier one has left.
    """
    done = prepare(job.output, job.plan.units, job.run.overwrite)
    if len(done) < len(job.plan.units):
        remove_manifest(job.output)
        if done:  # else the plan of the first stage tells more
            write_json(job.output, PLAN, plan_facts(job))
    return done


def run_job(job: Job, done: Mapping[str, UnitReport] | None = None) -> dict[str, Any]:
    """Runs the units whose outputs are not there yet and writes the manifest.

    Args:
        job: what to run.
        done: what ``begin`` has found in the folder, if the caller has asked already.

    Returns:
        The manifest. ``complete`` is false when files or units were skipped.

    Raises:
        OutputError: the output folder is another run's, or cannot be written.
        OutputInUseError: another job has taken over the lock of the folder.
        InputError: an input file cannot be read, unless bad shards are skipped.
        ClusterError: the Ray job stalled, or more units failed than the error budget allows.
    """
    started = time.perf_counter()
    if done is None:
        done = prepare(job.output, job.plan.units, job.run.overwrite)
    pending = [unit for unit in job.plan.units if unit.output not in done]
    pending_rows = sum(unit.rows for unit in pending)
    needed_bytes = job.output_bytes * pending_rows // max(job.plan.rows, 1)
    check_space(job.output, needed_bytes, job.kind in ("score", "candidates"))
    if pending:
        remove_manifest(job.output)
    write_json(job.output, PLAN, plan_facts(job))
    if done:
        logger.info("%d of %d units are done already", len(done), len(job.plan.units))
    totals, failures = Totals(), []
    resumed = list(done.values())
    for report in resumed:
        totals.add(report)
    with observed(job.kind, job.run) as seen, seen.stage(job.kind, job.unit_name, job.plan, resumed) as stage:
        for report in _execute(job, pending, stage.listener):
            totals.add(report)
            stage.add(report)
            check_locks()
            if report.error is not None:
                failures.append({"output": report.output, "error": report.error})
                logger.warning("skipped %s: %s", report.output, report.error)
                if len(failures) > job.run.max_failed_units:
                    raise ClusterError(
                        f"{len(failures)} units failed, more than --max-failed-units {job.run.max_failed_units}; "
                        f"the last one: {report.error}"
                    )
    seconds = time.perf_counter() - started
    stages_complete = job.about.get("stages_complete", True)
    manifest = {
        "format": 1,
        "kind": job.kind,
        "fingerprint": job.fingerprint,
        "complete": not job.plan.bad_shards and not job.skipped_units and not failures and stages_complete,
        **totals.as_dict(),
        "units_resumed": len(done),
        "skipped_shards": [{"name": name, "error": error} for name, error in job.plan.bad_shards],
        "skipped_units": [*job.skipped_units, *failures],
        "wall_seconds": round(seconds, 3),
        "rows_per_second": round(pending_rows / seconds, 1) if seconds else 0.0,
        "versions": versions(),
        **job.about,
    }
    write_json(job.output, MANIFEST, manifest)
    return manifest


def plan_facts(job: Job) -> dict[str, Any]:
    """What the plan file holds: enough for ``status`` to tell how far the job is."""
    return {
        "format": 1,
        "kind": job.kind,
        "fingerprint": job.fingerprint,
        "units": len(job.plan.units),
        "rows": job.plan.rows,
        "bytes_in": job.plan.bytes_in,
        "output_bytes_estimate": job.output_bytes,
        "skipped_shards": len(job.plan.bad_shards),
        "started": time.time(),
        "unit_name": job.unit_name,
    }


def _execute(job: Job, pending: Sequence[WorkUnit], listener: Callable[[WorkUnit], Listener]) -> Iterator[UnitReport]:
    if not pending:
        return
    skip = job.run.on_bad_shard == "skip"
    if job.run.ray is not None:
        from flipkd.run.cluster import run_cluster  # imports Ray, which jobs without it need not have

        yield from run_cluster(
            job.make_worker,
            pending,
            job.output,
            job.run,
            may_use_gpu=job.uses_model and job.device != "cpu",
            skip_bad_shards=skip,
            listener=listener,
        )
        return
    cores = job.run.threads or available_cores()
    workers = 1 if job.uses_model else min(job.run.workers or cores, len(pending))
    worker = job.make_worker(max(1, cores // workers))
    yield from run_local(worker, pending, workers, skip, listener, job.run.max_retries)


def check_device(device: str, run: RunOptions) -> None:
    """Refuses a GPU that was asked for by name and is not there; of Ray's workers nothing is known here.

    Raises:
        ConfigError: there is none.
    """
    if device == "cuda" and run.ray is None:
        from flipkd.models.device import find_device

        find_device(device)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
