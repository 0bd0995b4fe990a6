"""The Triton kernel: its results in Triton's interpreter, and that it compiles for a real GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

# Triton reads the variable when it is imported, so both run in a process of their own.
RESULTS = """
    import numpy as np
    import torch
    from flipkd.kernels.pair_score import pair_score
    from flipkd.kernels.pair_score import gpu
    from flipkd.vectors.rows import VectorRows, quantise

    rng = np.random.default_rng(0)
    gpu._COMPACT_BLOCK = 8  # several blocks, so that compaction has something to join
    for dim in (1, 3, 127, 129):
        vectors = rng.standard_normal((60, dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[7] = 0
        for dtype in ("float32", "bf16", "int8"):
            rows = quantise(vectors, dtype)
            for index_type in (np.int32, np.int64):
                left, right = rng.integers(-1, 60, (2, 37)).astype(index_type)
                for options in ({}, {"min_score": 0.05, "calibration": (5.0, -1.0)}):
                    want = pair_score(rows, rows, left, right, backend="reference", **options)
                    got = pair_score(rows, rows, left, right, backend="triton", **options)
                    np.testing.assert_allclose(got.score, want.score, rtol=0, atol=1e-6)
                    for name in ("probability", "position"):
                        a, b = getattr(got, name), getattr(want, name)
                        assert (a is None) == (b is None), name
                        if a is not None:
                            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for bad in (-2, 60, 2**40):
        left = np.zeros(50, np.int64)
        left[[20, 45]] = bad
        try:
            pair_score(rows, rows, left, np.zeros(50, np.int64), backend="triton")
        except IndexError as error:
            assert f"left_index[20] is {bad}" in str(error), error
        else:
            raise AssertionError("an index out of range passed")
    empty = VectorRows(np.empty((0, 4), np.int8), "int8")
    nothing = np.empty(0, np.int64)
    assert len(pair_score(empty, empty, nothing, nothing, min_score=0.0, backend="triton").position) == 0
    print("right")
"""

COMPILES = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from flipkd.kernels.pair_score import gpu

    target = GPUTarget("cuda", 90, 32)
    types = dict.fromkeys(("score", "probability", "kept_score", "kept_probability"), "*fp32")
    types |= dict.fromkeys(("counts", "bad_place", "ends", "kept_position"), "*i64")
    types |= dict.fromkeys(("left_rows", "right_rows", "dim", "pairs"), "i64")
    types |= dict.fromkeys(("slope", "offset", "min_score"), "fp32")
    values = {"CALIBRATE": True, "COUNT": True, "BLOCK_PAIRS": 32, "BLOCK_DIM": 128}

    def build(kernel, **more):
        all_values = {**values, "INT8": more.get("left") == "*i8"}
        names = kernel.arg_names
        signature = {name: {**types, **more}.get(name, "constexpr") for name in names}
        constants = {(names.index(name),): value for name, value in all_values.items() if name in names}
        built = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
        assert ".visible .entry" in built.asm["ptx"]

    build(gpu._score_kernel, left="*fp32", right="*fp32", left_index="*i32", right_index="*i32")
    build(gpu._score_kernel, left="*bf16", right="*bf16", left_index="*i64", right_index="*i64")
    build(gpu._score_kernel, left="*i8", right="*i8", left_index="*i64", right_index="*i64")
    build(gpu._compact_kernel)
    print("right")
"""


def run(script: str, environment: dict[str, str]) -> None:
    base = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "FLIPKD"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**base, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "right"


def test_results_are_those_of_the_reference() -> None:
    run(RESULTS, {"TRITON_INTERPRET": "1"})


def test_compiles_for_a_gpu(tmp_path: object) -> None:
    """The interpreter takes what the compiler refuses, so this is another test."""
    run(COMPILES, {"TRITON_CACHE_DIR": str(tmp_path)})


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
