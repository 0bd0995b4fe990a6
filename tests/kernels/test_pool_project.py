"""pool_project: checks, dispatch and the reference; the Triton kernel is tested in test_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flipkd.errors import ConfigError, KernelError
from flipkd.kernels import dispatch
from flipkd.kernels.pool_project import pool_project
from flipkd.vectors.rows import quantise


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.POOL_PROJECT_OVERRIDE, raising=False)
    dispatch._resolve_on_device.cache_clear()
    yield
    dispatch._resolve_on_device.cache_clear()


def case(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "states": torch.randn(7, 6, generator=generator),
        "cu_seqlens": torch.tensor([0, 3, 3, 7], dtype=torch.int32),
        "projection": torch.randn(4, 6, generator=generator),
        "norm_weight": torch.rand(6, generator=generator),
        **changes,
    }


def test_reference_is_transformers_norm_then_pooling_then_projection() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    tensors = case()
    norm = LlamaRMSNorm(6, eps=1e-5)
    norm.weight.data = tensors["norm_weight"]
    with torch.no_grad():
        normed = norm(tensors["states"])
    for pooling, pooled in (
        ("mean", torch.stack([normed[:3].mean(0), torch.zeros(6), normed[3:].mean(0)])),
        ("last", torch.stack([normed[2], torch.zeros(6), normed[6]])),
    ):
        want = torch.nn.functional.normalize(pooled @ tensors["projection"].T, dim=1)
        got = pool_project(**tensors, epsilon=1e-5, pooling=pooling)
        torch.testing.assert_close(got.rows, want, rtol=0, atol=1e-6)
        assert got.finite.all()
        stored = quantise(got.rows.numpy(), "int8").values
        found = pool_project(**tensors, epsilon=1e-5, pooling=pooling, dtype="int8").rows
        assert (found.numpy() == stored).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}, "end at the number of tokens, 7"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 7], dtype=torch.int32)}, "never fall"),
        ({"cu_seqlens": torch.tensor([1, 7], dtype=torch.int32)}, "start at 0"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "must be int32"),
        ({"states": torch.zeros(6, 7).T}, "contiguous"),
        ({"states": torch.zeros(7, 6, dtype=torch.float64)}, "float64"),
        ({"projection": torch.zeros(4, 5)}, r"\[dim, 6\]"),
        ({"norm_weight": torch.zeros(5)}, r"\[6\]"),
        ({"norm_weight": torch.zeros(6, device="meta")}, "norm_weight is on meta"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool_project(**case(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pooling": "max"}, "'max' is not one of mean, last"), ({"dtype": "int4"}, "'int4' is not one of")],
)
def test_unknown_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pool_project(**case(**changes))


def test_a_choice_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match="not on cpu"):
        pool_project(**case(), backend="triton")
    monkeypatch.setenv(dispatch.POOL_PROJECT_OVERRIDE, "cuda")
    with pytest.raises(KernelError, match="'cuda' is not one of reference, triton"):
        pool_project(**case())


def test_choice_follows_the_states() -> None:
    pytest.importorskip("triton")
    assert dispatch.pool_project_backend(None, "cpu") == "reference"
    assert dispatch.pool_project_backend(None, "cuda") == "triton"
    assert dispatch.pool_project_backend("reference", "cuda") == "reference"
