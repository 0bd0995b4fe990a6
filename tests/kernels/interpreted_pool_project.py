"""pool_project in Triton's interpreter, against plain PyTorch.

Triton reads TRITON_INTERPRET when it is imported, so test_gpu.py runs this file in a process of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flipkd.kernels.pool_project import STATE_TYPES, TORCH_DTYPES, gpu, pool_project, reference
from flipkd.vectors.rows import quantise

LENGTHS = (0, 3, 1, 17, 0, 40, 2, 0)


def starts_of(lengths: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def make(
    lengths: tuple[int, ...] | list[int], width: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "states": (torch.randn(sum(lengths), width, generator=generator) * 3).to(dtype),
        "cu_seqlens": starts_of(lengths),
        "projection": torch.randn(dim, width, generator=generator) * width**-0.5,
        "norm_weight": torch.rand(width, generator=generator) + 0.5,
    }


def error_of(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max())


@pytest.mark.parametrize("dtype", STATE_TYPES)
@pytest.mark.parametrize(("width", "dim"), [(1, 1), (3, 5), (33, 64), (100, 17), (576, 128), (1025, 33)])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype, width: int, dim: int, pooling: str) -> None:
    case = make(LENGTHS, width, dim, dtype)
    for weight in (case["norm_weight"], None):
        truth, pytorch = (
            reference.unit_vectors(
                case["states"].to(kind), case["cu_seqlens"], case["projection"].to(kind), weight, 1e-6, pooling
            )
            for kind in (torch.float64, dtype)
        )
        got = pool_project(**{**case, "norm_weight": weight}, epsilon=1e-6, pooling=pooling, backend="triton")
        assert got.finite.all()
        assert (got.rows[[0, 4, 7]] == 0).all()  # the texts without tokens
        # an ulp of 1 on top: a row of one number is 1 or -1, where PyTorch makes no error at all
        assert error_of(got.rows, truth) <= 2 * error_of(pytorch, truth) + torch.finfo(torch.float32).eps


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=20),
    width=st.integers(1, 70),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(STATE_TYPES),
    pooling=st.sampled_from(("mean", "last")),
    norm=st.booleans(),
    share=st.sampled_from((1, 2, 4, 8, 16)),
    seed=st.integers(0, 1000),
)
def test_rows_are_the_references(
    lengths: list[int],
    width: int,
    dim: int,
    dtype: torch.dtype,
    pooling: str,
    norm: bool,
    share: int,
    seed: int,
) -> None:
    case: dict[str, Any] = make(lengths, width, dim, dtype, seed)
    if not norm:
        case["norm_weight"] = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "texts_per_program", lambda texts, processors: share)
        exact = pool_project(**case, pooling=pooling, backend="triton").rows
        want = pool_project(**case, pooling=pooling, backend="reference").rows
        torch.testing.assert_close(exact, want, rtol=0, atol=2e-6)
        for name in ("bf16", "int8"):
            got = pool_project(**case, pooling=pooling, dtype=name, backend="triton").rows
            stored = torch.from_numpy(quantise(exact.numpy(), name).values).view(TORCH_DTYPES[name])
            assert torch.equal(got, stored)  # the rule of `quantise`, to the bit


def test_a_text_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((5, 0, 30, 9, 1, 12, 7), 100, 24, torch.bfloat16)
    together = pool_project(**case, backend="triton").rows
    starts = case["cu_seqlens"].tolist()
    for share in (1, 4):
        monkeypatch.setattr(gpu, "texts_per_program", lambda texts, processors, share=share: share)
        for text, (begin, end) in enumerate(pairwise(starts)):
            alone = {**case, "states": case["states"][begin:end], "cu_seqlens": starts_of([end - begin])}
            assert torch.equal(pool_project(**alone, backend="triton").rows[0], together[text])
    poisoned = {**case, "states": case["states"].clone()}
    poisoned["states"][starts[2] : starts[3]] = torch.nan
    got = pool_project(**poisoned, backend="triton")
    assert got.finite.tolist() == [text != 2 for text in range(7)]
    assert torch.equal(got.rows[[0, 1, 3, 4, 5, 6]], together[[0, 1, 3, 4, 5, 6]])
    assert (got.rows[2] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_numbers_that_are_not_finite_are_reported(dtype: str, value: float) -> None:
    case: dict[str, Any] = {**make((2, 3), 8, 4, torch.float32), "norm_weight": None}
    case["states"][3, 5] = value
    for backend in ("triton", "reference"):
        got = pool_project(**case, dtype=dtype, backend=backend)
        assert got.finite.tolist() == [True, False]
        assert (got.rows[1] == 0).all()
        assert (got.rows[0] != 0).any()


@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
def test_every_number_is_written_and_none_beside_them(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(LENGTHS, 33, 19, torch.float16)
    want = pool_project(**case, dtype=dtype, backend="triton")
    real_empty = torch.empty
    buffers: list[Tensor] = []

    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory full of rubbish, with 64 numbers of it on both sides."""
        numbers = int(np.prod(shape))
        raw = real_empty(numbers + 128, dtype=dtype, device=device)
        raw.view(torch.uint8).fill_(0xA5)
        buffers.append(raw)
        return raw[64 : 64 + numbers].view(*shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    got = pool_project(**case, dtype=dtype, backend="triton")
    monkeypatch.undo()
    assert torch.equal(got.rows, want.rows)
    assert torch.equal(got.finite, want.finite)
    assert len(buffers) == 3
    for raw in buffers:
        width = raw.element_size()
        sides = raw.view(torch.uint8)[: 64 * width], raw.view(torch.uint8)[-64 * width :]
        assert all((side == 0xA5).all() for side in sides)


def test_nothing_outside_the_states_is_read() -> None:
    """Starts in GPU memory cannot be checked, so the kernel cuts texts to the tokens there are."""
    case = make((4, 4), 16, 4, torch.float32)
    guarded = torch.full((24, 16), torch.nan)
    guarded[8:16] = case["states"]
    rows, finite = torch.empty(3, 4), torch.empty(3, dtype=torch.uint8)
    starts = torch.tensor([-5, 4, 100, 2], dtype=torch.int32)  # the last text ends before it begins
    gpu.launch(guarded[8:16], starts, case["projection"], case["norm_weight"], 1e-6, "mean", "float32", 2, rows, finite)
    want = pool_project(**case, backend="reference").rows
    torch.testing.assert_close(rows[:2], want, rtol=0, atol=1e-6)
    assert (rows[2] == 0).all()
    assert finite.tolist() == [1, 1, 1]


def test_no_texts() -> None:
    case = make((), 16, 4, torch.float32)
    got = pool_project(**case, dtype="int8", backend="triton")
    assert got.rows.shape == (0, 4)
    assert got.finite.shape == (0,)


def test_sizes_beyond_the_registers_are_refused() -> None:
    case = make((1,), 8, gpu.MAX_DIM + 1, torch.float32)
    with pytest.raises(ValueError, match="backend='reference'"):
        pool_project(**case, backend="triton")
