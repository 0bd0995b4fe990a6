"""Fit a calibration to labelled scores, and choose its form on held-out pairs.

Platt (a sigmoid of the score) needs few pairs; isotonic regression (any curve that never falls) bends to more shapes
and needs more. Both are fitted in turn without each of five parts of the pairs; the form whose probabilities of the
left-out parts have the lower log loss is fitted to all pairs. Targets are smoothed as Platt did, (P + 1) / (P + 2) and
1 / (N + 2) in place of 1 and 0, and isotonic's values are kept between the same two: no probability is 0 or 1 because
few pairs were seen. Number of parts, the choice by log loss and the bounds for isotonic are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flipkd.data.calibration import Calibration, Knots, Sigmoid, probabilities
from flipkd.report.labels import Floats
from flipkd.report.pairs import LabelledPairs

_PARTS = 5
_BINS = 10


@dataclass(frozen=True, eq=False)
class Fitted:
    """A calibration of N pairs.

    Args:
        method: ``platt`` or ``isotonic``.
        calibration: fitted to all pairs.
        held_out: [N] float32 probability of each pair by the same method, fitted without it.
        quality: per method ``log_loss`` and ``brier`` of its held-out probabilities, and those of ``no_calibration``:
            the share of matches for every pair.
    """

    method: str
    calibration: Calibration
    held_out: npt.NDArray[np.float32]
    quality: dict[str, dict[str, float]]


def fit_calibration(pairs: LabelledPairs, seed: int) -> Fitted | None:
    """Chooses and fits.

    None where a class has fewer than two pairs, or where no curve says more of the pairs than their share of matches
    does: of scores that rank backwards, or at random.
    """
    from sklearn.model_selection import StratifiedKFold

    pairs_used = pairs.weight > 0
    label = pairs.label
    parts = min(_PARTS, int(np.count_nonzero(label & pairs_used)), int(np.count_nonzero(~label & pairs_used)))
    if parts < 2:
        return None
    methods = {"platt": fit_platt, "isotonic": fit_isotonic}
    held_out = {name: np.zeros(len(pairs), np.float32) for name in methods}
    share = np.zeros(len(pairs))
    folds = StratifiedKFold(parts, shuffle=True, random_state=seed)
    for kept, left_out in folds.split(pairs.score[:, None], label):
        part = pairs.take(kept)
        share[left_out] = np.average(_targets(part.label, part.weight), weights=part.weight)
        for name, fit in methods.items():
            calibration = fit(part.score, part.label, part.weight)
            if calibration is None:
                held_out.pop(name, None)
            elif name in held_out:
                held_out[name][left_out] = probabilities(calibration, pairs.score[left_out])
    quality = {name: losses(values, label, pairs.weight) for name, values in held_out.items()}
    quality["no_calibration"] = losses(share, label, pairs.weight)
    useful = [name for name in held_out if quality[name]["log_loss"] < quality["no_calibration"]["log_loss"]]
    for method in sorted(useful, key=lambda name: quality[name]["log_loss"]):
        calibration = methods[method](pairs.score, label, pairs.weight)
        if calibration is not None and not _is_flat(calibration):
            return Fitted(method, calibration, held_out[method], quality)
    return None


def fit_platt(score: npt.NDArray[np.float32], label: npt.NDArray[np.bool_], weight: Floats) -> Sigmoid | None:
    """Logistic regression of smoothed targets on the score; None where the curve would fall."""
    from sklearn.linear_model import LogisticRegression

    target = _targets(label, weight)
    # A soft target t is one pair of each class, with weights t and 1 - t. Scores are standardised for the solver.
    center = float(np.average(score, weights=weight))
    spread = float(np.sqrt(np.average((score - center) ** 2, weights=weight)))
    # One score, but for what float32 does not tell or pairs of next to no weight: standardised, those would be huge and
    # the solver would give up.
    if spread <= np.finfo(np.float32).eps * float(np.abs(score).max()):
        rate = float(np.average(target, weights=weight))
        return Sigmoid(0.0, float(np.log(rate / (1 - rate))))
    standard = ((score.astype(np.float64) - center) / spread)[:, None]
    scaled = weight / weight.mean()
    model = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8)
    model.fit(
        np.concatenate([standard, standard]),
        np.repeat([1, 0], len(score)),
        sample_weight=np.concatenate([scaled * target, scaled * (1 - target)]),
    )
    slope = float(model.coef_[0, 0]) / spread
    return None if slope < 0 else Sigmoid(slope, float(model.intercept_[0]) - slope * center)


def fit_isotonic(score: npt.NDArray[np.float32], label: npt.NDArray[np.bool_], weight: Floats) -> Knots | None:
    """The curve of least squared error that never falls."""
    from sklearn.isotonic import IsotonicRegression

    used = weight > 0
    low, high = _smoothed(label, weight)
    model = IsotonicRegression(y_min=low, y_max=high, out_of_bounds="clip")
    model.fit(score[used].astype(np.float64), label[used].astype(np.float64), sample_weight=weight[used])
    heights = np.maximum.accumulate(np.clip(model.y_thresholds_.astype(np.float64), low, high))
    return Knots(tuple(model.X_thresholds_.astype(float).tolist()), tuple(heights.tolist()))


def _is_flat(calibration: Calibration) -> bool:
    """Whether it gives every score one probability."""
    if isinstance(calibration, Sigmoid):
        return calibration.slope == 0
    return calibration.probabilities[0] == calibration.probabilities[-1]


def _smoothed(label: npt.NDArray[np.bool_], weight: Floats) -> tuple[float, float]:
    """Targets for no match and for a match, by the effective number of pairs of the class."""
    sizes = [float(part.sum() ** 2 / max((part**2).sum(), 1e-300)) for part in (weight[~label], weight[label])]
    return 1 / (sizes[0] + 2), (sizes[1] + 1) / (sizes[1] + 2)


def _targets(label: npt.NDArray[np.bool_], weight: Floats) -> Floats:
    low, high = _smoothed(label, weight)
    return np.where(label, high, low)


def losses(probability: npt.ArrayLike, label: npt.NDArray[np.bool_], weight: Floats) -> dict[str, float]:
    """Log loss and Brier score (mean squared error) of probabilities."""
    from sklearn.metrics import brier_score_loss, log_loss

    values = np.clip(np.asarray(probability, np.float64), 1e-7, 1 - 1e-7)
    return {
        "log_loss": float(log_loss(label, values, sample_weight=weight, labels=[False, True])),
        "brier": float(brier_score_loss(label, values, sample_weight=weight, pos_label=True)),
    }


def reliability(probability: npt.ArrayLike, label: npt.NDArray[np.bool_], weight: Floats) -> list[dict[str, float]]:
    """Pairs in ten equal bins of probability: said and seen share of matches; empty bins are left out."""
    values = np.asarray(probability, np.float64)
    bins = np.minimum((values * _BINS).astype(np.int64), _BINS - 1)
    rows = []
    for number in range(_BINS):
        inside = (bins == number) & (weight > 0)
        if inside.any():
            rows.append(
                {
                    "probability": float(np.average(values[inside], weights=weight[inside])),
                    "share_of_matches": float(np.average(label[inside], weights=weight[inside])),
                    "pairs": int(np.count_nonzero(inside)),
                    "weight": float(weight[inside].sum()),
                }
            )
    return rows


def calibration_error(rows: list[dict[str, float]]) -> float:
    """Mean distance of said from seen over the bins, by weight."""
    gaps = [abs(row["probability"] - row["share_of_matches"]) for row in rows]
    return float(np.average(gaps, weights=[row["weight"] for row in rows]))
