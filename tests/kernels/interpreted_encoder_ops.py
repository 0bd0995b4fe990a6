"""encoder_ops in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when it is imported, so test_gpu.py runs this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flipkd.kernels.encoder_ops import ACTIVATIONS, Heads, Norm, Product, Texts, gpu, reference

# The interpreter's cast to bf16 cuts off, so bf16 is left to the tests that need a GPU.
DTYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3}
CPU = torch.device("cpu")


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor, largest: float = 1.0) -> None:
    """Within the tolerance, ``largest`` times as much for what is near zero."""
    assert found.dtype is wanted.dtype
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * largest)


@settings(max_examples=30)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    is_rms=st.booleans(),
    biased=st.booleans(),
    keeps_sum=st.booleans(),
    adds=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_add_norm(
    rows: int, width: int, dtype: torch.dtype, is_rms: bool, biased: bool, keeps_sum: bool, adds: bool, seed: int
) -> None:
    state = numbers(rows, width, dtype, seed)
    weight, bias = numbers(2, width, torch.float32, seed + 1)
    norm = Norm(weight, None if is_rms or not biased else bias, 1e-2, is_rms)
    product = Product(numbers(rows, width, dtype, seed + 2)) if adds else None
    wanted_state, wanted = reference.add_norm(product, state.clone(), norm, keeps_sum, dtype)
    found_state, found = gpu.add_norm(product, state.clone(), norm, keeps_sum)
    close(found.values, wanted.values)
    close(found_state, wanted_state)


@settings(max_examples=30)
@given(
    rows=st.integers(0, 9),
    width=st.sampled_from((1, 5, 64, 600)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_activate(rows: int, width: int, dtype: torch.dtype, kind: str, gated: bool, seed: int) -> None:
    product = Product(numbers(rows, 2 * width if gated else width, dtype, seed) * 3)
    wanted = reference.activate(product, kind, gated, dtype).values
    # Of a negative gate, 1 + erf keeps few digits; what is lost there is multiplied by the other half.
    largest = max(1.0, float(product.values.abs().max())) if gated and rows else 1.0
    close(gpu.activate(product, kind, gated).values, wanted, largest)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    key_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    half=st.sampled_from((1, 3, 8)),
    causal=st.booleans(),
    rotates=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_attend(
    lengths: list[int], key_heads: int, repeats: int, half: int, causal: bool, rotates: bool, dtype: torch.dtype
) -> None:
    heads = Heads(key_heads * repeats, key_heads, 2 * half, causal)
    if rotates:
        angles = torch.arange(20.0)[:, None] * torch.rand(half, generator=torch.Generator().manual_seed(half))
        heads = replace(heads, cosine=angles.cos(), sine=angles.sin())
    values = numbers(sum(lengths), (heads.heads + 2 * key_heads) * heads.width, dtype, len(lengths))
    wanted = reference.attend(Product(values.clone()), Texts(np.array(lengths), CPU), heads, dtype)
    close(gpu.attend(Product(values), Texts(np.array(lengths), CPU), heads).values, wanted.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_its_own_row_and_in_no_other(bad: float) -> None:
    values = numbers(3, 8, torch.float32, 0)
    values[1, 2] = bad
    norm = Norm(torch.ones(8), None, 1e-6, is_rms=True)
    for found in (
        gpu.add_norm(None, values, norm, False)[1],
        *(gpu.activate(Product(values), kind, False) for kind in ACTIVATIONS),
    ):
        assert found.values.isfinite().all(1).tolist() == [True, False, True]
