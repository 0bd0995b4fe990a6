"""pool_project in Triton.

A program makes the rows of a few neighbouring texts. First it reads the tokens of each, once, a few at a time: a
token's whole state lies in the registers, so its norm and its part of the sum come from one read. The pooled vectors
(4 bytes a number, one a text) go through a scratch buffer that stays in the caches; after a barrier they come back as
one tile, so that A is read once a program and not once a text. The projection is a float32 product of full precision
("ieee", not tf32). The row is divided by its norm, quantised and stored, so nothing but finished rows leaves.

A program needs memory for its texts' states once, N * r bytes for the rows, and A from the L2 cache: with 40 tokens of
576 bf16 numbers a text has 46 KB to read, and 128 bytes to write. That a long text is read by one program alone is the
price of one kernel; a batch has thousands of texts.

Nothing is tuned at run time: the tile of tokens and the number of warps decide in which order float32 sums are formed,
so a choice by stopwatch could change last bits from one process to the next. They follow from width and r alone. The
number of texts a program has does not touch a text's own sums.

Tested in Triton's interpreter and on an H200, where it took 1.45 times as long as torch.compile's kernels for the
same steps: too few loads are under way at a time.
"""

# ruff: noqa: N803  (Triton constants are upper case)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flipkd.kernels.pool_project import MAX_DIM, MAX_WIDTH, TORCH_DTYPES

_TILE = 4096  # numbers of token states that a program holds at a time
_MATRIX_TILE = 4096  # numbers of A likewise, in shared memory: 16 KiB
_DOT_ROWS = 16  # rows of the smallest tile that tl.dot takes
_KINDS = {"float32": 0, "bf16": 1, "int8": 2}


def _pool_project_texts(
    states: tl.tensor,
    weight: tl.tensor,
    starts: tl.tensor,
    matrix: tl.tensor,
    pooled: tl.tensor,
    rows: tl.tensor,
    finite: tl.tensor,
    texts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    dim: tl.tensor,
    epsilon: tl.tensor,
    NORM: tl.constexpr,
    LAST: tl.constexpr,
    KIND: tl.constexpr,
    TEXTS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DOT_ROWS: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * TEXTS
    column = tl.arange(0, WIDTH)
    in_width = column < width
    for number in range(TEXTS):
        text = first + number
        exists = text < texts
        begin = tl.load(starts + text, mask=exists, other=0).to(tl.int64)
        end = tl.load(starts + text + 1, mask=exists, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), tokens)  # nothing outside the states is read, whatever starts say
        end = tl.minimum(tl.maximum(end, begin), tokens)
        if LAST:
            begin = tl.maximum(begin, end - 1)
        sums = tl.zeros([TOKENS, WIDTH], tl.float32)
        for start in tl.range(begin, end, TOKENS, num_stages=3):
            token = start + tl.arange(0, TOKENS)
            mask = (token < end)[:, None] & in_width[None, :]
            x = tl.load(states + token[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if NORM:
                mean_square = tl.sum(x * x, 1) / width
                x = x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + epsilon))[:, None]
            sums += x
        total = tl.sum(sums, 0)
        if NORM:  # the weight is the same for all tokens, so it comes after the sum
            total *= tl.load(weight + column, mask=in_width, other=0.0).to(tl.float32)
        total = tl.div_rn(total, tl.maximum(end - begin, 1).to(tl.float32))
        tl.store(pooled + text * width + column, total, mask=column < tl.where(exists, width, 0))

    tl.debug_barrier()  # the threads of this program see each other's part of `pooled`

    text = first + tl.arange(0, DOT_ROWS)
    valid = (tl.arange(0, DOT_ROWS) < TEXTS) & (text < texts)
    number = tl.arange(0, DIM)
    z = tl.zeros([DOT_ROWS, DIM], tl.float32)
    for start in range(0, width, COLUMNS):
        part = start + tl.arange(0, COLUMNS)
        p = tl.load(
            pooled + text[:, None] * width + part[None, :], mask=valid[:, None] & (part < width)[None, :], other=0.0
        )
        a = tl.load(
            matrix + number[None, :] * width + part[:, None],
            mask=(number < dim)[None, :] & (part < width)[:, None],
            other=0.0,
        )
        z = tl.dot(p, a.to(tl.float32), z, input_precision="ieee")
    square = tl.sum(z * z, 1)
    is_finite = square < float("inf")  # false for NaN too
    length = tl.sqrt_rn(square)
    length = tl.where(length > 1e-12, length, 1e-12)
    unit = tl.where(is_finite[:, None], tl.div_rn(z, length[:, None] + tl.zeros_like(z)), 0.0)
    place = rows + text[:, None] * dim + number[None, :]
    mask = valid[:, None] & (number < dim)[None, :]
    if KIND == 2:
        largest = tl.max(tl.abs(unit), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        ratio = tl.div_rn(unit, largest[:, None] + tl.zeros_like(unit))
        # The product must be rounded before the sum: an fma with 0 cannot be fused with what follows. Adding and taking
        # away 1.5 * 2^23 rounds to whole numbers, ties to even.
        scaled = tl.fma(ratio, 127.0 + tl.zeros_like(ratio), tl.zeros_like(ratio))
        tl.store(place, ((scaled + 12582912.0) - 12582912.0).to(tl.int8), mask=mask)
    elif KIND == 1:
        bits = unit.to(
            tl.uint32, bitcast=True
        )  # to nearest, ties to even, written out: the interpreter's cast cuts off
        tl.store(place, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16), mask=mask)
    else:
        tl.store(place, unit, mask=mask)
    tl.store(finite + text, is_finite.to(tl.uint8), mask=valid)


