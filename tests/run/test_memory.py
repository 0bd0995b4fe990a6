"""Memory does not grow with the number of pairs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_ten_times_the_pairs_need_no_more_memory() -> None:
    """vllm#30268, sentence-transformers#3138: the benchmark for 200 million pairs, with an eighth of them."""
    command = [sys.executable, "-m", "benchmarks.memory", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["correct"]
    assert facts["ratios"]["peak_200m_over_20m"] <= 1.1
