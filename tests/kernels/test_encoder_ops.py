"""The fused operations against float32 PyTorch, with PyTorch's own error at the same dtype as the measure."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flipkd.kernels import encoder_ops
from flipkd.kernels.encoder_ops import ACTIVATIONS, Heads, Norm, Operand, Product, Texts, reference
from tests.guarded import guarded

needs_library = pytest.mark.skipif(encoder_ops._library() is None, reason="no compiled library for this processor")
DTYPES = (torch.bfloat16, torch.int8)
lengths_of_texts = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def product(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Product:
    """A product as a multiplication in ``dtype`` gives it, against closed pages."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is not torch.int8:
        return Product(closed(torch.randn(rows, columns, generator=generator).to(dtype)))
    values = (torch.randn(rows, columns, generator=generator) * 100).bfloat16()
    row_scale = torch.rand(rows, generator=generator) * 0.02 + 1e-3
    return Product(closed(values), closed(row_scale), None, closed(torch.randn(columns, generator=generator)))


def closed(values: Tensor) -> Tensor:
    """The same numbers, where a read or write past them ends the test run."""
    if values.dtype is torch.bfloat16:  # which NumPy does not know
        return closed(values.view(torch.int16)).view(torch.bfloat16)
    return torch.from_numpy(guarded(values.numpy()))


def on_cpu(*lengths: int) -> Texts:
    return Texts(np.array(lengths), torch.device("cpu"))


def exact(made: Product) -> Product:
    """The same numbers, to be computed with in float32."""
    return Product(reference.numbers(made).float())


def number(operand: Operand) -> Tensor:
    """float32 [T, n]."""
    return operand.values.float() * (1.0 if operand.row_scale is None else operand.row_scale[:, None])


def check(own: Operand, plain: Operand, wanted: Tensor) -> None:
    """At most twice plain PyTorch's error at this dtype (and a unit in the last place, where it has none)."""
    assert own.values.dtype is plain.values.dtype
    unit = wanted.abs().amax() * (2.0**-9 if own.row_scale is None else 1 / 127)
    allowed = 2 * (number(plain) - wanted).abs().max() + unit
    assert (number(own) - wanted).abs().max() <= allowed


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Operand:
    """An output buffer in which a place that is not written is seen."""
    if dtype is torch.int8:
        return Operand(closed(torch.full((rows, columns), -128, dtype=dtype)), closed(torch.full((rows,), torch.nan)))
    return Operand(closed(torch.full((rows, columns), torch.nan, dtype=dtype)))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_ops, "_empty", poisoned)


@needs_library
@settings(max_examples=60)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    is_rms=st.booleans(),
    keeps_sum=st.booleans(),
    adds=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_add_norm(
    rows: int, width: int, dtype: torch.dtype, is_rms: bool, keeps_sum: bool, adds: bool, seed: int
) -> None:
    width *= 32
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(rows, width, generator=generator).bfloat16()
    bias = None if is_rms else closed(torch.randn(width, generator=generator))
    norm = Norm(closed(torch.randn(width, generator=generator)), bias, 1e-5, is_rms)
    given_product = product(rows, width, dtype, seed) if adds else None
    wanted_state, wanted = reference.add_norm(
        exact(given_product) if given_product else None, state.float(), norm, keeps_sum, torch.float32
    )
    plain_state, plain = reference.add_norm(given_product, state.clone(), norm, keeps_sum, dtype)
    own_state, own = encoder_ops.add_norm(given_product, closed(state), norm, keeps_sum=keeps_sum, dtype=dtype)
    if rows:
        check(own, plain, wanted.values)
        check(Operand(own_state), Operand(plain_state), wanted_state)
    assert own.values.shape == (rows, width)


@needs_library
@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    given_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_activate(
    rows: int, columns: int, given_dtype: torch.dtype, dtype: torch.dtype, kind: str, gated: bool, seed: int
) -> None:
    made = product(rows, columns * (64 if gated else 32), given_dtype, seed)
    wanted = reference.activate(exact(made), kind, gated, torch.float32).values
    own = encoder_ops.activate(made, kind, gated=gated, dtype=dtype)
    check(own, reference.activate(made, kind, gated, dtype), wanted)


