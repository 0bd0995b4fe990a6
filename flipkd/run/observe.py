"""What a command is doing, for those who look on. A command is one job or several; each is a *stage*.

An ``Observer`` receives the reports of finished units, and how far the others are, and hands a copy of the sums to its
publishers from a thread of its own: the progress bar, the file that ``status`` reads, metrics. None of them can stop
the work: one that fails says so once.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol

from flipkd.config import RunOptions
from flipkd.data.location import Location
from flipkd.errors import FlipkdError
from flipkd.run.manifest import MANIFEST, Totals, UnitReport, glance
from flipkd.run.units import Plan, WorkUnit

logger = logging.getLogger(__name__)

_TICK_S = 1.0

State = Literal["running", "finished", "partial", "failed"]


@dataclass
class StageState:
    """One job of a command.

    Args:
        kind: what it computes; two jobs of a command may be of one kind.
        unit_name: what a row is.
        units: planned; ``rows`` of them, ``skipped_files`` that cannot be read.
        resumed_units: that an earlier run has done; ``resumed_rows`` of them.
        started: reading of ``time.monotonic``; ``seconds`` since then.
        totals: over all finished units, the resumed ones too: at the end, what the manifest says.
        under_way: rows that are done of units that are not finished yet, by output.
    """

    kind: str
    unit_name: str
    units: int
    rows: int
    skipped_files: int
    resumed_units: int = 0
    resumed_rows: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    is_running: bool = True
    totals: Totals = field(default_factory=Totals)
    under_way: dict[str, float] = field(default_factory=dict)

    @property
    def rows_done(self) -> float:
        """Rows of finished units, and the share that is done of the others."""
        return self.totals.rows_in + sum(self.under_way.values())

    @property
    def rows_per_second(self) -> float:
        """Rows that this process (or its workers) have done, over the time since the stage began."""
        return (self.rows_done - self.resumed_rows) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None before anything is done."""
        rate = self.rows_per_second
        return max(self.rows - self.rows_done, 0.0) / rate if rate > 0 else None


@dataclass
class CommandState:
    """A command.

    Args:
        command: its name.
        started: seconds since 1970; ``updated`` is when this copy was made.
        state: how it stands.
        error: why it failed, in words that hold no record.
        stages: its jobs so far, in order; the last one is at work.
    """

    command: str
    started: float
    updated: float
    state: State = "running"
    error: str | None = None
    stages: list[StageState] = field(default_factory=list)


class Publisher(Protocol):
    """Shows the state of a command to somebody."""

    interval_s: float

    def publish(self, state: CommandState) -> None:
        """Called every ``interval_s`` seconds, at the end of each stage, and at the end of the command."""


class Observer:
    """Follows one command.

    Args:
        command: its name.
        publishers: who is told.
    """

    def __init__(self, command: str, publishers: Iterable[Publisher]) -> None:
        now = time.time()
        self._state = CommandState(command, now, now)
        self._due = dict.fromkeys(publishers, 0.0)
        self._failed: set[Publisher] = set()
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_publishing, name="observer", daemon=True)

    def start(self) -> None:
        """Publishes once, here, so that what cannot work fails before any work does; then in a thread.

        Raises:
            FlipkdError: a publisher cannot publish.
        """
        for publisher in self._due:
            publisher.publish(self._copy())
        self._thread.start()

    def end(self, state: State, error: str | None = None) -> None:
        """Publishes for the last time."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._state.state, self._state.error = state, error
        self._publish(everyone=True)

    @contextlib.contextmanager
    def stage(self, kind: str, unit_name: str, plan: Plan, resumed: Iterable[UnitReport]) -> Iterator[Stage]:
        """Follows one job of the command.

        Args:
            kind: what it computes.
            unit_name: what a row is.
            plan: its units.
            resumed: reports of those that are done already.
        """
        state = StageState(kind, unit_name, len(plan.units), plan.rows, len(plan.bad_shards))
        for report in resumed:
            state.totals.add(report)
        state.resumed_units, state.resumed_rows = state.totals.units, state.totals.rows_in
        with self._lock:
            self._state.stages.append(state)
        try:
            yield Stage(state, self._lock)
        finally:
            with self._lock:
                state.seconds, state.is_running = time.monotonic() - state.started, False
                state.under_way.clear()
            self._publish(everyone=True)

    def _keep_publishing(self) -> None:
        while not self._ended.wait(_TICK_S):
            self._publish()

    def _publish(self, everyone: bool = False) -> None:
        with self._publishing:
            now = time.monotonic()
            for publisher, due in self._due.items():
                if not everyone and now < due:
                    continue
                self._due[publisher] = now + publisher.interval_s
                try:
                    publisher.publish(self._copy())
                except Exception as error:
                    if publisher not in self._failed:
                        told = error if isinstance(error, FlipkdError) else type(error).__name__
                        logger.warning("%s: %s; the job goes on", type(publisher).__name__, told)
                    self._failed.add(publisher)

    def _copy(self) -> CommandState:
        with self._lock:
            state = copy.deepcopy(self._state)
        state.updated = time.time()
        for stage in state.stages:
            if stage.is_running:
                stage.seconds = time.monotonic() - stage.started
        return state


class Stage:
    """Takes what is told of one job; see ``Observer.stage``."""

    def __init__(self, state: StageState, lock: threading.Lock) -> None:
        self._state, self._lock = state, lock
        self._ended: set[str] = set()

    def add(self, report: UnitReport) -> None:
        """A unit is finished, or has failed."""
        with self._lock:
            self._ended.add(report.output)  # what is told of it later is old
            self._state.under_way.pop(report.output, None)
            self._state.totals.add(report)

    def listener(self, unit: WorkUnit) -> Callable[[int, int], None]:
        """For a unit that begins now: to be called with how many of how many of its parts are done."""

        def told(done: int, total: int) -> None:
            rows = unit.rows * done / max(total, 1)
            with self._lock:
                if self._state.is_running and unit.output not in self._ended:
                    self._state.under_way[unit.output] = max(rows, self._state.under_way.get(unit.output, 0.0))

        return told


_current: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def observed(command: str, run: RunOptions, output: Location | None = None) -> Iterator[Observer]:
    """Follows a command to its end. Within another command the outer one's observer follows it.

    Args:
        command: its name.
        run: says who is told.
        output: its locked folder; its manifest tells at the end whether the command is complete. None: a job without a
            command.

    Raises:
        FlipkdError: somebody cannot be told (``--metrics-file`` cannot be written).
    """
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    from flipkd.run.publishers import publishers

    observer = Observer(command, publishers(command, run, output))
    token = _current.set(observer)
    state: State = "failed"
    told = None
    try:
        observer.start()
        yield observer
        manifest = {} if output is None else glance(output, MANIFEST)
        state = "finished" if manifest.get("complete", True) else "partial"
    except BaseException as error:
        told = str(error) if isinstance(error, FlipkdError) else type(error).__name__
        raise
    finally:
        _current.reset(token)
        observer.end(state, told)