# Batches differ in texts and tokens, and the kernel is not the better for knowing what divides their numbers.
_kernel = triton.jit(_pool_project_texts, do_not_specialize=["texts", "tokens"])


def constants(width: int, dim: int) -> dict[str, int]:
    """Return the tile sizes that follow from the shape; see the module's docstring for why nothing else decides."""
    width_tile, dim_tile = triton.next_power_of_2(width), max(16, triton.next_power_of_2(dim))
    return {
        "TOKENS": max(1, min(16, _TILE // width_tile)),
        "WIDTH": width_tile,
        "COLUMNS": max(16, min(64, _MATRIX_TILE // dim_tile)),
        "DIM": dim_tile,
        "DOT_ROWS": _DOT_ROWS,
    }


def texts_per_program(texts: int, processors: int) -> int:
    """Return 1 to 16: as many as leave every multiprocessor two programs."""
    share = 1
    while share < _DOT_ROWS and texts >= share * 2 * processors * 2:
        share *= 2
    return share


def pool_project(
    states: Tensor,
    cu_seqlens: Tensor,
    projection: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    pooling: str,
    dtype: str,
) -> tuple[Tensor, Tensor]:
    """Return (rows, finite); `flipkd.kernels.pool_project.pool_project` is the contract and the checks.

    Raises:
        ValueError: width above MAX_WIDTH or r above MAX_DIM, which the registers cannot hold.
    """
    width, dim = states.shape[1], projection.shape[0]
    if width > MAX_WIDTH or dim > MAX_DIM:
        raise ValueError(
            f"the Triton kernel takes states of at most {MAX_WIDTH} numbers and rows of at most {MAX_DIM}, not {width} "
            f"and {dim}; pass backend='reference'"
        )
    texts = len(cu_seqlens) - 1
    on = states.device
    rows = torch.empty(texts, dim, dtype=torch.uint16 if dtype == "bf16" else TORCH_DTYPES[dtype], device=on)
    finite = torch.empty(texts, dtype=torch.uint8, device=on)
    if texts:
        processors = torch.cuda.get_device_properties(on).multi_processor_count if on.type == "cuda" else 1
        share = texts_per_program(texts, processors)
        launch(states, cu_seqlens, projection.contiguous(), norm_weight, epsilon, pooling, dtype, share, rows, finite)
    return rows.view(TORCH_DTYPES[dtype]), finite.view(torch.bool)


def launch(
    states: Tensor,
    cu_seqlens: Tensor,
    projection: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    pooling: str,
    dtype: str,
    share: int,
    rows: Tensor,
    finite: Tensor,
) -> None:
    """Write `rows` [N, r] (bf16 as uint16) and `finite` uint8 [N], with `share` texts a program.

    Waits for nothing, so a CUDA graph can capture it.
    """
    (tokens, width), dim, texts = states.shape, projection.shape[0], len(finite)
    pooled = torch.empty(texts, width, dtype=torch.float32, device=states.device)
    _kernel[(triton.cdiv(texts, share),)](
        states,
        projection if norm_weight is None else norm_weight,
        cu_seqlens,
        projection,
        pooled,
        rows,
        finite,
        texts,
        tokens,
        width,
        dim,
        epsilon,
        NORM=norm_weight is not None,
        LAST=pooling == "last",
        KIND=_KINDS[dtype],
        TEXTS=share,
        **constants(width, dim),
        num_warps=16 if dim > 256 else 8,
        enable_fp_fusion=False,  # sums are rounded as they are written, whatever Triton's default
    )
