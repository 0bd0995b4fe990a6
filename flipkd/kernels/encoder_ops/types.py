"""What passes between the matrix multiplications of a transformer and the operations between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass(frozen=True)
class Operand:
    """What a multiplication takes, one row per token.

    ``values`` [T, n] in float32 or bf16; or int8 with ``row_scale`` float32 [T]: number = value * row_scale.
    """

    values: Tensor
    row_scale: Tensor | None = None


@dataclass(frozen=True)
class Product:
    """What a multiplication gives, one row per token.

    ``values`` [T, n] in float32 or bf16, finished; or of an int8 operand, in bf16 or int32, to become
    ``value * row_scale[row] * column_scale[column] + bias[column]`` (float32 [T], [n] and [n]; without ``column_scale``
    and ``bias`` where they are None).
    """

    values: Tensor
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """Layer norm, or RMS norm: weight and bias float32 [width] (no bias: None)."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    is_rms: bool


@dataclass(frozen=True)
class Heads:
    """The shape of attention.

    Args:
        heads: of queries.
        key_heads: of keys and values; divides ``heads``.
        width: of each.
        causal: whether a token sees only those before it, and itself.
        cosine, sine: float32 [positions, width / 2], rotation of queries and keys by position; None for none.
    """

    heads: int
    key_heads: int
    width: int
    causal: bool
    cosine: Tensor | None = None
    sine: Tensor | None = None

    @property
    def scale(self) -> float:
        """Factor of a product of query and key."""
        return float(self.width**-0.5)


@dataclass(frozen=True)
class Texts:
    """Where the texts of a packed batch lie. Made once a batch, so that its layers need not tell the GPU again.

    Args:
        lengths: tokens of each text.
        device: where ``starts`` and ``positions`` are.
    """

    lengths: Sequence[int]
    device: torch.device

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths, default=0)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [texts + 1]: text i is tokens starts[i] to starts[i + 1]."""
        counts = torch.tensor([0, *self.lengths], dtype=torch.int64)
        starts = counts.cumsum(0).int()
        # from pinned memory, or the host would wait for all that the stream has to do
        return starts if self.device.type == "cpu" else starts.pin_memory().to(self.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: each text starts at 0."""
        starts, tokens = self.starts, sum(self.lengths)
        first = starts[:-1].repeat_interleave(starts.diff(), output_size=tokens)
        return torch.arange(tokens, device=self.device) - first
