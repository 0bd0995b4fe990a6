"""What stands between the matrix multiplications of a transformer block, fused: attention, residual + norm, activation.

Rows are tokens of texts packed end to end, so nothing is padded. Multiplications stay with PyTorch (oneDNN), which runs
them at the machine's limit; what these functions save is the passes over memory between them. ``reference.py`` is plain
PyTorch and runs everywhere; ``cpu.cpp`` and ``attention_cpu.cpp`` take over for bf16 and int8 on a CPU with AVX-512
BF16, for widths that are multiples of 32, and ``gpu.py`` (Triton) for floating numbers on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipkd.kernels.dispatch import encoder_ops_backend
from flipkd.kernels.encoder_ops import reference
from flipkd.kernels.encoder_ops.types import ACTIVATIONS, Heads, Norm, Operand, Product, Texts
from flipkd.kernels.native import native

__all__ = [
    "ACTIVATIONS",
    "Heads",
    "Norm",
    "Operand",
    "Product",
    "Texts",
    "activate",
    "add_norm",
    "attend",
    "runs_compiled",
]


class _Product(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "row_scale", "bias")]


class _Operand(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("bf16", "int8", "row_scale")]


def add_norm(
    product: Product | None, state: Tensor, norm: Norm, *, keeps_sum: bool, dtype: torch.dtype
) -> tuple[Tensor, Operand]:
    """Adds a product to the residual stream and normalises the sum.

    Args:
        product: [T, width]; None adds nothing.
        state: [T, width], the residual stream; may be overwritten.
        norm: how the sum is normalised.
        keeps_sum: the stream goes on with the sum (pre-norm: Llama) instead of what was normalised (post-norm: BERT).
        dtype: of the operand: float32, bf16 or int8.

    Returns:
        The stream [T, width], and the normalised rows for the next multiplication.
    """
    width = state.shape[1]
    if dtype is state.dtype and _on_gpu(state) and (product is None or _on_gpu(product.values)):
        from flipkd.kernels.encoder_ops import gpu

        if width <= gpu.MAX_WIDTH:
            return gpu.add_norm(product, state, norm, keeps_sum)
    library = _library()
    if library is None or not _fits(state, width) or not _is_plain(product):
        return reference.add_norm(product, state, norm, keeps_sum, dtype)
    same = not keeps_sum and dtype is not torch.int8  # the stream itself is the operand
    made = Operand(state) if same else _empty(len(state), width, dtype)
    library.flipkd_add_norm(
        None if product is None else ctypes.byref(_given(product)),
        state.data_ptr(),
        len(state),
        width,
        norm.weight.data_ptr(),
        None if norm.bias is None else norm.bias.data_ptr(),
        norm.epsilon,
        norm.is_rms,
        keeps_sum,
        ctypes.byref(_Operand() if same else _taken(made)),
    )
    return state, made


def activate(product: Product, kind: str, *, gated: bool, dtype: torch.dtype) -> Operand:
    """The activation of a product; of its first half times its second half where ``gated``.

    Args:
        product: [T, n], or [T, 2n] where gated.
        kind: one of ``ACTIVATIONS``.
        gated: whether the product has a gate in front.
        dtype: of the operand: float32, bf16 or int8.

    Returns:
        [T, n] for the next multiplication.
    """
    rows, columns = product.values.shape
    columns = columns // 2 if gated else columns
    if dtype is product.values.dtype and _on_gpu(product.values):
        from flipkd.kernels.encoder_ops import gpu

        return gpu.activate(product, kind, gated)
    library = _library()
    if library is None or dtype is torch.float32 or not _fits(product.values, columns) or not _is_plain(product):
        return reference.activate(product, kind, gated, dtype)
    made = _empty(rows, columns, dtype)
    library.flipkd_activate(
        ctypes.byref(_given(product)), rows, columns, ACTIVATIONS.index(kind), gated, ctypes.byref(_taken(made))
    )
    return made


def attend(product: Product, texts: Texts, heads: Heads, dtype: torch.dtype) -> Operand:
    """Attention within each text: softmax(q k^T / sqrt(width)) v.

    Args:
        product: [T, (heads + 2 key heads) * width]: queries, keys and values side by side; may be overwritten.
        texts: where they lie; T tokens in all.
        heads: shape, causality, rotation by position.
        dtype: of the operand: float32, bf16 or int8.

    Returns:
        [T, heads * width] for the next multiplication.
    """
    if dtype is product.values.dtype and _on_gpu(product.values):
        from flipkd.kernels.encoder_ops import gpu

        return gpu.attend(product, texts, heads)
    library = _library()
    columns = heads.heads * heads.width
    plain = dtype is not torch.float32 and _is_plain(product) and heads.width <= 1024
    if library is None or not plain or not _fits(product.values, heads.width):
        return reference.attend(product, texts, heads, dtype)
    made = _empty(len(product.values), columns, dtype)
    counted = np.ascontiguousarray(texts.lengths, np.int64)
    library.flipkd_attend(
        ctypes.byref(_given(product)),
        counted.ctypes.data,
        len(counted),
        heads.heads,
        heads.key_heads,
        heads.width,
        heads.scale,
        heads.causal,
        None if heads.cosine is None else heads.cosine.data_ptr(),
        None if heads.sine is None else heads.sine.data_ptr(),
        ctypes.byref(_taken(made)),
        _has_amx(),
    )
    return made


def _on_gpu(values: Tensor) -> bool:
    """Whether the Triton kernels are there for these numbers."""
    if values.device.type == "cpu" or not values.is_floating_point() or not values.is_contiguous():
        return False
    return encoder_ops_backend(values.device.type) == "triton"


def runs_compiled() -> bool:
    """Whether the compiled functions are there and run on this CPU."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native()
    if library is None or not library.flipkd_encoder_ops_run():
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.flipkd_add_norm.argtypes = [
        pointer, pointer, number, number, pointer, pointer, ctypes.c_float, ctypes.c_int, ctypes.c_int, pointer
    ]  # fmt: skip
    library.flipkd_activate.argtypes = [pointer, number, number, ctypes.c_int, ctypes.c_int, pointer]
    library.flipkd_attend.argtypes = [
        pointer, pointer, number, number, number, number, ctypes.c_float, ctypes.c_int, pointer, pointer, pointer,
        ctypes.c_int,
    ]  # fmt: skip
    for function in (library.flipkd_add_norm, library.flipkd_activate, library.flipkd_attend):
        function.restype, function.errcheck = ctypes.c_int, _check_outcome
    return library


