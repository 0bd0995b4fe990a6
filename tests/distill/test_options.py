"""Numbers that no training can use are refused by the name of their option."""

from __future__ import annotations

from typing import Any

import pytest

from flipkd.config import RunOptions
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.errors import ConfigError
from flipkd.models.options import StudentOptions
from flipkd.report.config import EvaluateConfig

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--seed", {"seed": -1}),
        ("--seed", {"seed": 1 << 32}),
        ("--weight-decay", {"weight_decay": NAN}),
        ("--weight-decay", {"weight_decay": -1.0}),
        ("--learning-rate", {"learning_rate": NAN}),
    ],
)
def test_training(option: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=option):
        TrainConfig("pairs", "run", StudentOptions("base"), **values)


def test_losses_student_evaluation_and_run() -> None:
    with pytest.raises(ConfigError, match="--positive-threshold"):
        LossOptions(positive_threshold=NAN)
    LossOptions(positive_threshold=-INFINITY, negative_threshold=INFINITY)  # nothing is left out
    with pytest.raises(ConfigError, match="--alpha"):
        StudentOptions("base", alpha=NAN)
    with pytest.raises(ConfigError, match="--seed"):
        EvaluateConfig("scores", "report", seed=1 << 32)
    for values in ({"gpus": NAN}, {"gpus": -1.0}):
        with pytest.raises(ConfigError, match="--gpus"):
            RunOptions(**values)
    with pytest.raises(ConfigError, match="--stall-timeout-s"):
        RunOptions(stall_timeout_s=NAN)
