"""Weights that suit int8: smoothing (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438, equation 4).

A few channels of a decoder are many times larger than the others at nearly every token, and where a row has one scale
they leave the others few of int8's values. To divide a channel by s and to multiply the weights that read it by s
changes nothing but that; it moves what is uneven into the weights, which have a scale per output. The division is
folded into what makes the channel: a norm's weight, or v_proj's rows.

s needs the largest activation of each channel. The paper takes it from texts; here random token ids show it (our
choice: a folder comes without texts, and they serve as well).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from flipkd.kernels.encoder_ops import Heads, Operand, Product, Texts
from flipkd.models.linear import Linear

_TEXTS, _TOKENS = 32, 16
# The share of a channel's size that the weights take, the paper's alpha. On pairs of SEC names int8 moves a cosine of
# SmolLM2 by 0.0024 (root mean square) with 0.8, by 0.0037 with 0.5, by 0.0030 with 1, by 0.0071 without smoothing.
_SHARE = 0.8
# A channel that is never used must not stretch the weights that read it without bound.
_LEAST = 1e-5


class Watched(Linear):
    """A linear layer in float32 that remembers the largest size of each input channel in its last call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight, bias, torch.float32)
        self.largest = torch.zeros(self.shape[1], device=weight.device)

    def __call__(self, operand: Operand) -> Product:
        """[T, inputs] to [T, outputs]."""
        self.largest = operand.values.abs().amax(dim=0)
        return super().__call__(operand)


def random_texts(words: Tensor) -> tuple[Tensor, Texts]:
    """Token ids that show which channels are large: the same ones in every call.

    Args:
        words: [vocabulary, width], the embeddings. Those that are not finite are passed over: a token that stands in no
            text may have one.
    """
    finite = words.isfinite().all(dim=1).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(max(len(finite), 1), (_TEXTS * _TOKENS,), generator=generator)
    return finite[places.to(words.device)], Texts(np.full(_TEXTS, _TOKENS, np.int64), words.device)


def smooth_block(
    tensors: Mapping[str, Tensor],
    heads: Heads,
    attention_input: Tensor,
    attention_output: Tensor,
    wide: Tensor,
) -> dict[str, Tensor]:
    """The weights of a Llama or Qwen2 block, float32, smoothed.

    Args:
        tensors: by transformers' name within the block.
        heads: the shape of its attention.
        attention_input, attention_output, wide: float32 [channels], the largest size of each input channel of q, k and
            v; of o; of gate and up.
    """
    smoothed = {name: tensor.float() for name, tensor in tensors.items()}

    def multiply(scale: Tensor, *names: str) -> None:
        for name in names:
            smoothed[f"{name}.weight"] = smoothed[f"{name}.weight"] * scale

    def divide_rows(scale: Tensor, name: str) -> None:
        for part in ("weight", "bias"):
            if (tensor := smoothed.get(f"{name}.{part}")) is not None:
                smoothed[f"{name}.{part}"] = tensor / (scale[:, None] if part == "weight" else scale)

    def reader(*names: str) -> Tensor:
        return torch.stack([smoothed[f"{name}.weight"].abs().amax(dim=0) for name in names]).amax(dim=0)

    for norm, names, largest in (
        ("input_layernorm", [f"self_attn.{part}_proj" for part in "qkv"], attention_input),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], wide),
    ):
        scale = _scale(largest, reader(*names))
        multiply(scale, *names)
        multiply(1.0 / scale, norm)

    # A channel of v is read by every query head of its group.
    shape = (heads.key_heads, heads.heads // heads.key_heads, heads.width)
    sizes = [size.view(shape).amax(dim=1) for size in (attention_output, reader("self_attn.o_proj"))]
    scale = _scale(*sizes)
    divide_rows(scale.flatten(), "self_attn.v_proj")
    multiply(scale[:, None].expand(shape).flatten(), "self_attn.o_proj")
    return smoothed


def _scale(activations: Tensor, weights: Tensor) -> Tensor:
    """s of each channel, in steps of a quarter power of two, so that it does not hang on an activation's last digit."""
    powers = [size.clamp(min=max(_LEAST * float(size.max()), 1e-30)).log2() for size in (activations, weights)]
    return torch.exp2((4.0 * (_SHARE * powers[0] - (1.0 - _SHARE) * powers[1])).round() / 4.0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in float32 may depend on the number of threads, and weights must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
