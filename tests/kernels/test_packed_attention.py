"""Packed attention length by length against dense attention, and which kernel a GPU would get."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flipkd.kernels import packed_attention as varlen
from flipkd.kernels.packed_attention import packed_attention


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, scale: float | None) -> Tensor:
    """float64, one softmax over all tokens with all but the own text masked."""
    query, key, value = query.double(), key.double(), value.double()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    sees = text[:, None] == text[None, :]
    if causal:
        sees &= torch.ones_like(sees).tril()
    factor = query.shape[2] ** -0.5 if scale is None else scale
    products = torch.einsum("qhd,khd->hqk", query, key) * factor
    weights = products.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def make(
    lengths: list[int], heads: int, key_heads: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    shapes = ((heads, width), (key_heads, width), (key_heads, width))
    query, key, value = (torch.randn(sum(lengths), *shape, generator=generator).to(dtype) for shape in shapes)
    starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
    return query, key, value, starts


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    key_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    width=st.sampled_from((1, 5, 8, 64)),
    causal=st.booleans(),
    scale=st.sampled_from((None, 0.3)),
)
def test_is_dense_attention(
    lengths: list[int], key_heads: int, repeats: int, width: int, causal: bool, scale: float | None
) -> None:
    query, key, value, starts = make(lengths, key_heads * repeats, key_heads, width)
    got = packed_attention(query, key, value, starts, max(lengths), causal, scale)
    assert got.dtype == torch.float32
    want = dense(query, key, value, lengths, causal, scale)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_bfloat16_stays_bfloat16() -> None:
    query, key, value, starts = make([4, 4, 1], 4, 2, 16, torch.bfloat16)
    got = packed_attention(query, key, value, starts, 4, True, None)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), dense(query, key, value, [4, 4, 1], True, None), rtol=0, atol=0.03)


def test_no_tokens_at_all() -> None:
    query, key, value, starts = make([0, 0], 4, 2, 8)
    assert packed_attention(query, key, value, starts, 0, False, None).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, s: (q, k[:, :, :4], v, s), "key and value alike"),
        (lambda q, k, v, s: (q[:-1], k, v, s), "does not fit"),
        (lambda q, k, v, s: (q[:, :3], k, v, s), "multiple of key heads"),
        (lambda q, k, v, s: (q, k, v, s.long()), "must be int32"),
        (lambda q, k, v, s: (q, k, v, s - 1), "must start at 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    query, key, value, starts = change(*make([2, 3], 4, 2, 8))
    with pytest.raises(ValueError, match=message):
        packed_attention(query, key, value, starts, 3, True, None)


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    yield
    varlen.flash_kernel.cache_clear()
    varlen._varlen_arguments.cache_clear()


def record_varlen_attn(monkeypatch: pytest.MonkeyPatch, parameters: list[inspect.Parameter]) -> list[dict[str, Any]]:
    """Puts a `varlen_attn` with such a signature in PyTorch's place; returns the arguments of its calls."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.Signature(parameters)
    calls: list[dict[str, Any]] = []

    def recorded(*args: Any, **options: Any) -> Tensor:
        calls.append(signature.bind(*args, **options).arguments)
        return args[0]

    recorded.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "varlen_attn", recorded)
    varlen.flash_kernel.cache_clear()
    varlen._varlen_arguments.cache_clear()
    return calls


def parameters_of_varlen_attn(*left_out: str) -> list[inspect.Parameter]:
    module = pytest.importorskip("torch.nn.attention.varlen")
    every = inspect.signature(module.varlen_attn).parameters
    return [parameter for name, parameter in every.items() if name not in left_out]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("max_length", [1, 7])
def test_varlen_attn_is_called_as_this_pytorch_has_it(
    causal: bool, max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU the call must at least fit the real signature, and ask for what the fallback computes."""
    calls = record_varlen_attn(monkeypatch, parameters_of_varlen_attn())
    assert varlen.flash_kernel() == "torch"
    monkeypatch.setattr(varlen, "_flash", lambda query: "torch")
    query, key, value, starts = make([1, 0, 1], 4, 2, 8)
    packed_attention(query, key, value, starts, max_length, causal, 0.5)
    (call,) = calls
    assert call["query"] is query
    assert call["cu_seq_q"] is starts
    assert call["cu_seq_k"] is starts
    assert (call["max_q"], call["max_k"]) == (max(2, max_length),) * 2  # never 1: see the module's docstring
    assert call["window_size"] == ((-1, 0) if causal else (-1, -1))
    assert call["scale"] == 0.5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left_out", [("enable_gqa", "num_splits"), ("enable_gqa",), ("num_splits",), ()])
def test_varlen_attn_is_told_what_it_knows(
    causal: bool, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.11 has no grouped heads there, so keys and values are repeated; 2.12 has both arguments."""
    here = {parameter.name for parameter in parameters_of_varlen_attn()}
    calls = record_varlen_attn(monkeypatch, parameters_of_varlen_attn(*left_out))
    assert varlen.flash_kernel() == "torch"
    query, key, value, starts = make([3, 2], 4, 2, 8)
    varlen._torch_flash(query, key, value, starts, 3, causal, None)
    varlen._torch_flash(query, query, query, starts, 3, causal, None)
    grouped, plain = calls
    if "enable_gqa" in here - set(left_out):
        assert grouped["enable_gqa"] is True
        assert grouped["key"] is key
    else:
        assert "enable_gqa" not in grouped
        torch.testing.assert_close(grouped["key"], key[:, [0, 0, 1, 1]], rtol=0, atol=0)
        torch.testing.assert_close(grouped["value"], value[:, [0, 0, 1, 1]], rtol=0, atol=0)
    assert plain["key"] is query
    assert plain.get("enable_gqa", False) is False
    for call in calls:
        assert call["window_size"] == ((-1, 0) if causal else (-1, -1))
        assert ("num_splits" in call) == ("num_splits" in here - set(left_out))
        assert call.get("num_splits") is None  # FlashAttention 2 has nothing to switch off


def test_varlen_attn_of_pytorch_2_10_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    record_varlen_attn(monkeypatch, parameters_of_varlen_attn("window_size", "scale", "enable_gqa", "num_splits"))
    assert varlen.flash_kernel() in (None, "flash_attn")


def test_the_operator_behind_varlen_attn_takes_these_arguments() -> None:
    """Shapes alone, on PyTorch's meta device: the arguments pass the real operator."""
    pytest.importorskip("torch.nn.attention.varlen")
    query, key, value, starts = (each.to("meta") for each in make([3, 2], 4, 2, 16, torch.bfloat16))
    assert varlen._torch_flash(query, key, value, starts, 3, True, None).shape == (5, 4, 16)


def test_only_half_precision_on_a_gpu_goes_to_flash() -> None:
    assert varlen._flash(torch.zeros(1, 1, 8, dtype=torch.bfloat16)) is None
    assert varlen._flash(torch.zeros(1, 1, 8, device="meta", dtype=torch.bfloat16)) is None


def test_runs_join_equal_neighbours_only() -> None:
    assert varlen.runs([3, 3, 0, 5, 3]) == ((2, 3), (1, 5), (1, 3))
    assert varlen.runs([]) == ()
