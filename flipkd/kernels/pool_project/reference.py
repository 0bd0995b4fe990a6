"""pool_project in plain float32 PyTorch: what the kernel is tested against, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from flipkd.vectors.rows import quantise


def pool_project(
    states: Tensor,
    cu_seqlens: Tensor,
    projection: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    pooling: str,
    dtype: str,
) -> tuple[Tensor, Tensor]:
    """Return (rows, finite); `flipkd.kernels.pool_project.pool_project` is the contract and the checks."""
    vectors = unit_vectors(states.float(), cu_seqlens, projection.float(), norm_weight, epsilon, pooling)
    finite = vectors.isfinite().all(1)
    vectors = torch.where(finite[:, None], vectors, 0.0)
    if dtype == "float32":
        return vectors, finite
    rows = torch.from_numpy(quantise(vectors.cpu().numpy(), dtype).values)
    return (rows.view(torch.bfloat16) if dtype == "bf16" else rows).to(states.device), finite


def unit_vectors(
    states: Tensor, cu_seqlens: Tensor, projection: Tensor, norm_weight: Tensor | None, epsilon: float, pooling: str
) -> Tensor:
    """Return [N, r] in the type of the states, step by step as one writes it in PyTorch.

    A row is not finite where a text's states or its norm are not.
    """
    lengths = cu_seqlens.diff().tolist()
    if pooling == "last":
        # only the last token of a text is normed; an empty text has none
        chosen = (cu_seqlens[1:].long() - 1)[cu_seqlens.diff() > 0]
        states, lengths = states[chosen], [min(length, 1) for length in lengths]
    if norm_weight is not None:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))  # as models do it: float32 inside
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + epsilon)
        states = wide.to(states.dtype) * norm_weight.to(states.dtype)
    texts = torch.split(states, lengths)
    pooled = [text.mean(0) if len(text) else text.new_zeros(text.shape[1]) for text in texts]
    vectors = (torch.stack(pooled) if pooled else states.new_zeros(0, states.shape[1])) @ projection.T
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))  # 1e-12 is 0 in float16
    norms = wide.norm(dim=1, keepdim=True)
    # an overflowing norm must not pass for a vector of zeros
    return torch.where(norms.isfinite(), wide / norms.clamp(min=1e-12), torch.nan).to(vectors.dtype)
