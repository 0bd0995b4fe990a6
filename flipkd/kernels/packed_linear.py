"""Multiplications by weights that oneDNN has laid out once, on a CPU with AVX-512 BF16 or AMX.

``torch.nn.functional.linear`` and ``torch._int_mm`` take plain weights, so oneDNN lays them out again in every call (a
fifth of the time of a bf16 multiplication of 1,000 rows with AMX), and ``_int_mm`` writes int32. These operators are
those that the code of ``torch.compile`` calls on a CPU. They are no public interface of PyTorch, so ``packs`` tries
them once.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from flipkd.kernels.encoder_ops import runs_compiled

_log = logging.getLogger(__name__)


@functools.cache
def packs() -> bool:
    """Whether this PyTorch and this CPU can: tried on a small product in bf16 and in int8."""
    if not runs_compiled() or not torch._C._has_mkldnn:
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 9, (48, 64), generator=generator) for _ in range(2))
    wanted = (left @ right.t()).float()
    ones = torch.ones(len(right))
    try:
        found = (
            multiply_bf16(left.bfloat16(), pack_bf16(right.bfloat16()), None).float(),
            multiply_int8(left.to(torch.int8), pack_int8(right.to(torch.int8)), ones).float(),
        )
    except (AttributeError, RuntimeError, TypeError) as error:
        _log.info("weights are not packed: %s", error)
        return False
    return all(torch.allclose(one, wanted, rtol=2.0**-8) for one in found)


def pack_bf16(weight: Tensor) -> Tensor:
    """Bf16 [outputs, inputs] in the layout that ``multiply_bf16`` takes."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def multiply_bf16(values: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Bf16 [T, inputs] to [T, outputs]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")
    return product


def pack_int8(weight: Tensor) -> Tensor:
    """Int8 [outputs, inputs] in the layout that ``multiply_int8`` takes."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def multiply_int8(values: Tensor, packed: Tensor, column_scale: Tensor) -> Tensor:
    """Int8 [T, inputs] to bf16 [T, outputs]: exact int32 sums, times float32 [outputs]."""
    zeros = torch.zeros(len(column_scale), dtype=torch.int64)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        values, 1.0, 0, packed, column_scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )
    return product
