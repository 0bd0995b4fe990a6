"""benchmarks.gpu: what it says without a GPU, and that its checks can fail."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_encode
from benchmarks.common import OutOfTimeError, time_limit
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


def test_encoding_without_a_gpu_measures_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_encode"])
    assert gpu_encode.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "nothing is measured" in lines[0]
    assert json.loads(lines[-1])["ratios"] == {}


def test_made_texts_are_distinct_and_of_real_phrases() -> None:
    texts = gpu_encode.record_texts(300)
    assert len(set(texts)) == 300
    assert all(text.count("; ") >= 1 for text in texts)
    assert 15 < sum(len(text.split()) for text in texts) / 300 < 25  # words; about 40 tokens


def test_a_limit_of_time_ends_what_runs() -> None:
    with pytest.raises(OutOfTimeError, match=r"not done after 0\.05 s"), time_limit(0.05):
        time.sleep(30)
    with time_limit(10):
        pass


def test_checks_of_the_results() -> None:
    interpret("interpreted_gpu_benchmark.py")
