"""pool_project: packed token states to finished vectors.

    n_t  = w * x_t / sqrt(mean(x_t^2) + epsilon)      RMS norm of each token; left out without w
    p    = mean of n_t over the text's tokens, or its last n_t
    z    = A p                                        A is linear, so pool first and project once
    row  = z / max(|z|, 1e-12)                        float32, bf16, or int8 as `flipkd.vectors.rows.quantise` makes it

All in float32 from the load of x_t to the store of the row, whatever type the states have. A text's row does not
depend on its neighbours, and a text without tokens has the zero row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flipkd.errors import ConfigError
from flipkd.kernels.dispatch import pool_project_backend
from flipkd.vectors.rows import check_dtype

POOLINGS = ("mean", "last")
STATE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH, MAX_DIM = 16384, 1024  # of states and rows, which the registers of the Triton kernel can hold
TORCH_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class PooledRows:
    """Rows of N texts on the device of the states.

    Args:
        rows: [N, r] float32, bfloat16 or int8.
        finite: [N] bool; False where a text's numbers were not finite or its norm overflows. Its row is zero then, and
            the caller has to encode it again in float32, or say so.
    """

    rows: torch.Tensor
    finite: torch.Tensor


def pool_project(
    states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    projection: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    pooling: str = "mean",
    dtype: str = "float32",
    backend: str | None = None,
) -> PooledRows:
    """Norm, pool, project, normalise and quantise the texts of one packed batch.

    Args:
        states: [T, width] contiguous float32, bfloat16 or float16: the hidden state after the last block, before the
            final norm.
        cu_seqlens: [N + 1] int32 on the same device: text i is tokens cu_seqlens[i] to cu_seqlens[i + 1]; starts at 0,
            never falls, ends at T. On a CPU it is checked. On a GPU a check would wait for the device, so there the
            kernel cuts every text to the T tokens that exist and reads nothing else.
        projection: A, [r, width], floating.
        norm_weight: w, [width], floating; None for no norm.
        epsilon: of the norm.
        pooling: "mean" or "last".
        dtype: "float32", "bf16" or "int8".
        backend: "reference" or "triton"; None: the environment variable FLIPKD_POOL_PROJECT, or Triton for states in
            GPU memory and the reference elsewhere.

    Raises:
        ConfigError: an unknown pooling or dtype.
        ValueError: tensors that do not fit each other.
        KernelError: the backend asked for cannot run here.
    """
    check_dtype(dtype)
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    _check_tensors(states, cu_seqlens, projection, norm_weight)
    if pool_project_backend(backend, states.device.type) == "reference":
        from flipkd.kernels.pool_project import reference

        return PooledRows(*reference.pool_project(states, cu_seqlens, projection, norm_weight, epsilon, pooling, dtype))
    from flipkd.kernels.pool_project import gpu

    return PooledRows(*gpu.pool_project(states, cu_seqlens, projection, norm_weight, epsilon, pooling, dtype))


def _check_tensors(
    states: torch.Tensor, cu_seqlens: torch.Tensor, projection: torch.Tensor, norm_weight: torch.Tensor | None
) -> None:
    if states.ndim != 2 or states.dtype not in STATE_TYPES or not states.is_contiguous():
        raise ValueError(
            f"states must be contiguous float32, bfloat16 or float16 [tokens, width], not {states.dtype} of shape "
            f"{tuple(states.shape)}"
        )
    width = states.shape[1]
    if projection.ndim != 2 or projection.shape[1] != width or min(projection.shape) < 1:
        raise ValueError(f"projection must be [dim, {width}], not of shape {tuple(projection.shape)}")
    if norm_weight is not None and tuple(norm_weight.shape) != (width,):
        raise ValueError(f"norm_weight must be [{width}], not of shape {tuple(norm_weight.shape)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(
            f"cu_seqlens must be int32 [texts + 1], not {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    for name, tensor in (("cu_seqlens", cu_seqlens), ("projection", projection), ("norm_weight", norm_weight)):
        if tensor is not None and tensor.device != states.device:
            raise ValueError(f"{name} is on {tensor.device}, the states are on {states.device}")
    if cu_seqlens.device.type == "cpu":
        check_starts(cu_seqlens, len(states))


def check_starts(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Raise ValueError unless the texts' starts lead from 0 to `tokens` without falling (waits for the device)."""
    starts = cu_seqlens.to("cpu", torch.int64)
    if int(starts[0]) != 0 or int(starts[-1]) != tokens or bool((starts.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0, never fall, and end at the number of tokens, {tokens}")
