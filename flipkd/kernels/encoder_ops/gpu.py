"""The same operations in Triton, for bf16, float16 or float32 products in GPU memory: one pass over memory each.

PyTorch takes three passes for a gated activation, four for residual + norm, and about ten, most of them in float32, to
turn queries and keys by position. At the widths of small encoders these passes take longer than the multiplications
between which they stand. Here each number is read once and written once, and arithmetic is float32 inside, rounded
where PyTorch rounds: the sum of the residual stream to the stream's type, before the norm is taken of it.

Each row is computed by one program in an order that follows from the width alone, so a token does not depend on its
neighbours. int8 products go through ``reference.py``.

Tested in Triton's interpreter and compiled for sm_90.
"""

# ruff: noqa: N803  (Triton constants are upper case)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flipkd.kernels.encoder_ops import reference
from flipkd.kernels.encoder_ops.types import ACTIVATIONS, Heads, Norm, Operand, Product, Texts

MAX_WIDTH = 16384  # numbers in a row that a norm can hold in registers
_TILE = 2048  # numbers that a program holds at a time
_COLUMNS = 512  # of an activation's tile


def _add_norm_rows(
    product: tl.tensor,
    state: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    rows: tl.tensor,
    epsilon: tl.tensor,
    ADDS: tl.constexpr,
    RMS: tl.constexpr,
    BIAS: tl.constexpr,
    KEEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = row[:, None] * WIDTH + column[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(state + place, mask=mask, other=0.0)
    kind = x.dtype
    x = x.to(tl.float32)
    if ADDS:
        x = (x + tl.load(product + place, mask=mask, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    if KEEPS:
        tl.store(total + place, x.to(kind), mask=mask)
    if not RMS:
        x = tl.where(mask, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    square = tl.sum(x * x, 1) / WIDTH
    y = x * tl.rsqrt(square + epsilon)[:, None]
    y *= tl.load(weight + column, mask=column < WIDTH, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + column, mask=column < WIDTH, other=0.0)[None, :]
    tl.store(normed + place, y.to(kind), mask=mask)


def _activate_tile(
    product: tl.tensor,
    made: tl.tensor,
    rows: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    stride: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    place = product + row[:, None] * stride + column[None, :]
    loaded = tl.load(place, mask=mask, other=0.0)
    kind = loaded.dtype
    x = loaded.to(tl.float32)
    if KIND == 0:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 1:  # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif KIND == 2:
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    else:
        x = x / (1.0 + tl.exp(-x))
    if GATED:
        x = x.to(kind).to(tl.float32) * tl.load(place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    tl.store(made + row[:, None] * WIDTH + column[None, :], x.to(kind), mask=mask)


def _turn_tokens(
    values: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    positions: tl.tensor,
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < tokens)[:, None] & (column < HALF)[None, :]
    position = tl.load(positions + row, mask=row < tokens, other=0)
    angle = position[:, None] * HALF + column[None, :]
    c = tl.load(cosine + angle, mask=mask, other=0.0)
    s = tl.load(sine + angle, mask=mask, other=0.0)
    place = values + row[:, None] * STRIDE + column[None, :]
    for head in range(HEADS):
        one = place + head * 2 * HALF
        first = tl.load(one, mask=mask, other=0.0)
        second = tl.load(one + HALF, mask=mask, other=0.0)
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        tl.store(one, (a * c - b * s).to(first.dtype), mask=mask)
        tl.store(one + HALF, (b * c + a * s).to(first.dtype), mask=mask)


# Row counts differ from batch to batch, and nothing in a kernel is the better for knowing what divides them.
add_norm_kernel = triton.jit(_add_norm_rows, do_not_specialize=["rows"])
activate_kernel = triton.jit(_activate_tile, do_not_specialize=["rows"])
turn_kernel = triton.jit(_turn_tokens, do_not_specialize=["tokens"])


def norm_constants(width: int) -> dict[str, int]:
    """Return the tile of a norm: some whole rows."""
    columns = triton.next_power_of_2(width)
    return {"WIDTH": width, "ROWS": max(1, _TILE // columns), "COLUMNS": columns}


def add_norm(product: Product | None, state: Tensor, norm: Norm, keeps_sum: bool) -> tuple[Tensor, Operand]:
    """See ``flipkd.kernels.encoder_ops.add_norm``; the operand has the stream's type."""
    rows, width = state.shape
    normed = torch.empty_like(state)
    adds = product is not None
    total = torch.empty_like(state) if keeps_sum and adds else state
    if rows:
        tile = norm_constants(width)
        add_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            state if product is None else product.values,
            state,
            norm.weight,
            norm.weight if norm.bias is None else norm.bias,
            total,
            normed,
            rows,
            norm.epsilon,
            ADDS=adds,
            RMS=norm.is_rms,
            BIAS=norm.bias is not None,
            KEEPS=keeps_sum and adds,
            **tile,
            num_warps=4 if tile["COLUMNS"] <= 2048 else 16,
        )
    return (total if keeps_sum else normed), Operand(normed)


def activate(product: Product, kind: str, gated: bool) -> Operand:
    """See ``flipkd.kernels.encoder_ops.activate``; the operand has the product's type."""
    rows, columns = product.values.shape
    width = columns // 2 if gated else columns
    made = product.values.new_empty(rows, width)
    if rows and width:
        tile = min(_COLUMNS, triton.next_power_of_2(width))
        activate_kernel[(triton.cdiv(rows, _TILE // tile), triton.cdiv(width, tile))](
            product.values,
            made,
            rows,
            KIND=ACTIVATIONS.index(kind),
            GATED=gated,
            WIDTH=width,
            ROWS=_TILE // tile,
            COLUMNS=tile,
            num_warps=4,
        )
    return Operand(made)


def attend(product: Product, texts: Texts, heads: Heads) -> Operand:
    """See ``flipkd.kernels.encoder_ops.attend``; overwrites queries and keys, which nobody needs afterwards."""
    values = product.values
    if heads.cosine is not None and heads.sine is not None and len(values):
        half = heads.width // 2
        columns = triton.next_power_of_2(half)
        rows = max(1, 1024 // columns)
        turn_kernel[(triton.cdiv(len(values), rows),)](
            values,
            heads.cosine,
            heads.sine,
            texts.positions,
            len(values),
            HEADS=heads.heads + heads.key_heads,
            HALF=half,
            STRIDE=values.shape[1],
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
    return Operand(reference.mix(*reference.parts(values, heads), texts, heads))
