"""Runs work units on a Ray cluster. A job imports Ray here, in ``ray_connection.py`` and ``cluster_metrics.py`` only.

Ray Data drives a pool of actors over the units: it scales the pool between its bounds, replaces actors whose process
or node died, tries their units again up to a limit, and ends a job that makes no progress. A bare
``ray.util.ActorPool`` does none of these, so under node loss each would have been ours to write. Only units and reports
pass through Ray, never texts or vectors; an output that is there already is not computed again, so a unit that is tried
twice is written once.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.fs as pafs

from flipkd.config import RunOptions
from flipkd.data.commit import read_json
from flipkd.data.location import Location
from flipkd.errors import ClusterError, ConfigError, FlipkdError, told_without_data
from flipkd.logs import LogOptions, current_options, log_as_worker
from flipkd.models.progress import Listener
from flipkd.run.local import UnitFunction, attempt
from flipkd.run.manifest import UnitReport, read_report
from flipkd.run.output import remove_folder, remove_temporary
from flipkd.run.ray_connection import RAY_LOGGERS, connect
from flipkd.run.unit_notes import TRIES, following_notes, note_name, write_note
from flipkd.run.units import WorkUnit

try:
    import ray
    import ray.data
    import ray.exceptions
except ImportError as missing:
    raise ConfigError("--ray needs Ray: pip install 'flipkd[ray]'") from missing

# How names of threads begin that fetch. One named Prefetcher stays too, asleep, and does nothing more.
RAY_DATA_THREADS = ("StreamingExecutor", "iter_threaded", "ray-data-")
JOIN_S = 10.0


class _UnitActor:
    """Lives in a Ray worker: loads once, then runs one unit a call."""

    def __init__(
        self,
        make_worker: Callable[[int], UnitFunction],
        threads: int,
        output: Location,
        max_retries: int,
        skip_bad_shards: bool,
        logs: LogOptions | None,
    ) -> None:
        os.umask(0o077)
        if logs is not None:
            log_as_worker(logs, *RAY_LOGGERS)
        # Ray writes what is raised here into its logs and into its tables of actors: neither may hold a record.
        try:
            self._worker = make_worker(threads)
        except FlipkdError as error:
            raise error from None
        except Exception as error:
            raise ClusterError(f"a worker could not start: {told_without_data(error)}") from None
        self._output, self._max_retries, self._skip = output, max_retries, skip_bad_shards

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        results: list[UnitReport | FlipkdError] = []
        for item in batch["unit"]:
            unit: WorkUnit = pickle.loads(item)
            try:
                results.append(self._run(unit))
            except FlipkdError as error:
                # Sent as a value: raised here it would come back wrapped in a traceback of Ray's.
                results.append(error)
            except Exception as error:  # a bug; raised here, Ray would try it again, and log what it may quote
                results.append(ClusterError(f"this should not happen, please report it: {told_without_data(error)}"))
        return {"result": [pickle.dumps(result) for result in results]}

    def _run(self, unit: WorkUnit) -> UnitReport:
        path = self._output.child(unit.output).path
        if self._output.filesystem.get_file_info(path).type == pafs.FileType.File:
            return read_report(self._output, unit.output, unit.fingerprint)
        # Ray counts the deaths of an actor, not those that a unit caused, and an actor may die often in a long job on
        # machines that come and go. So each start of a unit is noted; the note goes when the unit ends.
        note = note_name(unit)
        tries = (read_json(self._output, note, tries=int) or {"tries": 0})["tries"]
        if tries > self._max_retries:
            error = ClusterError(
                f"the worker died {tries} times, more than --max-retries {self._max_retries} allows, at "
                f"{unit.shard.name} rows {unit.first_row} to {unit.first_row + unit.rows}; look for memory or a crash "
                "in Ray's logs; finished units are kept, run again"
            )
            if self._skip:
                return UnitReport(unit.output, 0, 0, error=str(error))
            raise error
        listener = write_note(self._output, unit, tries + 1)
        try:
            return attempt(self._worker, unit, self._skip, listener, self._max_retries)
        finally:
            with contextlib.suppress(OSError):  # a disk that has turned read-only has said so already
                self._output.filesystem.delete_file(self._output.child(note).path)


def run_cluster(
    make_worker: Callable[[int], UnitFunction],
    units: Sequence[WorkUnit],
    output: Location,
    run: RunOptions,
    *,
    may_use_gpu: bool,
    skip_bad_shards: bool,
    listener: Callable[[WorkUnit], Listener],
) -> Iterator[UnitReport]:
    """Yields reports as units finish, in any order.

    Args:
        make_worker: see ``Job``.
        units: what to run.
        output: folder of the outputs.
        run: how to run.
        may_use_gpu: whether a worker runs a model, and not on the CPU; see ``gpus_of_a_worker``.
        skip_bad_shards: see ``attempt``.
        listener: gives who is told how far a model is with a unit.

    Raises:
        ClusterError: no worker could start in time, nothing finished for ``stall_timeout_s``, or a unit's worker died
            more often than ``max_retries`` allows.
        FlipkdError: what a unit raised.
    """
    connect(str(run.ray))
    threads = run.threads or 1
    resources = ray.cluster_resources()
    gpus = gpus_of_a_worker(run, may_use_gpu, resources)
    fits = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 0) / threads
    smallest, largest = pool_size(run, int(fits), len(units))

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = max(1, int(run.start_timeout_s))
    context.execution_no_progress_timeout_s = run.stall_timeout_s
    context.max_consecutive_actor_init_deaths = run.max_retries
    remove_folder(output.child(TRIES))
    with ray.data.DataContext.current(context), following_notes(output, units, listener):
        # Actors are started again, and their units tried again, without end: what Ray Data does unless told otherwise.
        dataset = ray.data.from_items(
            [{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=len(units)
        ).map_batches(
            _UnitActor,
            fn_constructor_args=(make_worker, threads, output, run.max_retries, skip_bad_shards, current_options()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=smallest, max_size=largest, max_tasks_in_flight_per_actor=2),
            num_cpus=threads,
            num_gpus=gpus or None,
        )
        try:
            with rows_of(dataset) as rows:
                for row in rows:
                    result = pickle.loads(row["result"])
                    if isinstance(result, FlipkdError):
                        raise result
                    yield result
        except ray.exceptions.RayError as error:
            raise ClusterError(_explain(error, run)) from error
        except Exception as error:
            if type(error).__module__.startswith("ray."):
                raise ClusterError(_explain(error, run)) from error
            raise
    remove_folder(output.child(TRIES))
    remove_temporary(output)  # of workers that were killed


@contextlib.contextmanager
def rows_of(dataset: ray.data.Dataset) -> Iterator[Iterator[dict[str, Any]]]:
    """Gives the rows as they come; at the end, however it comes, no thread of Ray Data is left that fetches.

    Ray Data only tells its threads to stop. One that still fetches a block after ``ray.shutdown()`` ends the process:
    Ray's C++ exits with code 1, and nobody hears what had gone wrong.
    """
    before = set(threading.enumerate())
    rows = iter(dataset.iter_rows())
    try:
        yield rows
    finally:
        rows.close()
        deadline = time.monotonic() + JOIN_S
        for thread in threading.enumerate():
            if thread not in before and thread.name.startswith(RAY_DATA_THREADS):
                thread.join(max(0.0, deadline - time.monotonic()))


def gpus_of_a_worker(run: RunOptions, may_use_gpu: bool, resources: Mapping[str, float]) -> float:
    """What is asked for, else one where the cluster has any and the worker can use it."""
    if run.gpus is not None:
        return run.gpus
    return float(may_use_gpu and resources.get("GPU", 0) >= 1)


def pool_size(run: RunOptions, room: int, units: int) -> tuple[int, int]:
    """How many workers must start, and how many there may be.

    Args:
        run: what was asked for.
        room: workers for which the cluster has room now; one that grows by itself may have more later.
        units: of the job; a worker more would have nothing to do.
    """
    largest = max(1, min(run.workers or max(room, run.min_workers), units))
    return max(1, min(run.min_workers, largest)), largest


def _explain(error: BaseException, run: RunOptions) -> str:
    """One line, with the way out; a worker's own words only where they are flipkd's."""
    name = type(error).__name__
    if isinstance(error, ray.exceptions.GetTimeoutError):
        cpus = ray.cluster_resources().get("CPU", 0)
        return (
            f"no Ray worker could start within --start-timeout-s {run.start_timeout_s:.0f}: the cluster has "
            f"{cpus:.0f} CPUs in all; add nodes, or lower --threads, --gpus or --min-workers; where these suffice, "
            "look in Ray's logs for a worker that hangs"
        )
    if name == "ExecutionTimeoutError":
        return f"no unit finished for --stall-timeout-s {run.stall_timeout_s:.0f}; finished units are kept, run again"
    cause = error
    while cause is not None and not isinstance(cause, FlipkdError):
        cause = getattr(cause, "cause", None) or cause.__cause__  # type: ignore[assignment]
    if isinstance(cause, FlipkdError):
        return str(cause)
    if isinstance(error, ray.exceptions.RayActorError):
        return (
            f"workers died while they started ({name}), more often than --max-retries {run.max_retries} allows; "
            "look for memory or a crash in Ray's logs; finished units are kept, run again"
        )
    return f"the Ray job failed ({name}); finished units are kept, run again"