@needs_library
@settings(max_examples=60)
@given(
    lengths=lengths_of_texts,
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.sampled_from([32, 64, 96]),
    causal=st.booleans(),
    rotates=st.booleans(),
    given_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    amx=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attend(
    lengths: list[int],
    key_heads: int,
    groups: int,
    width: int,
    causal: bool,
    rotates: bool,
    given_dtype: torch.dtype,
    dtype: torch.dtype,
    amx: bool,
    seed: int,
) -> None:
    heads = Heads(key_heads * groups, key_heads, width, causal)
    if rotates:
        positions = torch.arange(float(max(lengths)))[:, None]
        angles = positions * torch.rand(width // 2, generator=torch.Generator().manual_seed(seed))
        heads = replace(heads, cosine=closed(angles.cos()), sine=closed(angles.sin()))
    made = product(sum(lengths), (heads.heads + 2 * key_heads) * width, given_dtype, seed)
    texts = on_cpu(*lengths)
    wanted = reference.attend(exact(made), texts, heads, torch.float32).values
    # Attention in bf16 rounds queries, keys and values first: PyTorch's error is taken from the same.
    rounded = Product(reference.numbers(made).bfloat16())
    with pytest.MonkeyPatch.context() as patch:
        if not amx:
            patch.setattr(encoder_ops, "_has_amx", lambda: False)
        own = encoder_ops.attend(made, texts, heads, dtype)
    check(own, reference.attend(rounded, texts, heads, dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_is_a_view_is_read_as_one(dtype: torch.dtype) -> None:
    state = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = Norm(torch.ones(64), None, 1e-5, is_rms=True)
    whole = encoder_ops.add_norm(None, state.t().contiguous(), norm, keeps_sum=False, dtype=dtype)[1]
    view = encoder_ops.add_norm(None, state.t(), norm, keeps_sum=False, dtype=dtype)[1]
    assert (number(view) - number(whole)).abs().max() < 0.05


@needs_library
def test_memory_that_is_not_to_be_had_is_an_error() -> None:
    made, operand = product(1, 96, torch.bfloat16, 0), encoder_ops._Operand()
    given_product, library = encoder_ops._given(made), encoder_ops._library()
    assert library is not None
    with pytest.raises(MemoryError, match="flipkd_attend"):
        encoder_ops.attend(made, on_cpu(2**57), Heads(1, 1, 32, causal=False), torch.bfloat16)
    with pytest.raises(MemoryError, match="flipkd_activate"):
        library.flipkd_activate(ctypes.byref(given_product), 0, 2**61, 0, False, ctypes.byref(operand))
    with pytest.raises(MemoryError, match="flipkd_add_norm"):
        library.flipkd_add_norm(None, None, 0, 2**61, None, None, 1e-5, True, False, ctypes.byref(operand))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    heads = Heads(2, 1, 32, causal=False)
    made = product(50, 128, dtype, 0)
    whole = encoder_ops.attend(made, on_cpu(17, 3, 30), heads, dtype)
    for first, last in ((0, 17), (17, 20), (20, 50)):
        scale = None if made.row_scale is None else made.row_scale[first:last].contiguous()
        part = Product(made.values[first:last].contiguous(), scale, None, made.bias)
        alone = encoder_ops.attend(part, on_cpu(last - first), heads, dtype)
        assert torch.equal(number(alone), number(whole)[first:last])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_its_own_text_and_in_no_other(dtype: torch.dtype, bad: float) -> None:
    made = product(6, 96, torch.bfloat16, 1)
    made.values[1, 5] = bad
    heads, norm = Heads(1, 1, 32, causal=False), Norm(torch.ones(96), None, 1e-6, is_rms=True)
    operations: list[Callable[[], Operand]] = [
        lambda: encoder_ops.attend(made, on_cpu(3, 3), heads, dtype),
        lambda: encoder_ops.activate(made, "gelu", gated=False, dtype=dtype),
        lambda: encoder_ops.add_norm(made, torch.zeros(6, 96).bfloat16(), norm, keeps_sum=True, dtype=dtype)[1],
    ]
    for operation in operations:
        found = number(operation())
        assert not found[1].isfinite().all()
        assert found[3:].isfinite().all()


def test_int8_rows_are_stretched_to_their_largest_component() -> None:
    values = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]])
    made = reference.operand(values, torch.int8)
    assert made.values.tolist() == [[32, -127, 64], [0, 0, 0]]
    assert made.row_scale is not None
    assert torch.allclose(made.row_scale, torch.tensor([2 / 127, 0.0]))


@needs_library
def test_gelu_is_exact_to_the_rounding_of_its_result() -> None:
    values = torch.cat([torch.linspace(-8, 8, 4064), torch.tensor([0.0, 4.5, -4.5, 50.0, -50.0, 1e4, -1e4, 1e30] * 4)])
    values = values.bfloat16().reshape(-1, 32)
    found = encoder_ops.activate(Product(values), "gelu", gated=False, dtype=torch.bfloat16).values.float()
    wanted = torch.nn.functional.gelu(values.double()).float()
    assert ((found - wanted).abs() <= wanted.abs() * 2.0**-7.99 + 2e-5).all()
