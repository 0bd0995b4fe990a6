"""`flipkd-batch` or `jobs/nightly.py` with a fault that none foresaw, whose message quotes a record.

`python -m tests.privacy.faults start|unit score ...` (or `nightly nightly.yaml --date ...`): when a worker starts, or
at a unit.
"""

from __future__ import annotations

import sys
from functools import partial

from flipkd.cli import main
from flipkd.run import plan_score
from flipkd.run.manifest import UnitReport
from flipkd.run.score_unit import ScoreTask
from flipkd.run.units import WorkUnit
from jobs.nightly import nightly
from tests.privacy.canary import ID, TEXT


class FaultyWorker:
    """Raises what quotes a record, with a cause that does so too."""

    def __init__(self, where: str, task: ScoreTask, threads: int) -> None:
        del task, threads
        self._where = where
        if where == "start":
            self._raise()

    def __call__(self, unit: WorkUnit) -> UnitReport:
        del unit
        return self._raise()

    def _raise(self) -> UnitReport:
        try:
            raise KeyError(TEXT)
        except KeyError as error:
            raise ValueError(f"the record {ID}: {TEXT}") from error


if __name__ == "__main__":
    from tests.privacy import faults

    plan_score.ScoreWorker = partial(faults.FaultyWorker, sys.argv[1])  # type: ignore[assignment,misc]
    if sys.argv[2] == "nightly":
        nightly(sys.argv[3:])
    main(sys.argv[2:])
