"""What runs on a CUDA GPU, on one: kernels against their references, encoders and a job against the CPU's.

Skipped where there is none. Under a minute on an H100, most of it Triton compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flipkd.config import EncodeConfig, EncoderOptions
from flipkd.kernels import encoder_ops, packed_attention
from flipkd.kernels.encoder_ops import Heads, Norm, Product, Texts
from flipkd.kernels.encoder_ops import reference as encoder_reference
from flipkd.kernels.pair_score import pair_score
from flipkd.kernels.pool_project import pool_project, reference
from flipkd.models.encoder import load_encoder
from flipkd.models.linear import Linear
from flipkd.run.encode import encode
from flipkd.vectors.rows import VectorRows, quantise
from flipkd.vectors.store import VectorStore
from tests.conftest import WriteParquet
from tests.small_models import make_base
from tests.vectors.dequantise import dequantise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

CUDA = torch.device("cuda")
ROWS = 500
LENGTHS = (1, 5, 5, 40, 1, 17, 130, 2, 64, 1)


def unit_rows(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    made: np.ndarray = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return made


def on_gpu(rows: VectorRows, left: np.ndarray, right: np.ndarray, **options: Any) -> list[np.ndarray | None]:
    from flipkd.kernels.pair_score import gpu

    table = gpu.rows_to_device(rows)
    indices = (torch.from_numpy(index).cuda() for index in (left, right))
    found = gpu.pair_score_tensors(table, table, *indices, **options)
    return [None if part is None else part.cpu().numpy() for part in found]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("dtype", "dim"), [("int8", 128), ("int8", 33), ("bf16", 128), ("float32", 40)])
def test_pair_score_is_the_reference(dtype: str, dim: int, grouped: bool) -> None:
    vectors = unit_rows(ROWS, dim)
    vectors[7] = 0
    rows, draw = quantise(vectors, dtype), np.random.default_rng(1)
    left = np.repeat(draw.integers(-1, ROWS, 900), draw.integers(1, 40, 900)) if grouped else None
    left = draw.integers(-1, ROWS, 20_011) if left is None else left
    right = draw.integers(-1, ROWS, len(left))
    left, right = left.astype(np.int32), right.astype(np.int32)
    calibration = (8.0, -3.0)
    want = pair_score(rows, rows, left, right, calibration=calibration, backend="reference")
    score, probability, _ = on_gpu(rows, left, right, calibration=calibration, grouped=grouped)
    assert score is not None
    np.testing.assert_allclose(score, want.score, rtol=0, atol=2e-6)  # NaN where the reference has it
    np.testing.assert_allclose(probability, want.probability, rtol=0, atol=1e-5)
    kept = np.flatnonzero(score >= 0.05)
    few, few_probabilities, position = on_gpu(
        rows, left, right, calibration=calibration, min_score=0.05, grouped=grouped
    )
    np.testing.assert_array_equal(position, kept)
    assert few is not None
    assert few_probabilities is not None
    assert probability is not None
    assert few.tobytes() == score[kept].tobytes()
    assert few_probabilities.tobytes() == probability[kept].tobytes()


def test_pair_score_has_the_bits_of_the_cpu_in_a_tuned_call() -> None:
    rows, draw = quantise(unit_rows(ROWS, 128), "int8"), np.random.default_rng(2)
    left, right = (draw.integers(0, ROWS, 300_000) for _ in range(2))
    score = on_gpu(rows, left, right, grouped=False)[0]
    assert score is not None
    assert score.tobytes() == pair_score(rows, rows, left, right).score.tobytes()
    assert score.tobytes() == pair_score(rows, rows, left, right, backend="triton").score.tobytes()


@pytest.mark.parametrize("grouped", [False, True])
def test_pair_score_of_one_pair_and_of_none(grouped: bool) -> None:
    rows, one = quantise(unit_rows(1, 128), "int8"), np.zeros(1, np.int32)
    assert on_gpu(rows, one, one, grouped=grouped, min_score=0.5)[0] == np.float32([1.0])
    score, _, position = on_gpu(rows, one[:0], one[:0], grouped=grouped, min_score=0.5)
    assert score is not None
    assert position is not None
    assert len(score) == len(position) == 0


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bad", [-2, ROWS, 2**40])
def test_an_index_outside_is_named(grouped: bool, bad: int) -> None:
    rows = quantise(unit_rows(ROWS, 128), "int8")
    left, right = np.zeros(5000, np.int64), np.ones(5000, np.int64)
    right[[1234, 4000]] = bad
    with pytest.raises(IndexError, match=rf"right_index\[1234\] is {bad}"):
        on_gpu(rows, left, right, grouped=grouped)


def packed_states(lengths: tuple[int, ...], width: int, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "states": (torch.randn(sum(lengths), width, generator=generator) * 3).to(dtype),
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "projection": torch.randn(dim, width, generator=generator) * width**-0.5,
        "norm_weight": torch.rand(width, generator=generator) + 0.5,
    }


@pytest.mark.parametrize(
    ("dtype", "pooling", "norm", "width", "dim"),
    [
        (torch.bfloat16, "mean", True, 576, 128),
        (torch.bfloat16, "last", True, 576, 128),
        (torch.float32, "mean", False, 100, 33),
        (torch.float16, "mean", True, 1025, 256),
    ],
)
def test_pool_project_is_the_reference(dtype: torch.dtype, pooling: str, norm: bool, width: int, dim: int) -> None:
    case: dict[str, Any] = packed_states((0, 3, 0, *LENGTHS, 0), width, dim, dtype)
    if not norm:
        case["norm_weight"] = None
    truth = reference.unit_vectors(
        case["states"].double(),
        case["cu_seqlens"],
        case["projection"].double(),
        None if case["norm_weight"] is None else case["norm_weight"].double(),
        1e-6,
        pooling,
    )
    case = {name: None if tensor is None else tensor.to(CUDA) for name, tensor in case.items()}
    exact = pool_project(**case, pooling=pooling)
    assert exact.finite.all()
    rows = exact.rows.cpu()
    assert float((rows.double() - truth).abs().max()) <= 5e-6
    assert (rows[[0, 2, -1]] == 0).all()  # the texts without tokens
    for name in ("bf16", "int8"):
        got = pool_project(**case, pooling=pooling, dtype=name).rows.cpu()
        stored = torch.from_numpy(quantise(rows.numpy(), name).values)
        assert torch.equal(got, stored.view(torch.bfloat16) if name == "bf16" else stored)  # to the bit
        if pooling == "last":  # one more build each; the other poolings have shown it
            break


def attention_inputs(heads: int, key_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bf16 queries, keys and values as views of one product, as they come out of a multiplication."""
    generator = torch.Generator().manual_seed(heads)
    product = torch.randn(sum(LENGTHS), heads + 2 * key_heads, width, generator=generator).to(CUDA, torch.bfloat16)
    starts = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device=CUDA)
    return (*torch.split(product, [heads, key_heads, key_heads], dim=1), starts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(12, 12, 32), (9, 3, 64), (4, 2, 8)])
