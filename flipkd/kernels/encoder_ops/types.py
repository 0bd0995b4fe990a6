"""What passes between the matrix multiplications of a transformer and the operations between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
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
        lengths: int64 [texts], tokens of each.
        device: where ``starts`` and ``positions`` are.
    """

    lengths: NDArray[np.int64]
    device: torch.device

    @cached_property
    def tokens(self) -> int:
        """T: tokens of all texts."""
        return int(self.lengths.sum())

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def starts(self) -> Tensor:
        """int32 [texts + 1]: text i is tokens starts[i] to starts[i + 1]."""
        starts = torch.from_numpy(np.cumsum(np.concatenate(([0], self.lengths)), dtype=np.int32))
        # from pinned memory, or the host would wait for all that the stream has to do
        return starts if self.device.type == "cpu" else starts.pin_memory().to(self.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: each text starts at 0."""
        first = self.starts[:-1].repeat_interleave(self.starts.diff(), output_size=self.tokens)
        return torch.arange(self.tokens, device=self.device) - first
