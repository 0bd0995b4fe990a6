"""pair_score in Triton, for rows that lie in GPU memory.

One program scores a block of pairs: it gathers both rows slice by slice, so that a row larger than the registers works
too. int8 sums are exact and the root and the quotient are correctly rounded, so int8 scores have the bits of the CPU's.
Compaction keeps the order: the first kernel counts the survivors per block, a prefix sum turns counts into places, the
second kernel moves them. Block sizes keep a tile of both rows in the registers of four warps (our choice).
"""

# ruff: noqa: N803  (Triton constants are upper case)

from __future__ import annotations

import os

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from flipkd.errors import KernelError
from flipkd.vectors.rows import VectorRows

_TILE = 4096  # numbers of one side that a program holds at a time


def _score_block(
    left: tl.tensor,
    right: tl.tensor,
    left_index: tl.tensor,
    right_index: tl.tensor,
    score: tl.tensor,
    probability: tl.tensor,
    counts: tl.tensor,
    bad_place: tl.tensor,
    left_rows: tl.tensor,
    right_rows: tl.tensor,
    dim: tl.tensor,
    pairs: tl.tensor,
    slope: tl.tensor,
    offset: tl.tensor,
    min_score: tl.tensor,
    INT8: tl.constexpr,
    CALIBRATE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = place < pairs
    left_row = tl.load(left_index + place, mask=inside, other=-1).to(tl.int64)
    right_row = tl.load(right_index + place, mask=inside, other=-1).to(tl.int64)
    bad = (left_row < -1) | (left_row >= left_rows) | (right_row < -1) | (right_row >= right_rows)
    tl.atomic_min(bad_place, tl.min(tl.where(bad, place, pairs), 0))
    valid = (left_row >= 0) & (right_row >= 0) & (bad == 0)  # nothing is read for the others
    zero = tl.zeros([BLOCK_PAIRS], tl.int32 if INT8 else tl.float32)
    dot, left_square, right_square = zero, zero, zero
    for start in range(0, dim, BLOCK_DIM):
        column = start + tl.arange(0, BLOCK_DIM)
        mask = valid[:, None] & (column < dim)[None, :]
        a = tl.load(left + left_row[:, None] * dim + column[None, :], mask=mask, other=0)
        b = tl.load(right + right_row[:, None] * dim + column[None, :], mask=mask, other=0)
        if INT8:
            a = a.to(tl.int32)
            b = b.to(tl.int32)
            left_square += tl.sum(a * a, 1)
            right_square += tl.sum(b * b, 1)
        else:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        dot += tl.sum(a * b, 1)
    value = dot.to(tl.float32)
    if INT8:
        squares = left_square.to(tl.float32) * right_square.to(tl.float32)
        value = tl.div_rn(value, tl.sqrt_rn(tl.where(squares > 1.0, squares, 1.0)))
    value = tl.where(value > 1.0, 1.0, tl.where(value < -1.0, -1.0, value))
    value = tl.where(valid, value, float("nan"))
    tl.store(score + place, value, mask=inside)
    if CALIBRATE:
        tl.store(probability + place, 1.0 / (1.0 + tl.exp(-(slope * value + offset))), mask=inside)
    if COUNT:
        tl.store(counts + tl.program_id(0), tl.sum((valid & (value >= min_score)).to(tl.int64), 0))


def _compact_block(
    score: tl.tensor,
    probability: tl.tensor,
    ends: tl.tensor,
    kept_score: tl.tensor,
    kept_probability: tl.tensor,
    kept_position: tl.tensor,
    pairs: tl.tensor,
    min_score: tl.tensor,
    CALIBRATE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    value = tl.load(score + place, mask=place < pairs, other=float("nan"))
    kept = value >= min_score
    rank = tl.cumsum(kept.to(tl.int64), 0)
    to = tl.load(ends + tl.program_id(0)) - tl.sum(kept.to(tl.int64), 0) + rank - 1
    tl.store(kept_score + to, value, mask=kept)
    tl.store(kept_position + to, place, mask=kept)
    if CALIBRATE:
        tl.store(kept_probability + to, tl.load(probability + place, mask=kept, other=0.0), mask=kept)


_score_kernel = triton.jit(_score_block)
_compact_kernel = triton.jit(_compact_block)


def device() -> torch.device:
    """Return where the kernel runs: the current CUDA device, or the CPU in Triton's interpreter.

    Raises:
        KernelError: there is no CUDA device.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    raise KernelError("pair_score backend 'triton' needs a CUDA GPU; unset FLIPKD_PAIR_SCORE to score on the CPU")


def rows_to_device(rows: VectorRows) -> torch.Tensor:
    """Copy rows to the GPU as a [N, d] float32, bfloat16 or int8 tensor."""
    values = torch.from_numpy(np.array(rows.values))  # a copy, since PyTorch warns of read-only maps
    return (values.view(torch.bfloat16) if rows.dtype == "bf16" else values).to(device())


def pair_score(
    left: VectorRows,
    right: VectorRows,
    left_index: NDArray[np.int32] | NDArray[np.int64],
    right_index: NDArray[np.int32] | NDArray[np.int64],
    calibration: tuple[float, float] | None,
    min_score: float | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.int64] | None]:
    """Copy rows and indices to the GPU, score, copy back. To score often, keep the rows there: `pair_score_tensors`."""
    left_tensor = rows_to_device(left)
    right_tensor = left_tensor if right is left else rows_to_device(right)
    score, probability, position = pair_score_tensors(
        left_tensor,
        right_tensor,
        torch.from_numpy(np.array(left_index)).to(device()),
        torch.from_numpy(np.array(right_index)).to(device()),
        calibration=calibration,
        min_score=min_score,
    )
    return (
        score.cpu().numpy(),
        None if probability is None else probability.cpu().numpy(),
        None if position is None else position.cpu().numpy(),
    )


def pair_score_tensors(
    left: torch.Tensor,
    right: torch.Tensor,
    left_index: torch.Tensor,
    right_index: torch.Tensor,
    *,
    calibration: tuple[float, float] | None = None,
    min_score: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Score pairs of rows in GPU memory; the contract is that of `flipkd.kernels.pair_score.pair_score`.

    Args:
        left: [N, d] contiguous float32, bfloat16 or int8.
        right: [M, d] of the same type.
        left_index: [P] int32 or int64 on the same device.
        right_index: [P] likewise.
        calibration: (a, b) of the probability.
        min_score: keep survivors only.

    Returns:
        score [P or survivors] float32, probability or None, position int64 or None.

    Raises:
        IndexError: an index outside -1..rows-1; nothing was read there.
    """
    pairs, dim = len(left_index), left.shape[1]
    block_dim = min(128, triton.next_power_of_2(dim))
    block_pairs = _TILE // block_dim
    blocks = triton.cdiv(pairs, block_pairs)
    on = left.device
    score = torch.empty(pairs, dtype=torch.float32, device=on)
    probability = torch.empty_like(score) if calibration is not None else None
    counts = torch.zeros(blocks, dtype=torch.int64, device=on)
    bad_place = torch.full((1,), pairs, dtype=torch.int64, device=on)
    slope, offset = calibration or (0.0, 0.0)
    least = -torch.inf if min_score is None else min_score
    if blocks:
        _score_kernel[(blocks,)](
            left,
            right,
            left_index,
            right_index,
            score,
            score if probability is None else probability,
            counts,
            bad_place,
            len(left),
            len(right),
            dim,
            pairs,
            slope,
            offset,
            least,
            left.dtype == torch.int8,
            probability is not None,
            min_score is not None,
            block_pairs,
            block_dim,
        )
    place = int(bad_place.item())
    if place < pairs:
        from flipkd.kernels.pair_score import out_of_range

        raise out_of_range(place, int(left_index[place]), int(right_index[place]), len(left), len(right))
    if min_score is None:
        return score, probability, None
    ends = torch.cumsum(counts, 0)
    survivors = int(ends[-1].item()) if blocks else 0
    kept_score = torch.empty(survivors, dtype=torch.float32, device=on)
    kept_position = torch.empty(survivors, dtype=torch.int64, device=on)
    kept_probability = torch.empty_like(kept_score) if probability is not None else None
    if survivors:
        _compact_kernel[(blocks,)](
            score,
            score if probability is None else probability,
            ends,
            kept_score,
            kept_score if kept_probability is None else kept_probability,
            kept_position,
            pairs,
            least,
            probability is not None,
            block_pairs,
        )
    return kept_score, kept_probability, kept_position