def test_flash_attention_and_its_gradients_are_those_by_length(
    causal: bool, heads: int, key_heads: int, width: int
) -> None:
    if packed_attention.flash_kernel() is None:
        pytest.skip("this PyTorch has no varlen_attn with the arguments needed, and flash-attn is not installed")
    *parts, starts = attention_inputs(heads, key_heads, width)
    assert packed_attention._flash(parts[0]) is not None
    found, plain, exact = ([part.detach().to(kind).requires_grad_() for part in parts]
                           for kind in (torch.bfloat16, torch.bfloat16, torch.float64))  # fmt: skip
    weights = torch.randn(sum(LENGTHS), heads, width, generator=torch.Generator().manual_seed(1)).to(CUDA)
    runs: list[tuple[list[Tensor], Callable[..., Tensor]]] = [
        (found, lambda *qkv: packed_attention.packed_attention(*qkv, starts, max(LENGTHS), causal, None)),
        (plain, lambda *qkv: packed_attention.attention_by_length(*qkv, starts, causal, None)),
        (exact, lambda *qkv: packed_attention.attention_by_length(*qkv, starts, causal, None)),
    ]
    made = []
    for inputs, attention in runs:
        output = attention(*inputs)
        (output.double() * weights).sum().backward()
        made.append([output.detach(), *(part.grad for part in inputs)])
    for name, got, rough, truth in zip(("output", "dq", "dk", "dv"), *made, strict=True):
        error, allowed = ((each.double() - truth).abs().max().item() for each in (got, rough))
        assert error <= 2 * allowed + 1e-3, f"{name}: {error}, where bf16 by length is off by {allowed}"


