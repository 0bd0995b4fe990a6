"""pair_score in Triton, for rows that lie in GPU memory.

A program scores a block of pairs: both rows come into the registers, 16 bytes a thread, and a row lies in one warp.

- Any order (`_score_block`): a block of pairs at a time; nothing depends on the pair before.
- Runs of one left row (`_score_runs`): a program goes through a stretch of pairs, run by run. The left row is loaded,
  and its norm summed, once for a run of at most BLOCK_PAIRS pairs. Taken where pairs have at least _RUN neighbours with
  their left row on average, by a look at the first ones.
- Survivors of `min_score` keep their order: one kernel counts them block by block, a prefix sum turns counts into
  places, one kernel moves them. No atomics, so the result is the same every time.

int8 rows of a multiple of 4 numbers are read as int32 words, and four products are added up by one `dp4a`; tl.dot would
compute all pairs of a block's left and right rows to use the diagonal, so it does not pay for gathered pairs. Compiled
for sm_90 with d = 128, 64 pairs and 4 warps: 8 `ld.global.v4.b32` a thread for the rows (LDG.E.128), 48 `dp4a.s32.s32`
(IDP.4A.S8.S8: products and both norms), shuffles inside a warp for the sums, 40 registers, no spill. Other int8 rows are
widened byte by byte. Sums are int32 and exact, root and quotient correctly rounded, so int8 scores have the bits of the
CPU's. float32 and bf16 rows are summed in float32, in an order that the tuned sizes do not touch (for rows of 32 numbers
or more), so tuning does not change a score.

An index outside the rows is never read through: its pair is masked, and the least such place reported (the only atomic,
reached by no program without one).

Tested in Triton's interpreter and compiled for sm_90; never run on a GPU so far, so the list of sizes is a guess from
the compiler's register counts.
"""

# ruff: noqa: N803  (Triton constants are upper case)

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from flipkd.errors import KernelError
from flipkd.vectors.rows import VectorRows

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TUNED_FROM = 1 << 18  # pairs; a smaller call runs with the first of the configurations
_COMPACT_BLOCK = 1024  # scores that a program counts or moves
_SAMPLE = 1 << 14  # pairs that are looked at to see whether they come in runs
_RUN = 4  # pairs per left row, on average, from which on the kernel for runs is taken

# The few shapes worth trying (our choice): a thread holds 8 to 64 numbers of 4 bytes of each side. The first is the
# one for small calls.
_CONFIGS = [
    triton.Config({"BLOCK_PAIRS": pairs}, num_warps=warps)
    for pairs, warps in ((64, 4), (32, 4), (128, 4), (32, 2), (128, 8))
]
_RUN_CONFIGS = [
    triton.Config({"BLOCK_PAIRS": pairs, "CHUNK": chunk}, num_warps=warps)
    for pairs, chunk, warps in ((32, 256, 4), (16, 256, 2), (32, 128, 2), (32, 512, 4), (64, 512, 4))
]


def _dot4_words(a: tl.tensor, b: tl.tensor, total: tl.tensor, DP4A: tl.constexpr) -> tl.tensor:
    """total + the products of the four int8 in each int32 of `a` and of `b`."""
    if DP4A:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:  # the interpreter has no assembler
        for shift in tl.static_range(0, 32, 8):
            total += ((a << (24 - shift)) >> 24) * ((b << (24 - shift)) >> 24)
    return total


_dot4 = triton.jit(_dot4_words)


def _report_bad(bad_place: tl.tensor, bad: tl.tensor, place: tl.tensor, pairs: tl.tensor) -> None:
    if tl.max(bad.to(tl.int32), 0) > 0:  # almost never, and then the order does not matter
        tl.atomic_min(bad_place, tl.min(tl.where(bad, place, pairs), 0))


_report = triton.jit(_report_bad)


