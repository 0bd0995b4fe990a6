"""`flipkd-batch` with a worker that is slow, or dies: `python -m tests.run.faults DELAY_S DIES_AT score ...`.

The fault travels to the workers with the worker itself, so that flipkd needs no switch for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial

from flipkd.cli import main
from flipkd.run import plan_score
from flipkd.run.manifest import UnitReport
from flipkd.run.score import ScoreTask, ScoreWorker
from flipkd.run.units import WorkUnit


class FaultyWorker:
    """Waits before each unit, and dies at the unit of a file whose name holds ``dies_at``."""

    def __init__(self, delay_s: float, dies_at: str, task: ScoreTask, threads: int) -> None:
        self._delay_s, self._dies_at = delay_s, dies_at
        self._worker = ScoreWorker(task, threads)

    def __call__(self, unit: WorkUnit) -> UnitReport:
        time.sleep(self._delay_s)
        if self._dies_at and self._dies_at in unit.shard.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._worker(unit)


if __name__ == "__main__":
    from tests.run import faults

    plan_score.ScoreWorker = partial(faults.FaultyWorker, float(sys.argv[1]), sys.argv[2])  # type: ignore[assignment,misc]
    main(sys.argv[3:])