def test_a_text_of_one_token_alone_and_empty_texts() -> None:
    query = torch.randn(1, 4, 16, device=CUDA).bfloat16()
    starts = torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=CUDA)
    found = packed_attention.packed_attention(query, query, query, starts, 1, True, None)
    torch.testing.assert_close(found, query)


@pytest.mark.parametrize("width", [384, 576])
def test_encoder_ops_are_the_reference(width: int) -> None:
    generator = torch.Generator(device=CUDA).manual_seed(0)

    def product(columns: int) -> Tensor:
        return torch.randn(sum(LENGTHS), columns, generator=generator, device=CUDA).bfloat16()

    def close(found: Tensor, plain: Tensor, exact: Tensor) -> None:
        """At most twice PyTorch's error in bf16, and a unit in the last place."""
        assert found.dtype is plain.dtype is torch.bfloat16
        error, allowed = ((each.float() - exact).abs() for each in (found, plain))
        assert bool((error <= 2 * allowed.max() + exact.abs() * 2**-8).all())

    def in_float32(product: Product) -> Product:
        return Product(product.values.float())

    llama, kind = width == 576, torch.bfloat16
    state, added, wide = product(width), Product(product(width)), Product(product(3072))
    weight, bias = torch.randn(2, width, generator=generator, device=CUDA)
    norm = Norm(weight, None if llama else bias, 1e-5, is_rms=llama)
    exact = encoder_reference.add_norm(in_float32(added), state.float(), norm, llama, torch.float32)
    plain = encoder_reference.add_norm(added, state, norm, llama, kind)
    found = encoder_ops.add_norm(added, state.clone(), norm, keeps_sum=llama, dtype=kind)
    close(found[0], plain[0], exact[0])
    close(found[1].values, plain[1].values, exact[1].values)
    name = "silu" if llama else "gelu"
    close(
        encoder_ops.activate(wide, name, gated=llama, dtype=kind).values,
        encoder_reference.activate(wide, name, llama, kind).values,
        encoder_reference.activate(in_float32(wide), name, llama, torch.float32).values,
    )
    heads = Heads(9, 3, 64, causal=True) if llama else Heads(12, 12, 32, causal=False)
    if llama:
        angles = torch.arange(200.0, device=CUDA)[:, None] * torch.rand(32, generator=generator, device=CUDA)
        heads = replace(heads, cosine=angles.cos(), sine=angles.sin())
    values, texts = Product(product((heads.heads + 2 * heads.key_heads) * heads.width)), Texts(np.array(LENGTHS), CUDA)
    truth = encoder_reference.attend(in_float32(values), texts, heads, torch.float32)
    rough = encoder_reference.attend(Product(values.values.clone()), texts, heads, kind)
    close(encoder_ops.attend(values, texts, heads, kind).values, rough.values, truth.values)


@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_int8_multiplications_take_any_number_of_rows(rows: int) -> None:
    weight = torch.randn(64, 32)
    values = encoder_reference.operand(torch.randn(rows, 32), torch.int8)
    want = Linear(weight, None, torch.int8)(values)
    assert values.row_scale is not None
    there = replace(values, values=values.values.to(CUDA), row_scale=values.row_scale.to(CUDA))
    found = Linear(weight.to(CUDA), None, torch.int8)(there)
    assert torch.equal(found.values.cpu(), want.values)


