"""A nightly job that is killed: ``python -m tests.nightly.faults POINT nightly.yaml --date ...``.

POINT is ``unit:NAME`` (SIGKILL at the first unit of a file of pairs whose name holds NAME), or ``module:name`` of what
kills the process in place of being called.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from functools import partial
from typing import Any

from flipkd.run import plan_score
from jobs.nightly import nightly
from tests.run.faults import FaultyWorker


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    place, name = sys.argv[1].split(":")
    if place == "unit":
        plan_score.ScoreWorker = partial(FaultyWorker, 0.0, f"kill:{name}")  # type: ignore[assignment,misc]
    else:
        setattr(importlib.import_module(place), name, die)
    nightly(sys.argv[2:])
