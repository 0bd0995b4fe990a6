"""benchmarks.gpu with Triton's interpreter in the place of a GPU: that right results pass, and wrong ones do not.

test_benchmark_gpu.py runs this file in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import gpu
from flipkd.kernels import pool_project
from flipkd.kernels.pair_score import gpu as pair_score

SMALL = argparse.Namespace(rows=50, pairs=200)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(function: Callable[[], Any], rounds: int) -> float:
        function()
        return 1e-3

    monkeypatch.setattr(gpu, "_DEVICE", "cpu")
    monkeypatch.setattr(gpu, "median_seconds", once)
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_right_results_pass() -> None:
    assert gpu.copy_bandwidth(1, size=1000) == pytest.approx(2e6)
    rows, ratios, correct = gpu.pair_score_rows(SMALL, 1e12, 1)
    assert correct
    assert len(rows) == 4
    # 200 pairs in a millisecond, against what 1 TB/s would bring
    assert ratios["pair_score_int8_random"] == pytest.approx(200 / 1e-3 / (1e12 / 268))
    rows, ratios, correct = gpu.pool_project_rows(5, 1e12, 1)
    assert correct
    assert len(rows) == 3
    assert ratios["pool_project_vs_pytorch"] == pytest.approx(1.0)


def test_wrong_scores_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pair_score.pair_score_tensors

    def wrong(*arguments: Any, **options: Any) -> Any:
        score, probability, position = right(*arguments, **options)
        return score + 0.05, probability, position

    monkeypatch.setattr(pair_score, "pair_score_tensors", wrong)
    assert not gpu.pair_score_rows(SMALL, 1e12, 1)[2]


def test_wrong_vectors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pool_project.pool_project

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        return pool_project.PooledRows(found.rows.roll(1, 0), found.finite) if "dtype" in options else found

    monkeypatch.setattr(pool_project, "pool_project", wrong)
    assert not gpu.pool_project_rows(5, 1e12, 1)[2]
