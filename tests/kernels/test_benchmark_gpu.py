"""benchmarks.gpu: what it says without a GPU, and that its checks can fail."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import gpu
from tests.kernels.test_gpu import interpret


def test_without_a_gpu_it_prints_the_limits_as_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick"])
    assert gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "nothing is measured" in lines[0]
    assert lines[1].startswith("not measured: H100 on paper")
    assert lines[2].split() == ["pair_score", "int8", "random", "268.0", "12500", "10000"]
    result = json.loads(lines[-1])
    assert result["benchmark"] == "gpu"
    assert result["correct"] is True
    assert result["ratios"] == {}


def test_checks_of_the_results() -> None:
    interpret("interpreted_gpu_benchmark.py")
