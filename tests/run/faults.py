"""`flipkd-batch` with a worker that is slow, or meets a fault: `python -m tests.run.faults DELAY_S FAULT score ...`.

FAULT is empty, or ``KIND:NAME`` or ``KIND:NAME:FLAG``: at the units of a file whose name holds NAME the worker's
process is killed (``kill``), exits with 0 (``exit``), takes memory until somebody kills it (``eat``), or logs what
libraries log, of which some quotes ``QUOTED`` (``tell``). With FLAG, the path of a file that is made then, it happens
once.

The fault travels to the workers with the worker itself, so that flipkd needs no switch for it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from functools import partial

from flipkd.cli import main
from flipkd.run import plan_score
from flipkd.run.manifest import UnitReport
from flipkd.run.score_unit import ScoreTask, ScoreWorker
from flipkd.run.units import WorkUnit

# So much is taken before the process waits to be killed: what a killer can see, and no machine minds.
EATEN_BYTES = 640 << 20
_BITE_BYTES = 16 << 20
QUOTED = "zanzibar marmalade quokka"


class FaultyWorker:
    """Waits before each unit, and meets its fault."""

    def __init__(self, delay_s: float, fault: str, task: ScoreTask, threads: int) -> None:
        self._delay_s = delay_s
        self._kind, self._name, self._flag = (*fault.split(":", 2), "", "")[:3]
        self._worker = ScoreWorker(task, threads)

    def __call__(self, unit: WorkUnit) -> UnitReport:
        time.sleep(self._delay_s)
        if self._kind and self._name in unit.shard.name and self._is_time():
            self._meet()
        return self._worker(unit)

    def _is_time(self) -> bool:
        if not self._flag:
            return True
        try:
            os.close(os.open(self._flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _meet(self) -> None:
        if self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._kind == "exit":
            os._exit(0)
        elif self._kind == "tell":
            self._tell()
            return
        eaten = []
        for _ in range(EATEN_BYTES // _BITE_BYTES):
            eaten.append(b"\1" * _BITE_BYTES)
            time.sleep(0.02)
        signal.pause()

    def _tell(self) -> None:
        library = logging.getLogger("library")
        warnings.warn("a library is unhappy", RuntimeWarning, stacklevel=1)
        library.warning("two\nlines", extra={"text": QUOTED})
        try:
            raise ValueError(f"cannot parse {QUOTED}")
        except ValueError:
            library.exception("it failed")


if __name__ == "__main__":
    from tests.run import faults

    plan_score.ScoreWorker = partial(faults.FaultyWorker, float(sys.argv[1]), sys.argv[2])  # type: ignore[assignment,misc]
    main(sys.argv[3:])
