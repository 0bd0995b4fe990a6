"""What passes between the matrix multiplications of a transformer and the operations between them."""

from __future__ import annotations

from dataclasses import dataclass

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

    ``values`` [T, n] in float32 or bf16, finished; or int32 that becomes
    ``value * row_scale[row] * column_scale[column] + bias[column]`` (float32 [T], [n] and [n], the last may be None).
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
