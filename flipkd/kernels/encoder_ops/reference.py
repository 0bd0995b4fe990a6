"""The same operations in plain PyTorch: any dtype, any device, any shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, relu, rms_norm, silu

from flipkd.kernels.encoder_ops.types import Heads, Norm, Operand, Product, Texts
from flipkd.kernels.packed_attention import packed_attention

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
    "silu": silu,
}


def numbers(product: Product) -> Tensor:
    """The numbers of a product: [T, n] in its own dtype, float32 where there are scales."""
    if product.row_scale is None:
        return product.values
    found = product.values.float() * product.row_scale[:, None]
    found = found if product.column_scale is None else found * product.column_scale
    return found if product.bias is None else found + product.bias


def operand(values: Tensor, dtype: torch.dtype) -> Operand:
    """Rows for the next multiplication; int8 rows are stretched until the largest component is 127."""
    if dtype is not torch.int8:
        return Operand(values.to(dtype))
    values = values.float()
    most = values.abs().amax(dim=1) if values.shape[1] else values.new_zeros(len(values))
    stretched = (values * torch.where(most > 0, 127.0 / most, 0.0)[:, None]).round()
    return Operand(stretched.nan_to_num(0.0, 127.0, -127.0).clamp(-127, 127).to(torch.int8), most / 127.0)


def add_norm(
    product: Product | None, state: Tensor, norm: Norm, keeps_sum: bool, dtype: torch.dtype
) -> tuple[Tensor, Operand]:
    """See ``flipkd.kernels.encoder_ops.add_norm``."""
    if product is not None:
        state = state + numbers(product).to(state.dtype)
    width = (state.shape[-1],)
    weight = norm.weight.to(state.dtype)
    if norm.is_rms:
        normed = rms_norm(state, width, weight, norm.epsilon)
    else:
        normed = layer_norm(
            state, width, weight, None if norm.bias is None else norm.bias.to(state.dtype), norm.epsilon
        )
    return state if keeps_sum else normed, operand(normed, dtype)


def activate(product: Product, kind: str, gated: bool, dtype: torch.dtype) -> Operand:
    """See ``flipkd.kernels.encoder_ops.activate``."""
    values = numbers(product)
    if not gated:
        return operand(_ACTIVATIONS[kind](values), dtype)
    gate, up = values.chunk(2, dim=1)
    return operand(_ACTIVATIONS[kind](gate) * up, dtype)


def attend(product: Product, texts: Texts, heads: Heads, dtype: torch.dtype) -> Operand:
    """See ``flipkd.kernels.encoder_ops.attend``."""
    values = numbers(product)
    if product.row_scale is not None and values.is_cuda:
        values = values.bfloat16()  # float32 has no flash attention
    query, key, value = parts(values, heads)
    if heads.cosine is not None and heads.sine is not None:
        cosine, sine = (table[texts.positions][:, None] for table in (heads.cosine, heads.sine))
        query, key = (_rotated(part, cosine, sine) for part in (query, key))
    return operand(mix(query, key, value, texts, heads), dtype)


def parts(values: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, heads or key heads, width] of [T, (heads + 2 key heads) * width]: views."""
    rows = values.view(len(values), -1, heads.width)
    query, key, value = torch.split(rows, [heads.heads, heads.key_heads, heads.key_heads], dim=1)
    return query, key, value


def mix(query: Tensor, key: Tensor, value: Tensor, texts: Texts, heads: Heads) -> Tensor:
    """Attention within each text, [T, heads * width]."""
    mixed = packed_attention(query, key, value, texts.starts, texts.longest, heads.causal, heads.scale)
    return mixed.reshape(len(mixed), -1)


def _rotated(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[T, heads, width] turned by position, in float32 as transformers' tables are."""
    first, second = rows.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(rows.dtype)
