"""Metrics and thresholds against scikit-learn, hand-made values, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from flipkd.report.metrics import (
    Ranked,
    average_precision,
    bootstrap,
    measured,
    precision_at_recall,
    recall_at_precision,
    roc_auc,
    summary,
)
from flipkd.report.thresholds import ThresholdChoice, between
from tests.report.conftest import labelled, random_pairs

FOUR = st.tuples(st.integers(0, 5), st.booleans(), st.integers(1, 4))


@given(st.lists(FOUR, min_size=2, max_size=30).filter(lambda rows: len({row[1] for row in rows}) == 2))
def test_every_figure_is_scikit_learns_with_ties_and_weights(rows: list[tuple[int, bool, int]]) -> None:
    score, label, weight = (np.array(values) for values in zip(*rows, strict=True))
    curve = Ranked(score, label).curve(weight.astype(float))
    assert roc_auc(curve) == pytest.approx(roc_auc_score(label, score, sample_weight=weight))
    assert average_precision(curve) == pytest.approx(average_precision_score(label, score, sample_weight=weight))
    precision, recall, thresholds = precision_recall_curve(label, score, sample_weight=weight)
    f1 = [f1_score(label, score >= threshold, sample_weight=weight) for threshold in thresholds]
    assert curve.f1.max() == pytest.approx(max(f1))
    for level in (0.3, 0.5, 0.9, 1.0):
        assert precision_at_recall(curve, level) == pytest.approx(precision[:-1][recall[:-1] >= level - 1e-12].max())
        reached = recall[:-1][precision[:-1] >= level - 1e-12]
        assert recall_at_precision(curve, level) == pytest.approx(reached.max(initial=0.0))


def test_an_integer_weight_is_that_many_pairs() -> None:
    score, label, weight = [0.9, 0.5, 0.5, 0.1], [True, False, True, False], [1, 3, 2, 1]
    repeated = summary(Ranked(np.repeat(score, weight), np.repeat(label, weight)).curve(np.ones(7)))
    assert summary(Ranked(score, np.array(label)).curve(np.array(weight, float))) == pytest.approx(repeated)


def test_hand_made_values() -> None:
    # Thresholds 0.9: 1 of 1; 0.8: 2 of 2; 0.7: 2 of 3; 0.6: 3 of 4.
    found = measured(labelled([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]), 20, np.random.default_rng(0))["metrics"]
    assert found["roc_auc"]["value"] == pytest.approx(2 / 3)
    assert found["average_precision"]["value"] == pytest.approx(1 / 3 + 1 / 3 + 0.75 / 3)
    assert found["best_f1"]["value"] == pytest.approx(6 / 7)
    assert found["best_f1"]["threshold"] == pytest.approx(0.6)
    assert found["precision_at_recall_0.9"]["value"] == pytest.approx(0.75)
    assert found["recall_at_precision_0.99"]["value"] == pytest.approx(2 / 3)


def test_all_scores_equal_is_chance() -> None:
    found = measured(labelled([0.5] * 10, [1] * 4 + [0] * 6), 50, np.random.default_rng(0))["metrics"]
    assert found["roc_auc"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["average_precision"]["value"] == pytest.approx(0.4)
    assert found["average_precision"]["low"] < 0.4 < found["average_precision"]["high"]


def test_a_class_of_one_pair_still_gives_figures() -> None:
    found = measured(labelled([0.9, 0.5, 0.4], [1, 0, 0]), 200, np.random.default_rng(0))
    assert found["metrics"]["roc_auc"]["value"] == 1.0
    assert 0 < found["bootstrap_resamples"] < 200  # resamples without the match are left out


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = {"roc_auc": 0, "average_precision": 0}
    truth = summary(_curve(200_000, 12345))
    for seed in range(80):
        pairs = labelled(*_draw(300, seed))
        found, _ = bootstrap(pairs, summary, 200, np.random.default_rng(seed))
        for name in inside:
            inside[name] += found[name][0] <= truth[name] <= found[name][1]
    assert all(70 <= hits <= 80 for hits in inside.values()), inside


def test_a_seed_gives_the_same_intervals() -> None:
    pairs = random_pairs()
    once, again, other = (bootstrap(pairs, summary, 30, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_resampling_stays_inside_strata() -> None:
    # Each stratum is of one class: resampled inside, the two weights of the classes never change.
    pairs = labelled([0.1, 0.2, 0.8, 0.9, 0.7], [0, 0, 1, 1, 1], stratum=[0, 0, 1, 1, 1])
    seen = []
    _, used = bootstrap(
        pairs, lambda curve: seen.append((curve.true_positives[-1], curve.false_positives[-1])) or {}, 50,
        np.random.default_rng(0),
    )  # fmt: skip
    assert used == 50
    assert set(seen) == {(3.0, 2.0)}


def _draw(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    label = generator.random(rows) < 0.3
    return generator.normal(np.where(label, 0.7, 0.4), 0.2), label


def _curve(rows: int, seed: int):
    score, label = _draw(rows, seed)
    return Ranked(score, label).curve(np.ones(rows))


def test_threshold_for_a_precision() -> None:
    # 0.9: 40 of 40; 0.8: 80 of 82; 0.7: 90 of 112.
    score = [0.9] * 40 + [0.8] * 42 + [0.7] * 30
    label = [1] * 40 + [1] * 40 + [0] * 2 + [1] * 10 + [0] * 20
    choice = ThresholdChoice(np.array(score, np.float32), labelled(score, label))
    found = choice.for_precision(0.97)
    assert found["estimate"]["threshold"] == pytest.approx(0.75)
    assert found["estimate"]["precision"] == pytest.approx(80 / 82)
    assert found["estimate"]["recall"] == pytest.approx(80 / 90)
    assert found["cautious"] is None  # 40 of 40 is at least 0.928 in 95 of 100 cases
    assert choice.for_precision(0.92)["cautious"]["threshold"] == pytest.approx(0.75)
    assert choice.least_precision()[0] == pytest.approx(0.05 ** (1 / 40))
    assert choice.for_precision(1.0)["estimate"]["true_matches"] == 40


def test_no_threshold_for_a_precision_adds_false_matches_alone() -> None:
    # All 95 matches stand above 105 others: 0.9 is reached down to the 105th pair, and so is the bound a little higher.
    score, label = np.linspace(1, 0, 200).astype(np.float32), [1] * 95 + [0] * 105
    for found in ThresholdChoice(score, labelled(score, label)).for_precision(0.9).values():
        assert (found["true_matches"], found["false_matches"], found["recall"]) == (95, 0, 1)


@given(
    st.lists(FOUR, min_size=2, max_size=30).filter(lambda rows: len({row[1] for row in rows}) == 2),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_the_threshold_for_a_precision_has_most_recall_and_then_most_precision(
    rows: list[tuple[int, bool, int]], wanted: float
) -> None:
    score, label, weight = (np.array(values) for values in zip(*rows, strict=True))
    choice = ThresholdChoice(score, labelled(score, label, weight))
    reached = {"estimate": choice.curve.precision, "cautious": choice.least_precision()}
    for name, found in choice.for_precision(wanted).items():
        good = (reached[name] >= wanted - 1e-12) & (choice.curve.true_positives > 0)
        assert (found is None) == (not good.any())
        if found is not None:
            best = max(zip(choice.curve.recall[good], choice.curve.precision[good], strict=True))
            assert (found["recall"], found["precision"]) == best


def test_the_lower_bound_holds_in_95_of_100_cases() -> None:
    above = 0
    for seed in range(400):
        label = np.random.default_rng(seed).random(150) < 0.9
        label[0], score = True, np.full(151, 0.9, np.float32)
        choice = ThresholdChoice(
            np.append(score[:150], 0.1).astype(np.float32), labelled(score, np.append(label, False))
        )
        above += choice.least_precision()[0] > 0.9
    assert 4 <= above <= 28  # 20 expected, and the bound is on the safe side


def test_threshold_of_least_cost() -> None:
    score, label = [0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 1, 1, 0]
    cheap = ThresholdChoice(score, labelled(score, label)).for_cost_ratio(0.5)
    assert cheap["threshold"] == pytest.approx(0.55)
    assert cheap["cost"] == 0.5
    dear = ThresholdChoice(score, labelled(score, label)).for_cost_ratio(10)
    assert dear["threshold"] == pytest.approx(0.85)
    assert dear["cost"] == 2
    never = ThresholdChoice([0.9, 0.5], labelled([0.9, 0.5], [0, 1])).for_cost_ratio(10)
    assert never == {"threshold": None, "cost": 1.0}


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20, unique=True), st.data())
def test_a_threshold_takes_just_its_pairs_in_float32(values: list[float], data: st.DataObject) -> None:
    descending = np.array(sorted(values, reverse=True))
    place = data.draw(st.integers(0, len(values) - 1))
    assert np.count_nonzero(descending.astype(np.float32) >= between(descending, place)) == place + 1
