"""`flipkd-batch` whose engine dies in the middle of a unit: `python -m tests.run.llm_faults NAME rescore ...`."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

from flipkd.cli import main
from flipkd.models.llm_prompt import PromptedPairs
from flipkd.models.llm_torch import TorchEngine
from flipkd.run.manifest import UnitReport
from flipkd.run.rescore import RescoreWorker
from flipkd.run.units import WorkUnit

if __name__ == "__main__":
    dies_at, names = sys.argv[1], [""]
    call, answer = RescoreWorker.__call__, TorchEngine.label_log_probabilities

    def named(self: RescoreWorker, unit: WorkUnit) -> UnitReport:
        names[0] = unit.shard.name
        return call(self, unit)

    def dying(self: TorchEngine, prompts: PromptedPairs) -> np.ndarray:
        found = answer(self, prompts)
        if dies_at in names[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    RescoreWorker.__call__ = named  # type: ignore[method-assign]
    TorchEngine.label_log_probabilities = dying  # type: ignore[method-assign]
    main(sys.argv[2:])
