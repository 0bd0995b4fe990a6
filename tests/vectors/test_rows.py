"""Rounding to bf16 and int8, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flipkd.errors import ConfigError
from flipkd.vectors.rows import DTYPES, VectorRows, quantise
from tests.vectors.dequantise import dequantise


def unit_rows(rows: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(max_examples=50)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_bf16_rounds_as_pytorch_does(numbers: list[float]) -> None:
    row = np.array([numbers], np.float64)
    row = (row / np.maximum(np.linalg.norm(row), 1e-300)).astype(np.float32)
    want = torch.from_numpy(row).to(torch.bfloat16)
    got = quantise(row, "bf16")
    np.testing.assert_array_equal(got.values, want.view(torch.uint16).numpy())
    np.testing.assert_array_equal(dequantise(got), want.float().numpy())


@settings(max_examples=50)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40).filter(any),
    st.sampled_from([1.0, 1e-3, 1e-30, 1e-40]),
)
def test_int8_keeps_the_direction(numbers: list[float], size: float) -> None:
    row = np.array([numbers], np.float64) * size
    got = quantise(row.astype(np.float32), "int8")
    stored = row.astype(np.float32).astype(np.float64)
    if not stored.any():
        assert not got.values.any()
        return
    assert np.abs(got.values.astype(int)).max() == 127
    error = np.abs(got.values / 127 - stored / np.abs(stored).max())
    assert error.max() <= 0.5 / 127 + 1e-6
    np.testing.assert_allclose(np.linalg.norm(dequantise(got)), 1.0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_stands_alone(dtype: str) -> None:
    """More rows than a block, and any row by itself gives the same bits."""
    vectors = unit_rows(10_000, 12)
    whole = quantise(vectors, dtype).values
    for place in (0, 4095, 4096, 9999):
        assert quantise(vectors[place : place + 1], dtype).values.tobytes() == whole[place : place + 1].tobytes()
    assert quantise(vectors[::2], dtype).values.tobytes() == whole[::2].tobytes()


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bf16", 4e-3), ("int8", 5e-3)])
def test_error_of_a_row(dtype: str, error: float) -> None:
    vectors = unit_rows(200, 384)
    assert np.abs(dequantise(quantise(vectors, dtype)) - vectors).max() <= error


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_row_and_no_rows(dtype: str) -> None:
    assert not dequantise(quantise(np.zeros((2, 5), np.float32), dtype)).any()
    assert quantise(np.empty((0, 5), np.float32), dtype).values.shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_number_that_is_not_finite_is_refused_by_row(dtype: str, bad: float) -> None:
    vectors = unit_rows(5000, 3)
    vectors[4500, 1] = bad
    with pytest.raises(ValueError, match="row 4500 "):
        quantise(vectors, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("length", [2.0, 0.5, 1e-30])
def test_a_row_that_is_not_of_unit_length_is_refused(dtype: str, length: float) -> None:
    """Scores came out as 1.0: longer dot products are cut there."""
    vectors = unit_rows(5000, 3)
    vectors[4500] *= np.float32(length)
    with pytest.raises(ValueError, match=rf"row 4500 of the vectors has length {length:.3g}, not 1"):
        quantise(vectors, dtype)
    quantise(vectors, "int8")


def test_what_is_no_array_is_told_how_to_become_one() -> None:
    for vectors in ([[1.0, 0.0]], torch.eye(2)):
        with pytest.raises(TypeError, match="must be a NumPy array, not of type"):
            quantise(vectors, "float32")  # type: ignore[arg-type]


def test_rows_say_what_they_are() -> None:
    rows = quantise(unit_rows(7, 5), "int8")
    assert (len(rows), rows.dim, rows.dtype) == (7, 5, "int8")
    with pytest.raises(ConfigError, match="'int4' is not one of float32, bf16, int8"):
        quantise(unit_rows(1, 2), "int4")
    with pytest.raises(ValueError, match="held as uint16"):
        VectorRows(np.zeros((2, 2), np.float32), "bf16")
    with pytest.raises(ValueError, match="C-contiguous"):
        VectorRows(np.zeros((4, 4), np.int8)[:, ::2], "int8")
    with pytest.raises(ValueError, match="dim >= 1"):
        VectorRows(np.zeros((4, 0), np.int8), "int8")
    with pytest.raises(ValueError, match="float32"):
        quantise(np.zeros((4, 2)), "int8")
