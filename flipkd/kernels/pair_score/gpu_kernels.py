"""The Triton kernels of pair_score; gpu.py launches them.

A program scores a block of pairs: both rows come into the registers, 16 bytes a thread, and a row lies in one warp.

- Any order (`_score_block`): a block of pairs at a time; nothing depends on the pair before.
- Runs of one left row (`_score_runs`): a program goes through a stretch of pairs, run by run. The left row is loaded,
  and its norm summed, once for a run of at most BLOCK_PAIRS pairs. gpu.py chooses the path.
- Survivors of `min_score` keep their order: one kernel counts them block by block, a prefix sum turns counts into
  places, one kernel moves them. No atomics, so the result is the same every time.

int8 rows of a multiple of 4 numbers are read as int32 words, and four products are added up by one `dp4a`; tl.dot would
compute all pairs of a block's left and right rows to use the diagonal, so it does not pay for gathered pairs. Compiled
for sm_90 with d = 128, 64 pairs and 4 warps: 8 `ld.global.v4.b32` a thread for the rows (LDG.E.128), 48 `dp4a.s32.s32`
(IDP.4A.S8.S8: products and both norms), shuffles inside a warp for the sums, 40 registers, no spill. Other int8 rows
are widened byte by byte. Sums are int32 and exact, root and quotient correctly rounded, so int8 scores have the bits of
the CPU's. float32 and bf16 rows are summed in float32, in an order that the tuned sizes do not touch (for rows of 32
numbers or more), so tuning does not change a score.

An index outside the rows is never read through: its pair is masked, and the least such place reported (the only atomic,
reached by no program without one).

Tested in Triton's interpreter and on an H200; figures in docs/kernels.md.
"""

# ruff: noqa: N803  (Triton constants are upper case)

from __future__ import annotations

import triton
import triton.language as tl


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


# One build for all numbers of rows and pairs, whatever divides them: they are only compared with.
score_kernel = triton.jit(_score_block, do_not_specialize=["left_rows", "right_rows", "pairs"])
runs_kernel = triton.jit(_score_runs, do_not_specialize=["left_rows", "right_rows", "pairs"])
count_kernel = triton.jit(_count_block, do_not_specialize=["pairs"])
compact_kernel = triton.jit(_compact_block, do_not_specialize=["pairs"])