@pytest.fixture(scope="module")
def llama_encoder(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    """An exported student with random weights: what `export` writes, so rows are made by the fused kernel."""
    from flipkd.models.adapter import new_student
    from flipkd.models.export import export_student
    from flipkd.models.options import StudentOptions

    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    base = make_base(tmp_path_factory.mktemp("base"), minilm_dir, seed=0, **shape)
    student = new_student(StudentOptions(str(base), layer=2, dimension=32, rank=4, max_length=64))
    folder = tmp_path_factory.mktemp("llama") / "encoder"
    export_student(student, folder, ["a text"])
    return folder


@pytest.fixture(scope="module")
def texts(icd9: list[tuple[str, str, str]]) -> list[str]:
    long = [long for _, long, _ in icd9[:3000:10]]
    return [*long, "; ".join(long[:8]), "", "x", long[0]]


@pytest.fixture(params=["llama", "bert"])
def folder(request: pytest.FixtureRequest, llama_encoder: Path, minilm_dir: Path) -> Path:
    return llama_encoder if request.param == "llama" else minilm_dir


def test_vectors_are_those_of_the_cpu(folder: Path, texts: list[str]) -> None:
    want = load_encoder(folder).encode_texts(texts)
    for dtype, least in (("float32", 0.99999), ("bf16", 0.999), ("int8", 0.98)):
        encoder = load_encoder(folder, dtype=dtype, device="cuda")
        for max_tokens in (None, 300):  # 300: many batches in two streams
            found = encoder.encode_texts(texts, max_tokens=max_tokens)
            assert cosines(found.vectors[want.tokens > 0], want.vectors[want.tokens > 0]).min() >= least, dtype
            assert not found.vectors[want.tokens == 0].any()
            np.testing.assert_array_equal(found.tokens, want.tokens)
            np.testing.assert_array_equal(found.truncated, want.truncated)


def test_without_the_fused_operations_vectors_are_the_same(
    folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(folder, dtype="bf16", device="cuda")
    found = encoder.encode(texts)
    monkeypatch.setenv("FLIPKD_ENCODER_OPS", "reference")
    plain = encoder.encode(texts)
    seen = plain.any(1)
    assert cosines(found[seen], plain[seen]).min() >= 0.9995


@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
def test_rows_of_the_fused_kernel_are_those_of_the_cpu(llama_encoder: Path, texts: list[str], dtype: Any) -> None:
    want = load_encoder(llama_encoder).encode_rows(texts, dtype).rows
    encoder = load_encoder(llama_encoder, device="cuda")
    assert encoder._row_model is not None
    for max_tokens in (None, 300):
        found = encoder.encode_rows(texts, dtype, max_tokens=max_tokens).rows
        assert found.values.dtype == want.values.dtype
        step = {"float32": 1e-4, "bf16": 2**-8, "int8": 2 / 127}[dtype]  # one step of rounding
        np.testing.assert_allclose(dequantise(found), dequantise(want), atol=step)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_job_on_a_gpu_writes_the_store_of_the_cpu(
    llama_encoder: Path, texts: list[str], dtype: Any, write_parquet: WriteParquet, tmp_path: Path
) -> None:
    write_parquet("records/0.parquet", {"id": list(range(len(texts))), "text": texts}, row_group_rows=100)
    stores = {}
    for device in ("cpu", "cuda"):
        options = EncoderOptions(str(llama_encoder), dtype=dtype if device == "cuda" else "float32", device=device)
        encode(EncodeConfig(options, str(tmp_path / "records"), str(tmp_path / device), rows_per_unit=100))
        stores[device] = dequantise(VectorStore.open(tmp_path / device).rows)
    seen = stores["cpu"].any(1)
    np.testing.assert_array_equal(seen, stores["cuda"].any(1))
    assert cosines(stores["cuda"][seen], stores["cpu"][seen]).min() >= (0.9995 if dtype == "float32" else 0.998)
