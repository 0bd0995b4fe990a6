"""Linear layers in float32, bf16 or int8, between the fused operations of ``flipkd.kernels.encoder_ops``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from flipkd.kernels.encoder_ops import Operand, Product
from flipkd.kernels.packed_linear import multiply_bf16, multiply_int8, pack_bf16, pack_int8, packs

# cuBLAS refuses to multiply 16 rows or fewer in int8; MKL sums fewer than 16 rows in another order.
EXACT_ROWS = 16
_LEAST_ROWS = {("cuda", torch.int8): 32, ("cpu", torch.float32): EXACT_ROWS}


def linear_of_rows(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in which a row does not depend on how many stand beside it: [T, inputs] to [T, outputs]."""
    least = _LEAST_ROWS.get((values.device.type, values.dtype), 0)
    rows = len(values)
    return linear(values if rows >= least else pad(values, (0, 0, 0, least - rows)), weight, bias)[:rows]


class Linear:
    """x W^T + b.

    int8: W is symmetric with one scale per output, rows of x with one scale each (made by the operation before), the
    products are exact in int32 (oneDNN on a CPU; ``torch._int_mm`` elsewhere: cuBLAS on a GPU, the function that
    torchao calls too). A row's scale follows from that row alone, so a text does not depend on its neighbours, as it
    would with one scale per batch.

    A row's product does not depend on how many rows stand beside it, but for bf16 on AMX: oneDNN shares out the sum by
    the number of rows there, and the last bit of a result may follow.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        dtype: float32, bf16 or int8.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shape = tuple(weight.shape)
        self._packed = weight.device.type == "cpu" and dtype in (torch.bfloat16, torch.int8) and packs()
        if dtype is torch.int8:
            weight = weight.float()
            self._scale = (weight.abs().amax(dim=1) / 127.0).clamp(min=1e-30)
            whole = (weight / self._scale[:, None]).round().to(torch.int8)
            # Else stored as [inputs, outputs] by a view: what the multiplication takes without a copy.
            self._weight = pack_int8(whole) if self._packed else whole.contiguous().t()
            self._bias = None if bias is None else bias.float().contiguous()
        else:
            weight = weight.to(dtype).contiguous()
            self._weight = pack_bf16(weight) if self._packed else weight
            self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, operand: Operand) -> Product:
        """[T, inputs] to [T, outputs]."""
        values, rows = operand.values, len(operand.values)
        if self._packed and self.dtype is torch.int8:
            return Product(multiply_int8(values, self._weight, self._scale), operand.row_scale, None, self._bias)
        if self._packed:
            return Product(multiply_bf16(values, self._weight, self._bias))
        if self.dtype is torch.int8:
            least = _LEAST_ROWS.get((values.device.type, self.dtype), 0)
            padded = values if rows >= least else pad(values, (0, 0, 0, least - rows))
            return Product(torch._int_mm(padded, self._weight)[:rows], operand.row_scale, self._scale, self._bias)
        return Product(linear_of_rows(values, self._weight, self._bias))
