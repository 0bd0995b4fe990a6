"""The stability index against the formula and against chance, and the bins against plain counting."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flipkd.nightly.stability import chance_limit, population_stability_index, relative_change
from flipkd.report.scan import ScoreCounts


def counted(values: Any) -> ScoreCounts:
    counts = ScoreCounts()
    counts.add(np.asarray(values, np.float32))
    return counts


def test_the_index_is_that_of_the_formula() -> None:
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.25, 0.25, 0.5])
    expected = stats.entropy(p, q) + stats.entropy(q, p)  # Kullback-Leibler, both ways
    assert population_stability_index(p * 1e9, q * 1e9) == pytest.approx(expected, rel=1e-6)
    assert population_stability_index(q * 1e9, p * 1e9) == pytest.approx(expected, rel=1e-6)  # the same in both orders
    assert population_stability_index([5, 5], [500, 500]) == pytest.approx(0)
    assert 3 < (population_stability_index([1000, 0], [500, 500]) or 0) < 10  # an empty bin is large, not infinite
    assert population_stability_index([0, 0], [1, 1]) is None


def test_nights_of_one_population_stay_below_the_limit_of_chance_in_19_of_20_cases() -> None:
    generator = np.random.default_rng(0)
    above = 0
    for _ in range(400):
        last, tonight = generator.normal(size=2000), generator.normal(size=3000)
        edges = [-np.inf, *np.quantile(last, np.arange(1, 10) / 10), np.inf]
        bins = np.histogram(tonight, edges)[0], np.histogram(last, edges)[0]
        value, limit = population_stability_index(*bins), chance_limit(*bins)
        assert value is not None
        assert limit is not None
        above += value > limit
    assert 8 <= above <= 36  # 20 expected; less than one in a thousand such tests would miss


def test_a_shift_is_seen() -> None:
    generator = np.random.default_rng(1)
    last = counted(generator.normal(size=20_000))
    edges = last.equal_shares(10)
    found = [
        population_stability_index(counted(generator.normal(shift, size=20_000)).between(edges), last.between(edges))
        for shift in (0, 0.2, 0.5)
    ]
    # The index of two normal distributions of variance 1 over infinitely many bins is the square of the shift.
    assert found == [pytest.approx(expected, abs=0.02) for expected in (0, 0.04, 0.25)]


def test_bins_count_what_plain_counting_counts() -> None:
    generator = np.random.default_rng(2)
    values = np.concatenate([generator.normal(0.3, 0.4, 5000), np.zeros(700), np.full(300, 1.0)]).astype(np.float32)
    parts = [counted(part) for part in np.array_split(values, 7)]
    counts = ScoreCounts()
    for part in parts:
        counts.add_counts(part)
    edges = counts.equal_shares(10)
    assert np.all(np.diff(edges) > 0)
    bounds = [-np.inf, *edges.tolist(), np.inf]
    plain = [int(np.sum((values >= low) & (values < high))) for low, high in pairwise(bounds)]
    assert counts.between(edges).tolist() == plain
    assert counts.between([float(edge) for edge in edges]).tolist() == plain  # as a JSON file keeps them
    assert max(plain) < 800  # the heavy value has a step of its own
    assert (counts.smallest, counts.largest) == (float(values.min()), float(values.max()))


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 1.0])
def test_one_score_for_all_still_shows_a_change(value: float) -> None:
    last = counted(np.full(1000, value))
    edges = last.equal_shares(10)
    assert last.between(edges).tolist() == [0, 1000, 0]
    moved = counted(np.full(1000, value + 0.01))
    assert (population_stability_index(moved.between(edges), last.between(edges)) or 0) > 5


def test_no_scores_have_one_step() -> None:
    counts = ScoreCounts()
    assert counts.equal_shares(10).tolist() == []
    assert counts.between([]).tolist() == [0]


def test_changes() -> None:
    assert relative_change(120, 100) == pytest.approx(0.2)
    assert relative_change(0, 0) == 0
    assert relative_change(1, 0) is None
