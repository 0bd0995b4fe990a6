"""Metrics of weighted, labelled scores, with bootstrap confidence intervals.

A pair is taken for a match when its score is at least the threshold; pairs of one score are taken together. ROC AUC and
average precision are those of scikit-learn (the tests compare). The bootstrap draws pairs with replacement in each
stratum, one fewer than it has and weighted up to make up for it (Rao and Wu: small strata would seem too certain), and
takes percentiles. Since the order of the scores stays, a resample is new weights and two running sums.
Pairs count as independent of one another: many pairs of one record make the intervals too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.report.labels import Floats
from flipkd.report.pairs import LabelledPairs

# Levels that are reported; our choice.
RECALLS = (0.5, 0.8, 0.9, 0.95)
PRECISIONS = (0.9, 0.95, 0.99)
CURVE_RECALLS = tuple(round(0.05 * step, 2) for step in range(1, 21))
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Curve:
    """Counts at each of T distinct scores taken as threshold, highest first.

    Args:
        threshold: [T] strictly decreasing.
        true_positives: [T] weight of the matches with at least this score; never decreases.
        false_positives: [T] weight of the others.
    """

    threshold: Floats
    true_positives: Floats
    false_positives: Floats

    @property
    def precision(self) -> Floats:
        """[T]; 1 where nothing has weight."""
        found = self.true_positives + self.false_positives
        return np.divide(self.true_positives, found, out=np.ones_like(found), where=found > 0)

    @property
    def recall(self) -> Floats:
        """[T]; 0 where there is no match at all."""
        recall: Floats = self.true_positives / max(self.true_positives[-1], np.finfo(float).tiny)
        return recall

    @property
    def f1(self) -> Floats:
        """[T]."""
        total = self.true_positives + self.false_positives + self.true_positives[-1]
        f1: Floats = 2 * self.true_positives / np.maximum(total, np.finfo(float).tiny)
        return f1


class Ranked:
    """Pairs in order of their scores, so that many weightings share one sorting.

    Args:
        score: [N], N at least 1.
        label: [N] bool.
    """

    def __init__(self, score: npt.ArrayLike, label: npt.NDArray[np.bool_]) -> None:
        values = np.asarray(score, np.float64)
        self.order = np.argsort(-values, kind="stable")
        ranked = values[self.order]
        self._ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # last of each group of equal scores
        self._threshold = ranked[self._ends]
        self._label = label[self.order].astype(np.float64)

    def curve(self, weight: Floats) -> Curve:
        """The counts for one weighting, [N] in the order that the pairs were given."""
        ranked = weight[self.order]
        matches = ranked * self._label
        return Curve(self._threshold, np.cumsum(matches)[self._ends], np.cumsum(ranked - matches)[self._ends])


def roc_auc(curve: Curve) -> float:
    """Share of (match, other) pairs in the right order, ties half: the area under the ROC curve."""
    positives, negatives = curve.true_positives[-1], curve.false_positives[-1]
    area = np.trapezoid(np.append(0.0, curve.true_positives), np.append(0.0, curve.false_positives))
    return float(area / (positives * negatives))


def average_precision(curve: Curve) -> float:
    """Precision at each threshold, weighted by the recall it adds."""
    return float(np.sum(np.diff(curve.recall, prepend=0.0) * curve.precision))


def precision_at_recall(curve: Curve, recall: float) -> float:
    """The best precision of all thresholds with at least this recall."""
    return float(curve.precision[curve.recall >= recall - 1e-12].max(initial=0.0))


def recall_at_precision(curve: Curve, precision: float) -> float:
    """The best recall of all thresholds with at least this precision; 0 where there is none."""
    return float(curve.recall[curve.precision >= precision - 1e-12].max(initial=0.0))


def between(descending: Floats, place: int) -> float:
    """A float32 threshold that takes the first ``place + 1`` of strictly decreasing values and no more."""
    upper = np.float32(descending[place])
    if place + 1 == len(descending):
        return float(upper)
    middle = np.float32((descending[place] + descending[place + 1]) / 2)
    return float(middle if np.float32(descending[place + 1]) < middle <= upper else upper)


def summary(curve: Curve) -> dict[str, float]:
    """All single figures by name."""
    found = {"roc_auc": roc_auc(curve), "average_precision": average_precision(curve), "best_f1": float(curve.f1.max())}
    found |= {f"precision_at_recall_{level:g}": precision_at_recall(curve, level) for level in RECALLS}
    found |= {f"recall_at_precision_{level:g}": recall_at_precision(curve, level) for level in PRECISIONS}
    return found


def figure_names() -> list[str]:
    """Names of all figures that ``summary`` gives."""
    return list(summary(Ranked([1.0, 0.0], np.array([True, False])).curve(np.ones(2))))


def curve_points(curve: Curve) -> dict[str, float]:
    """Precision at the highest threshold that reaches each recall of ``CURVE_RECALLS``, by name."""
    places = np.minimum(np.searchsorted(curve.recall, np.array(CURVE_RECALLS) - 1e-12), len(curve.recall) - 1)
    return {
        f"curve_{level:g}": float(curve.precision[place]) for level, place in zip(CURVE_RECALLS, places, strict=True)
    }


def bootstrap(
    pairs: LabelledPairs,
    statistic: Callable[[Curve], Mapping[str, float]],
    resamples: int,
    generator: np.random.Generator,
) -> tuple[dict[str, tuple[float, float]], int]:
    """Percentile intervals of figures.

    Args:
        pairs: with both classes.
        statistic: named figures of a curve.
        resamples: how many; those that miss a class altogether are left out.
        generator: of random numbers.

    Returns:
        Per name the lower and the upper end, and the number of resamples used.
    """
    ranked = Ranked(pairs.score, pairs.label)
    members = [np.flatnonzero(pairs.stratum == value) for value in np.unique(pairs.stratum)]
    values: dict[str, list[float]] = {}
    used = 0
    for _ in range(resamples):
        times = np.zeros(len(pairs))
        for rows in members:
            draws = max(len(rows) - 1, 1)
            drawn = np.bincount(generator.integers(0, len(rows), draws), minlength=len(rows))
            times[rows] = drawn * (len(rows) / draws)
        curve = ranked.curve(pairs.weight * times)
        if curve.true_positives[-1] <= 0 or curve.false_positives[-1] <= 0:
            continue
        used += 1
        for name, value in statistic(curve).items():
            values.setdefault(name, []).append(value)
    ends = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
    intervals = {name: np.percentile(found, ends) for name, found in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}, used


def measured(pairs: LabelledPairs, resamples: int, generator: np.random.Generator) -> dict[str, Any]:
    """Figures with their intervals, and the precision-recall curve.

    Returns:
        ``metrics``: per name ``value``, ``low``, ``high``; ``best_f1`` also its ``threshold``, ``precision`` and
        ``recall``. ``curve``: ``recall``, ``precision``, ``low``, ``high`` lists. ``bootstrap_resamples``.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    curve = Ranked(pairs.score, pairs.label).curve(pairs.weight)
    values, points = summary(curve), curve_points(curve)
    values["roc_auc"] = float(roc_auc_score(pairs.label, pairs.score, sample_weight=pairs.weight))
    values["average_precision"] = float(average_precision_score(pairs.label, pairs.score, sample_weight=pairs.weight))
    intervals, used = bootstrap(pairs, lambda one: {**summary(one), **curve_points(one)}, resamples, generator)

    def ends(name: str) -> tuple[float | None, float | None]:
        return intervals.get(name, (None, None))

    metrics: dict[str, dict[str, float | None]] = {
        name: {"value": value, "low": ends(name)[0], "high": ends(name)[1]} for name, value in values.items()
    }
    best = int(np.argmax(curve.f1))
    metrics["best_f1"] |= {
        "threshold": between(curve.threshold, best),
        "precision": float(curve.precision[best]),
        "recall": float(curve.recall[best]),
    }
    band = [ends(name) for name in points]
    return {
        "metrics": metrics,
        "curve": {
            "recall": list(CURVE_RECALLS),
            "precision": list(points.values()),
            "low": [low for low, _ in band],
            "high": [high for _, high in band],
        },
        "bootstrap_resamples": used,
    }
