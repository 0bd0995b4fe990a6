"""The names that ``import flipkd`` offers, used as the README shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
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


def test_numbers_at_the_ends_of_their_range() -> None:
    """The square of 1e30 is no float32, so the score was 0; an index past int64 became -1, no row."""
    for size in (1e30, 1e-30):
        scores = flipkd.score_pairs(np.float32(size) * np.ones((2, 4), np.float32), [0], [1])
        np.testing.assert_allclose(scores, [1.0], atol=1e-6)
    with pytest.raises(IndexError, match=r"left_index\[1\]"):
        flipkd.score_pairs([[1.0]], np.array([0, 2**64 - 1], np.uint64), [0, 0])
    assert flipkd.score_pairs([[1.0]], np.zeros(1, np.uint64), np.zeros(1, np.int8)).tolist() == [1.0]


def test_what_is_no_list_of_texts_is_refused(minilm_dir: Path) -> None:
    """One string was taken for a text per letter."""
    encoder = flipkd.load_encoder(minilm_dir)
    with pytest.raises(TypeError, match="not one string"):
        encoder.encode("abc")
    for wrong in (None, 1.5):
        with pytest.raises(TypeError, match="item 1 of the texts is of type"):
            encoder.encode(["a", wrong])  # type: ignore[list-item]
    expected = encoder.encode(["a", "b"])
    for texts in (pa.array(["a", "b"]), pa.chunked_array([["a"], ["b"]]), iter(["a", "b"])):
        np.testing.assert_array_equal(encoder.encode(texts), expected)
