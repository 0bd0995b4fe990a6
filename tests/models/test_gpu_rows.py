"""Rows made by one kernel after the blocks are those that the steps one by one give. On a CPU, by the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from tokenizers import Tokenizer
from torch import nn

from flipkd.config import VectorDtype
from flipkd.errors import ModelError
from flipkd.models.backbone import load_backbone
from flipkd.models.encoder import Encoder, load_encoder
from flipkd.models.export import export_student
from flipkd.models.folder import read_folder
from flipkd.models.gpu_rows import are_finite, finished_rows, load_row_model
from flipkd.vectors.rows import VectorRows, quantise
from tests.vectors.dequantise import dequantise

from .conftest import MakeFolder, wrapped
from .test_export import TEXTS, make_student

CPU = torch.device("cpu")
KINDS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def fused(folder: Path, dtype: str = "float32") -> Encoder:
    """An encoder that does on the CPU what it would do on a GPU."""
    encoder, settings = load_encoder(folder, dtype=dtype), read_folder(folder)
    backbone = load_backbone(settings, KINDS[dtype], CPU, False)
    encoder._row_model = load_row_model(settings, backbone, encoder._model, CPU)
    return encoder


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
def test_rows_are_those_of_the_steps_one_by_one(llama_dir: Path, tmp_path: Path, pooling: str, dtype: str) -> None:
    export_student(make_student(llama_dir, pooling=pooling), tmp_path / "encoder", TEXTS)
    texts = [*TEXTS, "", TEXTS[0]]
    wanted = load_encoder(tmp_path / "encoder").encode_rows(texts, dtype)
    found = fused(tmp_path / "encoder").encode_rows(texts, dtype, max_tokens=64)
    assert found.rows.values.dtype == wanted.rows.values.dtype
    assert np.array_equal(found.truncated, wanted.truncated)
    assert np.array_equal(found.tokens, wanted.tokens)
    step = {"float32": 1e-5, "bf16": 2**-8, "int8": 2 / 127}[dtype]  # one step of rounding
    np.testing.assert_allclose(dequantise(found.rows), dequantise(wanted.rows), atol=step)
    assert not found.rows.values[len(TEXTS)].any()
    assert np.array_equal(found.rows.values[-1], found.rows.values[0])


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_low_precision_blocks(llama_dir: Path, tmp_path: Path, dtype: str) -> None:
    export_student(make_student(llama_dir), tmp_path / "encoder", TEXTS)
    wanted = load_encoder(tmp_path / "encoder", dtype=dtype).encode_rows(TEXTS, "float32").rows.values
    found = fused(tmp_path / "encoder", dtype).encode_rows(TEXTS, "float32").rows.values
    assert (found * wanted).sum(axis=1).min() > 0.9995


def test_what_is_not_finite_is_tried_again_and_then_an_error(llama_dir: Path, tmp_path: Path) -> None:
    export_student(make_student(llama_dir), tmp_path / "encoder", TEXTS)
    good = load_encoder(tmp_path / "encoder").encode_rows(TEXTS, "int8")
    file = tmp_path / "encoder" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = torch.full_like(weights[name], 3e38)  # a number, but not what comes of it
    save_file(weights, file, metadata={"format": "pt"})
    broken = fused(tmp_path / "encoder")
    with pytest.raises(ModelError, match="not finite, in float32 too, for 1 of the texts"):
        broken.encode_rows(["a text"], "int8")
    # The second try is the exact model's: here one with whole weights.
    whole = make_student(llama_dir)
    export_student(whole, tmp_path / "whole", TEXTS)
    broken._exact_model = load_encoder(tmp_path / "whole")._model
    assert np.array_equal(broken.encode_rows(TEXTS, "int8").rows.values, good.rows.values)


@pytest.mark.parametrize(
    ("kind", "pooling", "steps"),
    [
        ("bert", "mean", [Dense(32, 8, bias=False, activation_function=nn.Identity()), Normalize()]),
        ("llama", "mean", []),
        ("llama", "max", [Dense(32, 8, bias=False, activation_function=nn.Identity()), Normalize()]),
        ("llama", "mean", [Dense(32, 8, bias=True, activation_function=nn.Identity()), Normalize()]),
        ("llama", "mean", [Dense(32, 8, bias=False, activation_function=nn.Tanh()), Normalize()]),
    ],
)
def test_other_forms_end_in_the_same_steps_one_by_one(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, kind: str, pooling: str, steps: list[nn.Module]
) -> None:
    folder = make_folder(kind, wrapped(small_vocabulary, pad_token="<pad>"), pooling, steps)
    plain, gpu = load_encoder(folder), fused(folder)
    for dtype, step in (("float32", 1e-6), ("bf16", 2**-8), ("int8", 2 / 127)):
        wanted = dequantise(plain.encode_rows(TEXTS, dtype).rows)
        np.testing.assert_allclose(dequantise(gpu.encode_rows(TEXTS, dtype).rows), wanted, atol=step)
    np.testing.assert_allclose(gpu.encode(TEXTS), plain.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
def test_finished_rows_are_quantised_ones_and_say_what_is_not_finite(dtype: VectorDtype) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    vectors[3], vectors[4, 5], vectors[5, 0], vectors[6] = 0, np.nan, -np.inf, 3e38
    rows = finished_rows(torch.from_numpy(vectors), dtype).numpy()
    bad = [4, 5, 6]  # the norm of the last one overflows
    assert np.flatnonzero(~are_finite(rows)).tolist() == bad
    good = np.delete(np.arange(50), bad)
    unit = vectors[good] / np.maximum(np.linalg.norm(vectors[good], axis=1, keepdims=True), 1e-12)
    wanted = dequantise(quantise(unit, dtype))
    np.testing.assert_allclose(
        dequantise(VectorRows(rows[good], dtype)), wanted, atol=2 / 127 if dtype == "int8" else 2**-8
    )
    assert not rows[3].any()


def test_rows_that_the_kernel_cannot_hold_are_made_step_by_step(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Dense(32, 1100, bias=False, activation_function=nn.Identity()), Normalize()]
    folder = make_folder("llama", wrapped(small_vocabulary, pad_token="<pad>"), "mean", steps)
    monkeypatch.setattr("flipkd.models.gpu_rows.pool_project", None)
    found = fused(folder).encode_rows(TEXTS, "float32").rows.values
    np.testing.assert_allclose(found, load_encoder(folder).encode_rows(TEXTS, "float32").rows.values, atol=1e-5)
