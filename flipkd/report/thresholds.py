"""Thresholds: for a wanted precision, for the least cost, and a table of some in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.report.labels import Floats
from flipkd.report.metrics import CONFIDENCE, Curve, Ranked, between
from flipkd.report.pairs import LabelledPairs

# Recalls of the table's rows; our choice.
_TABLE_RECALLS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)


class ThresholdChoice:
    """Chooses among the scores (or probabilities) of labelled pairs.

    An interval of precision or recall is Clopper and Pearson's for the effective number of pairs,
    (sum w)^2 / (sum w^2): exact without weights, an approximation with them. It knows nothing of the choice itself: a
    threshold that was chosen for its precision on these pairs looks a little better than it is.

    Args:
        value: [N] what ``score --threshold`` compares.
        pairs: N pairs with both classes.
    """

    def __init__(self, value: npt.ArrayLike, pairs: LabelledPairs) -> None:
        ranked = Ranked(value, pairs.label)
        self.curve: Curve = ranked.curve(pairs.weight)
        squares = ranked.curve(pairs.weight**2)
        found, found_squares = self._sums(self.curve), self._sums(squares)
        self._found_size = found**2 / np.maximum(found_squares, np.finfo(float).tiny)
        positives, positive_squares = self.curve.true_positives[-1], squares.true_positives[-1]
        self._positive_size = float(positives**2 / max(positive_squares, np.finfo(float).tiny))

    @staticmethod
    def _sums(curve: Curve) -> Floats:
        return curve.true_positives + curve.false_positives

    def least_precision(self) -> Floats:
        """[T] one-sided lower bound of each threshold's precision: true in 95 of 100 cases."""
        return _lower(self.curve.precision, self._found_size, CONFIDENCE)

    def for_precision(self, wanted: float) -> dict[str, Any]:
        """``estimate``: of the thresholds whose precision is at least this, the one with most recall, and of several
        the strictest. ``cautious``: the same for the lower bound. None where there is none."""
        reached = {"estimate": self.curve.precision, "cautious": self.least_precision()}
        found: dict[str, Any] = {}
        for name, values in reached.items():
            places = np.flatnonzero((values >= wanted - 1e-12) & (self.curve.true_positives > 0))
            # The first of those with most matches: what follows it adds pairs that do not match, and nothing else.
            best = np.argmax(self.curve.true_positives[places]) if len(places) else None
            found[name] = None if best is None else self.row(int(places[best]))
        return found

    def for_cost_ratio(self, ratio: float) -> dict[str, Any]:
        """The threshold of least cost where a false match costs ``ratio`` missed ones; ``threshold`` is infinite, as
        None, where it is cheapest to match nothing."""
        missed = self.curve.true_positives[-1] - self.curve.true_positives
        cost = ratio * self.curve.false_positives + missed
        place = int(np.argmin(cost))
        if cost[place] > self.curve.true_positives[-1]:
            return {"threshold": None, "cost": float(self.curve.true_positives[-1])}
        return {**self.row(place), "cost": float(cost[place])}

    def best_f1(self) -> dict[str, Any]:
        """The threshold of the best F1."""
        return self.row(int(np.argmax(self.curve.f1)))

    def table(self) -> list[dict[str, Any]]:
        """The strictest threshold for each of a range of recalls; ``for_recall`` says which."""
        places = np.searchsorted(self.curve.recall, np.array(_TABLE_RECALLS) - 1e-12)
        places = np.minimum(places, len(self.curve.recall) - 1)
        rows = zip(_TABLE_RECALLS, places.tolist(), strict=True)
        return [{"for_recall": recall, **self.row(place)} for recall, place in rows]

    def row(self, place: int) -> dict[str, Any]:
        """One threshold: halfway to the next lower value, so that rounding turns no pair over."""
        curve = self.curve
        precision, recall = float(curve.precision[place]), float(curve.recall[place])
        return {
            "threshold": between(curve.threshold, place),
            "precision": precision,
            "precision_low": _interval(precision, float(self._found_size[place]))[0],
            "precision_high": _interval(precision, float(self._found_size[place]))[1],
            "precision_lower_bound": float(_lower(np.array([precision]), self._found_size[[place]], CONFIDENCE)[0]),
            "recall": recall,
            "recall_low": _interval(recall, self._positive_size)[0],
            "recall_high": _interval(recall, self._positive_size)[1],
            "f1": float(curve.f1[place]),
            "true_matches": float(curve.true_positives[place]),
            "false_matches": float(curve.false_positives[place]),
        }


def add_run_counts(rows: list[dict[str, Any]], at_least: Callable[[float], int]) -> None:
    """Adds to each row how many pairs of the whole run reach its threshold."""
    for row in rows:
        row["pairs_in_run"] = at_least(row["threshold"])


def _lower(share: Floats, size: Floats, confidence: float) -> Floats:
    """[T] one-sided lower bound of a share that was seen in ``size`` draws; 0 where it is 0."""
    from scipy.stats import beta

    hits, misses = share * size, (1 - share) * size
    with np.errstate(invalid="ignore"):
        bound = beta.ppf(1 - confidence, hits, misses + 1)
    return np.where(hits > 0, np.nan_to_num(bound), 0.0)


def _interval(share: float, size: float) -> tuple[float, float]:
    from scipy.stats import beta

    tail = (1 - CONFIDENCE) / 2
    hits, misses = share * size, (1 - share) * size
    low = 0.0 if hits <= 0 else float(beta.ppf(tail, hits, misses + 1))
    high = 1.0 if misses <= 0 else float(beta.ppf(1 - tail, hits + 1, misses))
    return low, high
