"""Calibrations: monotone, inside 0 and 1, better than none, chosen by what they say of pairs they have not seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flipkd.data.calibration import Knots, Sigmoid, probabilities
from flipkd.report.calibrate import (
    calibration_error,
    fit_calibration,
    fit_isotonic,
    fit_platt,
    reliability,
)
from tests.report.conftest import labelled, random_pairs

ROWS = st.lists(
    st.tuples(st.floats(-1, 1, width=32), st.booleans(), st.floats(0, 100)), min_size=4, max_size=40
).filter(lambda rows: all(sum(weight for _, label, weight in rows if label == kind) > 0.1 for kind in (True, False)))


@given(ROWS)
def test_a_calibration_never_falls_and_stays_in_range(rows: list[tuple[float, bool, float]]) -> None:
    score, label, weight = (np.array(values) for values in zip(*rows, strict=True))
    score = score.astype(np.float32)
    grid = np.linspace(-1.5, 1.5, 61).astype(np.float32)
    for fit in (fit_platt, fit_isotonic):
        calibration = fit(score, label, weight)
        if calibration is not None:
            found = probabilities(calibration, grid)
            assert np.all((found >= 0) & (found <= 1))
            assert np.all(np.diff(found) >= 0)
    fitted = fit_calibration(labelled(score, label, weight), seed=0)
    if fitted is not None:
        assert np.all((fitted.held_out >= 0) & (fitted.held_out <= 1))


def test_platt_finds_the_curve_that_made_the_labels() -> None:
    generator = np.random.default_rng(0)
    score = generator.uniform(-0.2, 1, 20_000).astype(np.float32)
    label = generator.random(20_000) < 1 / (1 + np.exp(-(10 * score - 5)))
    found = fit_platt(score, label, np.ones(20_000))
    assert isinstance(found, Sigmoid)
    assert found.slope == pytest.approx(10, rel=0.05)
    assert found.intercept == pytest.approx(-5, rel=0.05)


@pytest.mark.filterwarnings("error")
def test_a_pair_of_next_to_no_weight_is_none() -> None:
    """The only other score: standardised it was 1e150, the solver gave up and said 0.5."""
    score, weight = np.array([0.6, 0.9, 0.9, 0.9], np.float32), np.array([1e-300, 90.0, 6.0, 3.0])
    found = fit_platt(score, np.array([False, True, False, True]), weight)
    assert found is not None
    assert found.slope == 0
    assert probabilities(found, [0.9])[0] == pytest.approx(0.65, abs=0.01)


def test_isotonic_is_chosen_where_no_sigmoid_fits_and_platt_where_pairs_are_few() -> None:
    generator = np.random.default_rng(0)
    score = generator.uniform(0, 1, 8_000).astype(np.float32)
    label = generator.random(8_000) < np.where(score < 0.3, 0.05, np.where(score < 0.9, 0.5, 0.95))
    fitted = fit_calibration(labelled(score, label), seed=0)
    assert fitted is not None
    assert fitted.method == "isotonic"
    assert isinstance(fitted.calibration, Knots)
    assert fitted.quality["isotonic"]["log_loss"] < fitted.quality["platt"]["log_loss"]
    few = fit_calibration(random_pairs(60), seed=0)
    assert few is not None
    assert few.method == "platt"
    assert few.quality["platt"]["log_loss"] < few.quality["no_calibration"]["log_loss"]


def test_classes_that_are_apart_give_no_certainty() -> None:
    pairs = labelled([0.1] * 8 + [0.9] * 8, [0] * 8 + [1] * 8)
    for fit in (fit_platt, fit_isotonic):
        calibration = fit(pairs.score, pairs.label, pairs.weight)
        assert calibration is not None
        np.testing.assert_allclose(probabilities(calibration, [0.1, 0.9]), [0.1, 0.9], atol=0.02)


def test_backward_scores_and_single_pairs() -> None:
    backward = labelled([0.9] * 50 + [0.1] * 50, [0] * 50 + [1] * 50)
    assert fit_platt(backward.score, backward.label, backward.weight) is None
    isotonic = fit_isotonic(backward.score, backward.label, backward.weight)
    assert isotonic is not None
    assert np.ptp(probabilities(isotonic, [-1, 0.1, 0.9, 1])) == 0  # one probability for all
    assert fit_calibration(backward, seed=0) is None
    assert fit_calibration(labelled([0.9, 0.1, 0.2], [1, 0, 0]), seed=0) is None
    constant = fit_platt(np.full(10, 0.5, np.float32), np.arange(10) < 3, np.ones(10))
    assert constant is not None
    assert probabilities(constant, [0.5])[0] == pytest.approx(0.33, abs=0.05)


@pytest.mark.parametrize("scores", ["backward", "one", "random"])
@pytest.mark.parametrize("pairs", [20, 200, 2000])
def test_scores_that_tell_nothing_get_no_calibration(scores: str, pairs: int) -> None:
    generator = np.random.default_rng(1)
    label = np.arange(pairs) % 3 == 0
    noise = generator.normal(size=pairs)
    score = {"backward": noise - 2 * label, "one": np.full(pairs, 0.5), "random": noise}[scores]
    assert fit_calibration(labelled(score, label), seed=0) is None


@given(ROWS)
def test_a_calibration_says_more_than_the_share_of_matches(rows: list[tuple[float, bool, float]]) -> None:
    score, label, weight = (np.array(values) for values in zip(*rows, strict=True))
    fitted = fit_calibration(labelled(score, label, weight), seed=0)
    if fitted is not None:
        assert fitted.quality[fitted.method]["log_loss"] < fitted.quality["no_calibration"]["log_loss"]


def test_a_weight_is_that_many_pairs() -> None:
    pairs = random_pairs(80)
    times = np.arange(80) % 4 + 1
    more = labelled(np.repeat(pairs.score, times), np.repeat(pairs.label, times))
    weighted, repeated = (
        fit_isotonic(pairs.score, pairs.label, times.astype(float)),
        fit_isotonic(more.score, more.label, more.weight),
    )
    assert weighted is not None
    assert repeated is not None
    # The smoothing knows that 80 pairs are fewer than 200; between its bounds the curves are one.
    grid = np.linspace(0.3, 0.6, 20)
    np.testing.assert_allclose(probabilities(weighted, grid), probabilities(repeated, grid), atol=0.02)


def test_reliability_by_hand() -> None:
    rows = reliability([0.05, 0.05, 0.95, 1.0], np.array([False, True, True, True]), np.array([3.0, 1.0, 1.0, 1.0]))
    assert [row["pairs"] for row in rows] == [2, 2]
    assert rows[0]["share_of_matches"] == pytest.approx(0.25)
    assert rows[1]["probability"] == pytest.approx(0.975)
    assert calibration_error(rows) == pytest.approx((4 * 0.2 + 2 * 0.025) / 6)
    assert not math.isnan(calibration_error(rows))
