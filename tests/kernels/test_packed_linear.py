"""Packed weights against plain multiplication."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flipkd.kernels import packed_linear
from flipkd.kernels.encoder_ops import Operand, reference
from flipkd.kernels.packed_linear import multiply_bf16, multiply_int8, pack_bf16, pack_int8, packs
from flipkd.models.linear import Linear

needs_packing = pytest.mark.skipif(not packs(), reason="weights cannot be packed on this processor")
sizes = st.integers(1, 12).map(lambda count: 32 * count)
rows_of_batches = st.integers(1, 70)


@pytest.fixture
def fresh_answer() -> Iterator[None]:
    """``packs`` asks again, before and after."""
    packs.cache_clear()
    yield
    packs.cache_clear()


@needs_packing
@settings(max_examples=40)
@given(rows=rows_of_batches, inputs=sizes, outputs=sizes, seed=st.integers(0, 99))
def test_int8_sums_are_exact(rows: int, inputs: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, weight = (
        torch.randint(-127, 128, (count, inputs), generator=generator, dtype=torch.int8) for count in (rows, outputs)
    )
    scale = torch.rand(outputs, generator=generator) + 0.01
    wanted = ((values.long() @ weight.long().t()).float() * scale).bfloat16()
    assert torch.equal(multiply_int8(values, pack_int8(weight), scale), wanted)


@needs_packing
@settings(max_examples=40)
@given(rows=rows_of_batches, inputs=sizes, outputs=sizes, biased=st.booleans(), seed=st.integers(0, 99))
def test_bf16_is_off_by_its_rounding_alone(rows: int, inputs: int, outputs: int, biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, weight = (torch.randn(count, inputs, generator=generator).bfloat16() for count in (rows, outputs))
    bias = torch.randn(outputs, generator=generator).bfloat16() if biased else None
    wanted = values.double() @ weight.double().t()
    wanted = wanted if bias is None else wanted + bias.double()
    found = multiply_bf16(values, pack_bf16(weight), bias).double()
    # Half a unit of bf16 (2^-8 at most), and what float32 sums of this length may lose.
    allowed = wanted.abs() * 2.0**-7.99 + 1e-6 * inputs
    assert ((found - wanted).abs() <= allowed).all()


@needs_packing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_layer_gives_the_same_without_packed_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    operand = reference.operand(torch.randn(50, 64, generator=generator), dtype)
    packed = reference.numbers(Linear(weight, bias, dtype)(operand)).float()
    monkeypatch.setattr("flipkd.models.linear.packs", lambda: False)
    plain = reference.numbers(Linear(weight, bias, dtype)(operand)).float()
    assert not torch.equal(packed, torch.zeros_like(packed))
    assert torch.allclose(packed, plain, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@settings(max_examples=20)
@given(first=st.integers(0, 99), rows=rows_of_batches, inputs=sizes, outputs=sizes)
def test_a_row_does_not_depend_on_those_beside_it(
    first: int, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    """So a text that comes from the cache, or another batch, has the same bits (bf16 on AMX: see ``Linear``)."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator), dtype)
    whole = reference.operand(torch.randn(200, inputs, generator=generator), dtype)
    some = slice(first, first + rows)
    scale = None if whole.row_scale is None else whole.row_scale[some].contiguous()
    part = layer(Operand(whole.values[some].contiguous(), scale))
    assert torch.equal(reference.numbers(part), reference.numbers(layer(whole))[some])


@needs_packing
def test_float32_is_never_packed() -> None:
    weight, values = torch.randn(64, 32), torch.randn(20, 32)
    assert torch.equal(Linear(weight, None, torch.float32)(Operand(values)).values, values @ weight.t())


@needs_packing
@pytest.mark.parametrize("function", ["multiply_int8", "multiply_bf16"])
def test_weights_are_not_packed_where_the_operators_are_missing_or_wrong(
    function: str, fresh_answer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed_linear, function, missing)
    assert not packs()
    packs.cache_clear()
    monkeypatch.setattr(packed_linear, function, lambda values, *_: torch.ones(len(values), 48))
    assert not packs()
