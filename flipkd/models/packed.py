"""Decoder blocks over texts packed end to end, so that nothing is padded whatever lengths a batch holds.

All tokens of a batch form one row: linear layers, norms and activations, which are most of the work of a short text,
run over all of them at once. Only attention needs to know where a text ends. On a GPU in bf16 it is one flash kernel,
forwards and backwards; elsewhere it runs once per text length: texts are sorted by length first, so texts of one length
lie side by side and a view of the row is their batch.

transformers calls the attention function that a model's config names and hands it whatever keyword arguments the
model was called with. So this works for every decoder of the library that goes through that interface, without a line
of model code. It has no mask function of its own, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flipkd.kernels.encoder_ops import Texts
from flipkd.kernels.packed_attention import packed_attention, runs, takes_flash
from flipkd.models.options import STUDENT_POOLINGS
from flipkd.models.pooling import pool_packed

ATTENTION = "flipkd_packed"

Groups = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedTexts:
    """Token ids of N texts in one row of T tokens.

    Args:
        ids: int64 [1, T], shortest text first.
        groups: (texts, tokens of each) per length, in the order of ``ids``; texts without tokens are in none.
        texts: where those with tokens lie.
        order: int64 [N]; place in the input of each text in the order of ``ids``, texts without tokens first.
    """

    ids: Tensor
    groups: Groups
    texts: Texts
    order: Tensor

    @property
    def arguments(self) -> dict[str, Any]:
        """What a decoder's ``forward`` is called with."""
        return {
            "input_ids": self.ids,
            "position_ids": self.texts.positions[None],
            "use_cache": False,
            "groups": self.groups,
            "starts": self.texts.starts,
        }


def pack(ids: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> PackedTexts:
    """Packs N texts; the order of equal lengths is that of the input."""
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    lengths = [len(ids[place]) for place in order]
    groups = runs(lengths)
    row = [number for place in order for number in ids[place]]
    texts = Texts(np.array([length for length in lengths if length], np.int64), torch.device(device))
    return PackedTexts(
        torch.tensor([row], dtype=torch.int64, device=device),
        groups,
        texts,
        torch.tensor(order, dtype=torch.int64, device=device),
    )


def pool_texts(states: Tensor, packed: PackedTexts, pooling: str) -> Tensor:
    """One vector per text, float32 [N, width] in the order of the input; zero for a text without tokens.

    Args:
        states: [1, T, width] token vectors.
        packed: where the texts lie.
        pooling: ``mean``, ``last`` or ``weighted``, see ``StudentOptions``.
    """
    without = len(packed.order) - sum(count for count, _ in packed.groups)
    pooled = [states.new_zeros(without, states.shape[-1]).float()]
    if packed.groups:
        pooled.append(pool_packed(states[0], packed.texts, (STUDENT_POOLINGS[pooling],)))
    return torch.cat(pooled)[packed.order.argsort()]


def attention_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    groups: Groups,
    starts: Tensor | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each text, in the signature of transformers' attention interface.

    Args:
        module: the attention layer.
        query: [1, heads, T, head width].
        key: [1, key heads, T, head width]; heads is a multiple of key heads.
        value: like ``key``.
        attention_mask: None; a packed row needs none.
        groups, starts: see ``PackedTexts``; without ``starts`` no flash kernel is used.
        is_causal: False where a token sees those after it too; only without ``sliding_window`` and ``softcap``.
        dropout: of attention weights.
        scaling: of the products.
        sliding_window: a token sees itself and at most this many minus one before it (Mistral, Gemma).
        softcap: products p become softcap * tanh(p / softcap) (Gemma 2).

    Returns:
        [1, T, heads, head width], and None for the weights.
    """
    if attention_mask is not None:
        raise ValueError("packed texts take no attention mask")
    causal = is_causal is not False
    if not causal and (sliding_window is not None or softcap is not None):
        raise ValueError("full attention is there for models without sliding windows and soft caps")
    longest = max(length for _, length in groups)
    is_plain = not dropout and softcap is None and (sliding_window is None or longest <= sliding_window)
    if starts is not None and is_plain and takes_flash(query):
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [T, heads, head width], views
        return packed_attention(q, k, v, starts, longest, causal=causal, scale=scaling)[None], None
    repeats = query.shape[1] // key.shape[1]
    kind = query.dtype
    if query.device.type == "cpu" and kind is torch.bfloat16:
        # PyTorch's CPU kernel takes 2 to 7 times as long in bf16 for short texts, most of it backwards.
        query, key, value = query.float(), key.float(), value.float()
    tokens = [count * length for count, length in groups]
    # split, not slices: backwards it is one concatenation, where each slice would fill a whole row with zeros.
    split = zip(*(torch.split(row[0], tokens, dim=1) for row in (query, key, value)), strict=True)
    outputs = []
    # Autocast would turn float32 back into bf16 at the door of PyTorch's kernel.
    with torch.autocast(query.device.type, enabled=False):
        for (count, length), parts in zip(groups, split, strict=True):
            # [heads, count * length, width] -> [count, heads, length, width], a view
            batch = [part.view(len(part), count, length, -1).transpose(0, 1) for part in parts]
            mask = _window_mask(length, sliding_window, query.device)
            mixed = _attend(batch, repeats, mask, causal, dropout, scaling, softcap)
            outputs.append(mixed.transpose(1, 2).reshape(count * length, query.shape[1], value.shape[-1]))
    return torch.cat(outputs)[None].to(kind), None


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """bool [length, length], True where a token sees another; None where plain causality says it."""
    if sliding_window is None or length <= sliding_window:
        return None
    sees = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return sees.triu(1 - sliding_window)


def _attend(
    batch: list[Tensor],
    repeats: int,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    query, key, value = batch
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scaling
        )
    length = query.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    products = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    products = softcap * torch.tanh(products / softcap)
    weights = products.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def register() -> None:
    """Makes the function known to transformers under the name ``ATTENTION``; may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention_for_transformers)
