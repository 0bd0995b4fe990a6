"""The Triton kernels: their results in Triton's interpreter, and what is said without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.scripts import run

pytest.importorskip("triton")


def interpret(file: str) -> None:
    """Run a test file of this folder in Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "FLIPKD_P"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        cwd=Path(__file__).parent,
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file", ["interpreted_pair_score.py", "interpreted_pool_project.py", "interpreted_encoder_ops.py"]
)
def test_results_in_the_interpreter(file: str) -> None:
    interpret(file)


def test_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = """
        import numpy as np
        from flipkd.errors import KernelError
        from flipkd.kernels.pair_score import pair_score
        from flipkd.vectors.rows import quantise
        rows, index = quantise(np.eye(2, dtype=np.float32), "int8"), np.zeros(1, np.int64)
        try:
            pair_score(rows, rows, index, index)
        except KernelError as error:
            assert "needs a CUDA GPU" in str(error)
            print("right")
    """
    run(script, {"FLIPKD_PAIR_SCORE": "triton"})