def _cosine_of_sums(
    dot: tl.tensor, left_square: tl.tensor, right_square: tl.tensor, valid: tl.tensor, INT8: tl.constexpr
) -> tl.tensor:
    value = dot.to(tl.float32)
    if INT8:
        squares = left_square.to(tl.float32) * right_square.to(tl.float32)
        value = tl.div_rn(value, tl.sqrt_rn(tl.where(squares > 1.0, squares, 1.0)))
    value = tl.where(value > 1.0, 1.0, tl.where(value < -1.0, -1.0, value))
    return tl.where(valid, value, float("nan"))


_cosine = triton.jit(_cosine_of_sums)


def _score_block(
    left: tl.tensor,
    right: tl.tensor,
    left_index: tl.tensor,
    right_index: tl.tensor,
    score: tl.tensor,
    probability: tl.tensor,
    bad_place: tl.tensor,
    left_rows: tl.tensor,
    right_rows: tl.tensor,
    pairs: tl.tensor,
    slope: tl.tensor,
    offset: tl.tensor,
    INT8: tl.constexpr,
    WORDS: tl.constexpr,
    DP4A: tl.constexpr,
    CALIBRATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
) -> None:
    """BLOCK_PAIRS pairs in any order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = place < pairs
    left_row = tl.load(left_index + place, mask=inside, other=-1).to(tl.int64)
    right_row = tl.load(right_index + place, mask=inside, other=-1).to(tl.int64)
    bad = (left_row < -1) | (left_row >= left_rows) | (right_row < -1) | (right_row >= right_rows)
    _report(bad_place, bad, place, pairs)
    valid = (left_row >= 0) & (right_row >= 0) & (bad == 0)  # nothing is read for the others
    dot = tl.zeros([BLOCK_PAIRS, BLOCK_COLUMNS], tl.int32 if INT8 else tl.float32)
    left_square, right_square = dot, dot
    for start in tl.static_range(0, COLUMNS, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = valid[:, None] & (column < COLUMNS)[None, :]
        a = tl.load(left + left_row[:, None] * COLUMNS + column[None, :], mask=mask, other=0)
        b = tl.load(right + right_row[:, None] * COLUMNS + column[None, :], mask=mask, other=0)
        if WORDS:
            dot = _dot4(a, b, dot, DP4A)
            left_square = _dot4(a, a, left_square, DP4A)
            right_square = _dot4(b, b, right_square, DP4A)
        elif INT8:
            a = a.to(tl.int32)
            b = b.to(tl.int32)
            dot += a * b
            left_square += a * a
            right_square += b * b
        else:
            dot += a.to(tl.float32) * b.to(tl.float32)
    value = _cosine(tl.sum(dot, 1), tl.sum(left_square, 1), tl.sum(right_square, 1), valid, INT8)
    tl.store(score + place, value, mask=inside)
    if CALIBRATE:
        tl.store(probability + place, 1.0 / (1.0 + tl.exp(-(slope * value + offset))), mask=inside)


def _score_runs(
    left: tl.tensor,
    right: tl.tensor,
    left_index: tl.tensor,
    right_index: tl.tensor,
    score: tl.tensor,
    probability: tl.tensor,
    bad_place: tl.tensor,
    left_rows: tl.tensor,
    right_rows: tl.tensor,
    pairs: tl.tensor,
    slope: tl.tensor,
    offset: tl.tensor,
    INT8: tl.constexpr,
    WORDS: tl.constexpr,
    DP4A: tl.constexpr,
    CALIBRATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """CHUNK pairs, step by step: as many as share their left row, BLOCK_PAIRS at most."""
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, pairs)
    lane = tl.arange(0, BLOCK_PAIRS)
    while begin < end:
        place = begin + lane
        left_row = tl.load(left_index + begin).to(tl.int64)
        others = tl.load(left_index + place, mask=place < end, other=-2).to(tl.int64)
        # the first pair that is another's, or past the end; never the pair at `begin` itself
        length = tl.min(tl.where((place < end) & (others == left_row), BLOCK_PAIRS, lane), 0)
        inside = lane < length
        right_row = tl.load(right_index + place, mask=inside, other=-1).to(tl.int64)
        bad_left = (left_row < -1) | (left_row >= left_rows)
        bad_right = (right_row < -1) | (right_row >= right_rows)
        _report(bad_place, bad_right | (lane < tl.where(bad_left, length, 0)), place, pairs)
        has_left = (left_row >= 0) & (left_row < left_rows)
        valid = (lane < tl.where(has_left, length, 0)) & (right_row >= 0) & (bad_right == 0)
        dot = tl.zeros([BLOCK_PAIRS, BLOCK_COLUMNS], tl.int32 if INT8 else tl.float32)
        right_square = dot
        left_square = tl.zeros([BLOCK_COLUMNS], tl.int32 if INT8 else tl.float32)
        for start in tl.static_range(0, COLUMNS, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            mask = valid[:, None] & (column < COLUMNS)[None, :]
            a = tl.load(left + left_row * COLUMNS + column, mask=column < tl.where(has_left, COLUMNS, 0), other=0)
            b = tl.load(right + right_row[:, None] * COLUMNS + column[None, :], mask=mask, other=0)
            if WORDS:
                dot = _dot4(a[None, :] + tl.zeros_like(b), b, dot, DP4A)
                left_square = _dot4(a, a, left_square, DP4A)
                right_square = _dot4(b, b, right_square, DP4A)
            elif INT8:
                a = a.to(tl.int32)
                b = b.to(tl.int32)
                dot += a[None, :] * b
                left_square += a * a
                right_square += b * b
            else:
                dot += a.to(tl.float32)[None, :] * b.to(tl.float32)
        value = _cosine(tl.sum(dot, 1), tl.sum(left_square, 0), tl.sum(right_square, 1), valid, INT8)
        tl.store(score + place, value, mask=inside)
        if CALIBRATE:
            tl.store(probability + place, 1.0 / (1.0 + tl.exp(-(slope * value + offset))), mask=inside)
        begin += length.to(tl.int64)


def _count_block(
    score: tl.tensor, counts: tl.tensor, pairs: tl.tensor, min_score: tl.tensor, BLOCK: tl.constexpr
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(score + place, mask=place < pairs, other=float("nan"))
    tl.store(counts + tl.program_id(0), tl.sum((value >= min_score).to(tl.int64), 0))


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
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(score + place, mask=place < pairs, other=float("nan"))
    kept = value >= min_score
    rank = tl.cumsum(kept.to(tl.int64), 0)
    to = tl.load(ends + tl.program_id(0)) - tl.sum(kept.to(tl.int64), 0) + rank - 1
    tl.store(kept_score + to, value, mask=kept)
    tl.store(kept_position + to, place, mask=kept)
    if CALIBRATE:
        tl.store(kept_probability + to, tl.load(probability + place, mask=kept, other=0.0), mask=kept)


_score_kernel = triton.jit(_score_block)
_runs_kernel = triton.jit(_score_runs)
_count_kernel = triton.jit(_count_block)
_compact_kernel = triton.jit(_compact_block)


def _tuned(kernel: Any, configs: list[triton.Config]) -> Any:
    """Tuned once per process for each (numbers in a row, types of rows and indices); not in the interpreter."""
    return kernel if _INTERPRETED else triton.autotune(configs=configs, key=["COLUMNS"])(kernel)


_tuned_score_kernel = _tuned(_score_kernel, _CONFIGS)
_tuned_runs_kernel = _tuned(_runs_kernel, _RUN_CONFIGS)


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
    grouped: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Score pairs of rows in GPU memory; the contract is that of `flipkd.kernels.pair_score.pair_score`.

    Args:
        left: [N, d] contiguous float32, bfloat16 or int8.
        right: [M, d] of the same type.
        left_index: [P] int32 or int64 on the same device.
        right_index: [P] likewise.
        calibration: (a, b) of the probability.
        min_score: keep survivors only.
        grouped: whether pairs with the same left row follow each other; None: look at the first few.

    Returns:
        score [P or survivors] float32, probability or None, position int64 or None.

    Raises:
        IndexError: an index outside -1..rows-1; nothing was read there.
        ValueError: rows that are not contiguous.
    """
    if not (left.is_contiguous() and right.is_contiguous()):
        raise ValueError("rows must be contiguous; pass rows.contiguous()")
    pairs, on = len(left_index), left.device
    score = torch.empty(pairs, dtype=torch.float32, device=on)
    probability = torch.empty_like(score) if calibration is not None else None
    if pairs:
        _score(left, right, left_index.contiguous(), right_index.contiguous(), score, probability, calibration, grouped)
    if min_score is None:
        return score, probability, None
    blocks = triton.cdiv(pairs, _COMPACT_BLOCK)
    counts = torch.empty(blocks, dtype=torch.int64, device=on)
    if blocks:
        _count_kernel[(blocks,)](score, counts, pairs, min_score, BLOCK=_COMPACT_BLOCK)
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
            min_score,
            CALIBRATE=probability is not None,
            BLOCK=_COMPACT_BLOCK,
        )
    return kept_score, kept_probability, kept_position


