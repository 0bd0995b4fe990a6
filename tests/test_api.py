"""The names that ``import flipkd`` offers, used as the README shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flipkd


def test_every_public_name_is_there() -> None:
    for name in flipkd.__all__:
        assert getattr(flipkd, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = flipkd.nothing


def test_texts_to_scores_in_memory(minilm_dir: Path) -> None:
    encoder = flipkd.load_encoder(minilm_dir)
    vectors = encoder.encode(["acute kidney failure", "renal failure, acute", "fracture of the left wrist"])
    assert vectors.shape == (3, encoder.dim)
    scores = flipkd.score_pairs(vectors, [0, 0, 0], [1, 2, 0])
    np.testing.assert_allclose(scores, [vectors[0] @ vectors[1], vectors[0] @ vectors[2], 1.0], atol=1e-6)
    assert scores[0] > scores[1]
    small = flipkd.score_pairs(flipkd.quantise(vectors, "int8"), [0, 0, 0], [1, 2, 0])
    np.testing.assert_allclose(small, scores, atol=5e-3)


def test_plain_numbers_are_scaled_and_bad_rows_are_named() -> None:
    scores = flipkd.score_pairs([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], [0, 0, 0, -1], [0, 1, 2, 1])
    np.testing.assert_allclose(scores[:3], [1.0, 0.8, 0.0], atol=1e-6)
    assert np.isnan(scores[3])
    others = flipkd.score_pairs([[1.0, 0.0]], [0], [1], right_vectors=[[0.0, 1.0], [1.0, 0.0]])
    assert others.tolist() == [1.0]
    with pytest.raises(IndexError):
        flipkd.score_pairs([[1.0]], [0], [1])
    with pytest.raises(ValueError, match="integers"):
        flipkd.score_pairs([[1.0]], [0.5], [0])