def _check_outcome(outcome: Any, function: Any, arguments: Any) -> Any:
    if outcome:
        raise MemoryError(f"no memory for the workspace of {function.__name__}; free some or use fewer threads")


@functools.cache
def _has_amx() -> bool:
    """Whether the compiled attention multiplies on AMX."""
    library = _library()
    return library is not None and bool(library.flipkd_attention_has_amx())


def _fits(values: Tensor, columns: int) -> bool:
    """Whether the compiled functions know this dtype, place, width and layout."""
    known = values.device.type == "cpu" and values.dtype is torch.bfloat16 and values.is_contiguous()
    return known and columns % 32 == 0


def _is_plain(product: Product | None) -> bool:
    if product is None:
        return True
    values = product.values
    return values.dtype is torch.bfloat16 and product.column_scale is None and values.is_contiguous()


def _given(product: Product) -> _Product:
    parts = (product.values, product.row_scale, product.bias)
    return _Product(*(None if part is None else part.data_ptr() for part in parts))


def _taken(operand: Operand) -> _Operand:
    if operand.row_scale is None:
        return _Operand(bf16=operand.values.data_ptr())
    return _Operand(int8=operand.values.data_ptr(), row_scale=operand.row_scale.data_ptr())


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Operand:
    scale = torch.empty(rows) if dtype is torch.int8 else None
    return Operand(torch.empty(rows, columns, dtype=dtype), scale)
