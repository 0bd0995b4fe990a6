"""pair_score in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when it is imported, so test_gpu.py runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flipkd.kernels.native import native
from flipkd.kernels.pair_score import gpu, pair_score
from flipkd.vectors.mapped import map_file
from flipkd.vectors.rows import DTYPES, VectorRows, quantise

ROWS = 40


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Several blocks and chunks for a few dozen pairs, so that there is something to join."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_COMPACT_BLOCK", 8)
        patch.setattr(gpu, "_CONFIGS", [triton.Config({"BLOCK_PAIRS": 8}, num_warps=4)])
        patch.setattr(gpu, "_RUN_CONFIGS", [triton.Config({"BLOCK_PAIRS": 4, "CHUNK": 16}, num_warps=4)])
        yield


def make_rows(dim: int, dtype: str, seed: int = 0) -> VectorRows:
    vectors = np.random.default_rng(seed).standard_normal((ROWS, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7] = 0
    return quantise(vectors, dtype)


def on_gpu(
    left: VectorRows, right: VectorRows, *indices: NDArray[Any], **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    rows = gpu.rows_to_device(left), gpu.rows_to_device(right)
    return gpu.pair_score_tensors(*rows, *(torch.from_numpy(index) for index in indices), **options)


@settings(max_examples=25)
@given(
    dim=st.sampled_from((1, 3, 4, 12, 33, 64, 127, 128, 300)),
    runs=st.lists(st.tuples(st.integers(-1, ROWS - 1), st.integers(1, 12)), max_size=8),
    dtype=st.sampled_from(DTYPES),
    index_type=st.sampled_from((np.int32, np.int64)),
    grouped=st.sampled_from((True, False, None)),
    min_score=st.sampled_from((None, -2.0, 0.05, 2.0)),
    calibration=st.none() | st.tuples(st.floats(-20, 20), st.floats(-5, 5)),
    seed=st.integers(0, 1000),
)
def test_is_reference(
    dim: int,
    runs: list[tuple[int, int]],
    dtype: str,
    index_type: type[np.int32] | type[np.int64],
    grouped: bool | None,
    min_score: float | None,
    calibration: tuple[float, float] | None,
    seed: int,
) -> None:
    left_rows, right_rows = make_rows(dim, dtype, seed), make_rows(dim, dtype, seed + 1)
    left = np.repeat([row for row, _ in runs], [length for _, length in runs]).astype(index_type)
    right = np.random.default_rng(seed).integers(-1, ROWS, len(left)).astype(index_type)
    options: dict[str, Any] = {"calibration": calibration}
    want = pair_score(left_rows, right_rows, left, right, backend="reference", **options)
    score, probability, position = on_gpu(left_rows, right_rows, left, right, grouped=grouped, **options)
    assert position is None
    np.testing.assert_allclose(score.numpy(), want.score, rtol=0, atol=1e-6)  # NaN where the reference has it
    if calibration is None:
        assert probability is None
    else:
        np.testing.assert_allclose(probability.numpy(), want.probability, rtol=0, atol=1e-5)
    if min_score is None:
        return
    kept = np.flatnonzero(score.numpy() >= min_score)
    few = on_gpu(left_rows, right_rows, left, right, grouped=grouped, min_score=min_score, **options)
    np.testing.assert_array_equal(few[2].numpy(), kept)  # in the order of the pairs
    assert few[0].numpy().tobytes() == score.numpy()[kept].tobytes()
    if calibration is not None:
        assert few[1].numpy().tobytes() == probability.numpy()[kept].tobytes()


@pytest.mark.skipif(native() is None, reason="installed without a compiler")
@pytest.mark.parametrize("dim", [3, 128, 129])
def test_int8_has_the_bits_of_the_cpu_on_both_paths(dim: int) -> None:
    rows = make_rows(dim, "int8")
    left, right = np.repeat(np.arange(8), 5), np.random.default_rng(1).integers(0, ROWS, 40)
    want = pair_score(rows, rows, left, right, backend="cpu").score
    for grouped in (True, False):
        assert on_gpu(rows, rows, left, right, grouped=grouped)[0].numpy().tobytes() == want.tobytes()


def test_extreme_int8_sums_are_exact() -> None:
    """127 * 127 * d is past 2^24 here, where float32 sums would have lost their last digits."""
    dim = 4096
    values = np.full((2, dim), 127, np.int8)
    values[1, ::2] = -127
    values[1, 0] = 127
    rows, index = VectorRows(values, "int8"), np.array([0, 1])
    score = on_gpu(rows, rows, index, index[::-1].copy())[0]
    assert score.tolist() == [pytest.approx(2 / dim, abs=1e-9)] * 2
    assert on_gpu(rows, rows, index, index)[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [-2, ROWS, 2**40, -(2**62)])
def test_an_index_outside_is_named_and_nothing_read_there(grouped: bool, side: int, bad: int) -> None:
    rows = make_rows(16, "float32")
    indices = [np.zeros(50, np.int64), np.ones(50, np.int64)]
    indices[side][[20, 45]] = bad
    name = ("left", "right")[side]
    with pytest.raises(IndexError, match=rf"{name}_index\[20\] is {bad}, outside the {ROWS} rows"):
        on_gpu(rows, rows, *indices, grouped=grouped)  # in the interpreter a read there would end the process
    with pytest.raises(IndexError, match=rf"{name}_index\[20\] is {bad}"):
        pair_score(rows, rows, *indices, backend="triton")


def test_a_run_of_a_bad_index_ends_with_the_pairs() -> None:
    """-2 is also what a place past the end reads as."""
    rows, index = torch.ones(4, 8), torch.zeros(6, dtype=torch.int64)
    raw = torch.full((70,), 7.0)
    with pytest.raises(IndexError, match=r"left_index\[0\] is -2"):
        gpu._score(rows, rows, index - 2, index, raw[:6], None, None, True)
    assert (raw[6:] == 7).all()


@pytest.mark.parametrize("grouped", [True, False])
def test_every_score_is_written_and_none_beside_them(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(33, "bf16")
    left, right = np.repeat(np.arange(9), 5), np.random.default_rng(1).integers(-1, ROWS, 45)
    options: dict[str, Any] = {"grouped": grouped, "calibration": (3.0, 1.0), "min_score": 0.0}
    want = on_gpu(rows, rows, left, right, **options)
    real_empty, real_empty_like = torch.empty, torch.empty_like
    buffers: list[torch.Tensor] = []

    def poisoned(numbers: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        raw = real_empty(numbers + 128, dtype=dtype, device=device)
        raw.view(torch.uint8).fill_(0xA5)
        buffers.append(raw)
        return raw[64 : 64 + numbers]

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t: poisoned(len(t), dtype=t.dtype, device=t.device))
    got = on_gpu(rows, rows, left, right, **options)
    monkeypatch.setattr(torch, "empty", real_empty)
    monkeypatch.setattr(torch, "empty_like", real_empty_like)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(buffers) == 6
    for raw in buffers:
        sides = raw.view(torch.uint8)[: 64 * raw.element_size()], raw.view(torch.uint8)[-64 * raw.element_size() :]
        assert all((side == 0xA5).all() for side in sides)


def test_runs_are_seen() -> None:
    assert gpu._comes_in_runs(torch.arange(100).repeat_interleave(20))
    assert not gpu._comes_in_runs(torch.arange(100).repeat(20))
    assert not gpu._comes_in_runs(torch.arange(1))


def test_rows_that_are_not_contiguous_are_refused() -> None:
    rows, index = torch.zeros(4, 8).T, torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        gpu.pair_score_tensors(rows, rows, index, index)


def test_no_pairs_and_no_rows() -> None:
    empty, nothing = VectorRows(np.empty((0, 4), np.int8), "int8"), np.empty(0, np.int64)
    found = pair_score(empty, empty, nothing, nothing, min_score=0.0, backend="triton")
    assert found.position is not None
    assert len(found.position) == len(found.score) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_store_are_copied_once_while_it_is_open(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, index = make_rows(12, dtype), np.arange(ROWS)[::-1]
    own.values.tofile(tmp_path / "vectors.bin")
    mapped = VectorRows(map_file(tmp_path / "vectors.bin", own.values.dtype).reshape(own.values.shape), dtype)
    copied: list[VectorRows] = []
    to_device = gpu.rows_to_device
    monkeypatch.setattr(gpu, "rows_to_device", lambda rows: (copied.append(rows), to_device(rows))[1])
    want = pair_score(own, own, index, index[::-1], backend="reference").score
    for _ in range(3):
        found = pair_score(mapped, mapped, index, index[::-1], backend="triton").score
        np.testing.assert_allclose(found, want, atol=1e-6)
    assert copied == [mapped]
    copied.clear()
    assert len(gpu._resident) == 1
    del mapped
    assert not gpu._resident  # the GPU's memory is given back with the store


def test_rows_that_may_change_are_copied_for_every_call() -> None:
    rows, index = make_rows(12, "float32"), np.zeros(1, np.int64)
    first = pair_score(rows, rows, index, index, backend="triton").score
    rows.values[0] = 0
    assert pair_score(rows, rows, index, index, backend="triton").score[0] == 0 != first[0]
