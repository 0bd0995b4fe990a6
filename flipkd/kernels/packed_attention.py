"""Attention within each text of a packed row, on a GPU in one kernel whatever the lengths.

What there is (PyTorch 2.11 to 2.13, flash-attn 2.8), and why `torch.nn.attention.varlen.varlen_attn` was chosen:

- ``varlen_attn`` runs the FlashAttention kernel that PyTorch already carries, straight on [T, heads, d] and cu_seqlens:
  no padding, no mask, no second package. It knows causal and full attention (``window_size``) and, from 2.12 on,
  grouped heads (``enable_gqa``); for 2.11 the heads of keys and values are repeated before the call. float16 and
  bfloat16, Ampere or newer. Where the user has activated FlashAttention 3 or 4
  (``torch.nn.attention.activate_flash_attention_impl``), the same call runs that.
- flash-attn's ``flash_attn_varlen_func`` is the same algorithm in a package that is compiled for one PyTorch and one
  CUDA at a time. It is taken where PyTorch has no ``varlen_attn`` with these arguments but flash-attn is installed.
- Nested tensors end in the same kernel, and bring a tensor type of their own through the whole model.
- flex_attention needs a block mask for every new set of lengths and torch.compile; it earns that with unusual masks,
  and ours are plain.

float32 (no flash kernel takes it), CPUs and everything else go text length by text length through
``scaled_dot_product_attention``: exact, and of the same cost where texts of one length lie side by side.

A text's result does not depend on its neighbours: FlashAttention 3 and 4 are told not to split the keys of a text
(``num_splits=1``, from PyTorch 2.12 on), and FlashAttention 2 splits none of a packed batch but on its way for one
query a text (decoding). That way also fails where heads are grouped and a text is empty (Dao-AILab/flash-attention
issue 1537), so the kernels are never told a bound below 2.

CUDA graphs: the flash kernels read ``cu_seqlens`` on the device, and ``max_length`` is only an upper bound, which a
captured graph keeps. Capture with the bound of a shape, and fill unused places of ``cu_seqlens`` with its last number,
which are texts without tokens. The way by lengths reads ``cu_seqlens`` on the host, so it cannot be captured.

The flash path of PyTorch 2.11 is tested on an H200, forwards and backwards, against the way by lengths, and that
against dense attention. flash-attn's was not run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flipkd.kernels.pool_project import check_starts

_HALF = (torch.float16, torch.bfloat16)
_MAX_FLASH_WIDTH = 256  # numbers per head
_AMPERE = (8, 0)

_log = logging.getLogger(__name__)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, causal: bool, scale: float | None
) -> Tensor:
    """Attention of every token to the tokens of its own text.

    Args:
        query: [T, heads, d].
        key: [T, key heads, d]; heads is a multiple of key heads, and head h uses key head h // (heads / key heads).
        value: like ``key``.
        cu_seqlens: int32 [N + 1] on the same device; text i is tokens cu_seqlens[i] to cu_seqlens[i + 1].
        max_length: no text has more tokens. Only the flash kernels look at it.
        causal: a token sees itself and the tokens before it; else all tokens of its text.
        scale: factor of the products; None for 1 / sqrt(d).

    Returns:
        [T, heads, d], in the type of ``query``.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(query, key, value, cu_seqlens)
    max_length = max(max_length, 2)  # see above
    way = _flash(query)
    if way == "torch":
        return _torch_flash(query, key, value, cu_seqlens, max_length, causal, scale)
    if way == "flash_attn":
        return _package_flash(query, key, value, cu_seqlens, max_length, causal, scale)
    return attention_by_length(query, key, value, cu_seqlens, causal, scale)


def attention_by_length(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None
) -> Tensor:
    """The same in plain PyTorch: one call for each run of texts of one length. Waits for the device."""
    lengths = cu_seqlens.diff().tolist()
    groups = runs(lengths)
    tokens = [count * length for count, length in groups]
    outputs = []
    rows = zip(*(torch.split(row, tokens) for row in (query, key, value)), strict=True)
    for (count, length), parts in zip(groups, rows, strict=True):
        # [count * length, heads, d] -> [count, heads, length, d], a view
        q, k, v = (part.view(count, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(mixed.transpose(1, 2).reshape(count * length, *query.shape[1:]))
    return torch.cat(outputs) if outputs else torch.empty_like(query)


def runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(count, length) of equal lengths that stand side by side; texts without tokens are in none."""
    return tuple((len(list(same)), length) for length, same in groupby(lengths) if length)


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> None:
    if query.ndim != 3 or key.ndim != 3 or key.shape != value.shape:
        raise ValueError(
            f"query, key and value must be [tokens, heads, width], key and value alike, not {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    if len(query) != len(key) or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"a query of shape {tuple(query.shape)} does not fit a key of shape {tuple(key.shape)}: tokens and width "
            "must be equal, heads a multiple of key heads"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be int32 [texts + 1], not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu":  # elsewhere it would wait for the device
        check_starts(cu_seqlens, len(query))


def takes_flash(query: Tensor) -> bool:
    """Whether ``packed_attention`` runs a flash kernel for this query, and not text length by text length."""
    return _flash(query) is not None


def _flash(query: Tensor) -> str | None:
    """Which flash kernel takes this query: "torch", "flash_attn" or None."""
    if query.device.type != "cuda" or query.dtype not in _HALF or query.shape[2] > _MAX_FLASH_WIDTH:
        return None
    if query.shape[2] % 8 or torch.cuda.get_device_capability(query.device) < _AMPERE:
        return None
    return flash_kernel()


@functools.cache
def flash_kernel() -> str | None:
    """The flash kernel that is installed: "torch" (`varlen_attn`), "flash_attn" or None. Logged once."""
    found = None
    if {"window_size", "scale"} <= _varlen_arguments():  # PyTorch 2.10 had it first, with other arguments
        found = "torch"
    elif importlib.util.find_spec("flash_attn") is not None:
        found = "flash_attn"
    _log.info("packed attention on a GPU runs on %s", found or "scaled_dot_product_attention, length by length")
    return found


@functools.cache
def _varlen_arguments() -> frozenset[str]:
    """What this PyTorch's `varlen_attn` can be told; nothing where there is none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, causal: bool, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_arguments()
    options: dict[str, Any] = {}
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if "num_splits" in known:
        from torch.nn.attention import current_flash_attention_impl

        # FlashAttention 2, which is None here, has nothing to switch off without a block table
        options["num_splits"] = None if current_flash_attention_impl() is None else 1
    output = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **options,
    )
    assert isinstance(output, Tensor)  # a pair only where return_aux asks for it
    return output


def _package_flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, causal: bool, scale: float | None
) -> Tensor:
    output: Tensor = importlib.import_module("flash_attn").flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        softmax_scale=scale,
        causal=causal,
    )
    return output
