"""Runs work units in this process, on threads: the kernels, Arrow and the model all release the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from flipkd.errors import InputError
from flipkd.models.progress import Listener, listening
from flipkd.run.manifest import UnitReport
from flipkd.run.units import WorkUnit

UnitFunction = Callable[[WorkUnit], UnitReport]


def attempt(
    function: UnitFunction, unit: WorkUnit, skip_bad_shards: bool, listener: Listener | None = None
) -> UnitReport:
    """Runs one unit.

    Args:
        function: the worker.
        unit: the unit.
        skip_bad_shards: whether an unreadable input becomes a report with an error.
        listener: is told how far a model is with the unit.
    """
    try:
        with listening(listener):
            return function(unit)
    except InputError as error:
        if not skip_bad_shards:
            raise
        return UnitReport(unit.output, 0, 0, error=str(error))


def run_local(
    function: UnitFunction,
    units: Sequence[WorkUnit],
    workers: int,
    skip_bad_shards: bool,
    listener: Callable[[WorkUnit], Listener],
) -> Iterator[UnitReport]:
    """Yields reports as units finish. At most ``workers`` units are in flight, so memory does not grow with the job.

    While one unit reads or waits for the disk, another scores: reading, scoring and writing overlap across units.

    Args:
        function: the worker.
        units: what to run.
        workers: threads.
        skip_bad_shards: see ``attempt``.
        listener: of a unit, see ``attempt``.
    """
    remaining = iter(units)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="unit") as pool:

        def submit(count: int) -> set[Future[UnitReport]]:
            return {
                pool.submit(attempt, function, unit, skip_bad_shards, listener(unit))
                for unit in islice(remaining, count)
            }

        running = submit(workers)
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= submit(len(done))
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()