def shape_constants(dtype: torch.dtype, dim: int) -> dict[str, int | bool]:
    """Return what follows from the rows alone, so that a tuned launch adds up a row in the same order as any other.

    BLOCK_COLUMNS is at most what one warp loads with 16 bytes a thread: then a row lies in one warp.
    """
    int8 = dtype == torch.int8
    words = int8 and dim % 4 == 0  # a row starts on a whole int32
    widest = 128 if words or dtype == torch.float32 else 256
    columns = dim // 4 if words else dim
    return {
        "INT8": int8,
        "WORDS": words,
        "COLUMNS": columns,
        "BLOCK_COLUMNS": min(widest, triton.next_power_of_2(columns)),
    }


def _score(
    left: torch.Tensor,
    right: torch.Tensor,
    left_index: torch.Tensor,
    right_index: torch.Tensor,
    score: torch.Tensor,
    probability: torch.Tensor | None,
    calibration: tuple[float, float] | None,
    grouped: bool | None,
) -> None:
    pairs = len(left_index)
    constants = shape_constants(left.dtype, left.shape[1])
    bad_place = torch.full((1,), pairs, dtype=torch.int64, device=left.device)
    slope, offset = calibration or (0.0, 0.0)
    if grouped is None:
        grouped = _comes_in_runs(left_index)
    configs = _RUN_CONFIGS if grouped else _CONFIGS
    sizes: dict[str, int] = {}
    if _INTERPRETED or pairs < _TUNED_FROM:
        kernel = _runs_kernel if grouped else _score_kernel
        sizes = {**configs[0].kwargs, "num_warps": configs[0].num_warps}
    else:
        kernel = _tuned_runs_kernel if grouped else _tuned_score_kernel
    step = "CHUNK" if grouped else "BLOCK_PAIRS"
    kernel[lambda values: (triton.cdiv(pairs, values[step]),)](
        left.view(torch.int32) if constants["WORDS"] else left,
        right.view(torch.int32) if constants["WORDS"] else right,
        left_index,
        right_index,
        score,
        score if probability is None else probability,
        bad_place,
        len(left),
        len(right),
        pairs,
        slope,
        offset,
        DP4A=not _INTERPRETED and torch.version.hip is None,
        CALIBRATE=probability is not None,
        **constants,
        **sizes,
        enable_fp_fusion=False,  # rounded as it is written, whatever Triton's default
    )
    place = int(bad_place.item())
    if place < pairs:
        from flipkd.kernels.pair_score import out_of_range

        raise out_of_range(place, int(left_index[place]), int(right_index[place]), len(left), len(right))


def _comes_in_runs(left_index: torch.Tensor) -> bool:
    sample = left_index[:_SAMPLE]
    runs = 1 + int((sample[1:] != sample[:-1]).sum().item())
    return len(sample) >= _RUN * runs
