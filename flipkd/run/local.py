"""Runs work units in this process, on threads: the kernels, Arrow and the model all release the GIL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from flipkd.data.location import may_pass
from flipkd.errors import InputError
from flipkd.models.progress import Listener, listening
from flipkd.run.manifest import UnitReport
from flipkd.run.units import WorkUnit

logger = logging.getLogger(__name__)

_WAIT = wait_exponential_jitter(initial=1, max=60)  # seconds; a little more by chance, or all workers knock at once

UnitFunction = Callable[[WorkUnit], UnitReport]


def attempt(
    function: UnitFunction, unit: WorkUnit, skip_bad_shards: bool, listener: Listener | None, max_retries: int
) -> UnitReport:
    """Runs one unit; again where a read failed for a reason that may pass (a store that is busy, a lost connection).

    Args:
        function: the worker.
        unit: the unit.
        skip_bad_shards: whether an unreadable input becomes a report with an error.
        listener: is told how far a model is with the unit.
        max_retries: tries after the first one, each after twice the wait of the one before.
    """
    tries = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, InputError) and may_pass(error.__cause__)),
        stop=stop_after_attempt(max_retries + 1),
        wait=_WAIT,
        before_sleep=_tell,
        reraise=True,
    )
    try:
        with listening(listener):
            return tries(function, unit)
    except InputError as error:
        if not skip_bad_shards:
            raise
        return UnitReport(unit.output, 0, 0, error=str(error))


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("%s; it is tried again in %.0f s", error, state.upcoming_sleep)


def run_local(
    function: UnitFunction,
    units: Sequence[WorkUnit],
    workers: int,
    skip_bad_shards: bool,
    listener: Callable[[WorkUnit], Listener],
    max_retries: int,
) -> Iterator[UnitReport]:
    """Yields reports as units finish. At most ``workers`` units are in flight, so memory does not grow with the job.

    While one unit reads or waits for the disk, another scores: reading, scoring and writing overlap across units.

    Args:
        function: the worker.
        units: what to run.
        workers: threads.
        skip_bad_shards: see ``attempt``.
        listener: of a unit, see ``attempt``.
        max_retries: see ``attempt``.
    """
    remaining = iter(units)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="unit") as pool:

        def submit(count: int) -> set[Future[UnitReport]]:
            return {
                pool.submit(attempt, function, unit, skip_bad_shards, listener(unit), max_retries)
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
