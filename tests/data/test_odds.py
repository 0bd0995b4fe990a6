"""The sigmoid that all probabilities come from."""

from __future__ import annotations

import math

import numpy as np

from flipkd.data.odds import sigmoid


def test_sigmoid_is_its_equation_and_does_not_overflow() -> None:
    values = np.array([-np.inf, -1e4, -710.0, -3.0, 0.0, 3.0, 710.0, np.inf, np.nan])
    with np.errstate(all="raise"):
        found = sigmoid(values)
    assert found.dtype == np.float64
    expected = [0, 0, 0, 1 / (1 + math.exp(3)), 0.5, 1 / (1 + math.exp(-3)), 1, 1, math.nan]
    np.testing.assert_array_equal(found.astype(np.float32), np.array(expected, np.float32))


def test_sigmoid_has_the_bits_of_the_plain_formula() -> None:
    """Scores of older runs are compared bit by bit with new ones."""
    values = np.random.default_rng(0).normal(scale=8, size=100_000)
    np.testing.assert_array_equal(sigmoid(values), 1 / (1 + np.exp(-values)))
