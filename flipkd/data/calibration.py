"""Calibration: a score to the probability of a match; a JSON file that ``evaluate`` writes and ``score`` applies.

Two forms, told apart by their keys; other keys say where the file is from::

    {"slope": a, "intercept": b}                probability = 1 / (1 + exp(-(a * score + b)))          (Platt)
    {"scores": [...], "probabilities": [...]}   straight lines between these points, flat outside them (isotonic)

With ``encoder_fingerprint`` the file holds for scores of that encoder alone. ``score_column`` says what was evaluated:
a curve of another column than ``score`` would give wrong probabilities, and no encoder's fingerprint tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.data.json_files import parse_object, read_option_file
from flipkd.data.odds import sigmoid
from flipkd.errors import ConfigError

SCORE_COLUMN = "score_column"  # key of the file: the column that the curve was fitted to
# Slope and intercept are float32 in the kernel; far inside its range, so that neither can become infinite there.
_LARGEST = 1e30


@dataclass(frozen=True)
class Sigmoid:
    """probability = 1 / (1 + exp(-(slope * score + intercept))); what the kernel computes by itself."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class Knots:
    """Straight lines between K points, flat before the first and after the last.

    Args:
        scores: [K] strictly increasing.
        probabilities: [K] in 0..1, never decreasing.
    """

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]


Calibration = Sigmoid | Knots


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration, and the fingerprint of the encoder whose scores it was fitted to, where that is known."""

    calibration: Calibration
    encoder_fingerprint: str | None


def kernel_arguments(calibration: Calibration | None) -> tuple[float, float] | None:
    """Slope and intercept for the kernel; None where the kernel gives scores alone."""
    return (calibration.slope, calibration.intercept) if isinstance(calibration, Sigmoid) else None


def probabilities(calibration: Calibration, scores: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """[N] float32 in 0..1, of N scores; NaN where the score is NaN. Computed in float64."""
    values = np.asarray(scores, np.float64)
    if isinstance(calibration, Sigmoid):
        return sigmoid(calibration.slope * values + calibration.intercept).astype(np.float32)
    return np.interp(values, calibration.scores, calibration.probabilities).astype(np.float32)


def as_json(calibration: Calibration) -> dict[str, Any]:
    """The keys of the file that decide the probabilities."""
    if isinstance(calibration, Sigmoid):
        return {"slope": calibration.slope, "intercept": calibration.intercept}
    return {"scores": list(calibration.scores), "probabilities": list(calibration.probabilities)}


def read_calibration(path: str) -> CalibrationFile:
    """Reads a calibration file, to be applied to scores.

    Raises:
        ConfigError: it cannot be read, holds neither form, or was fitted to another column than ``score``.
    """
    data = read_option_file("--calibration", path)
    try:
        values = parse_object(data)
        calibration = _parse(values, path)
        encoder = values.get("encoder_fingerprint")
    except (ValueError, OverflowError, KeyError, TypeError):  # left out of the chain: it may quote the file
        raise ConfigError(
            f"--calibration {path}: expected a JSON object with numbers 'slope' and 'intercept', or with lists "
            "'scores' and 'probabilities'; flipkd-batch evaluate writes one"
        ) from None
    if values.get(SCORE_COLUMN, "score") != "score":  # before there was such a key, nothing told
        raise ConfigError(
            f"--calibration {path} was fitted to another column than score; run evaluate with --score-column score"
        )
    return CalibrationFile(calibration, None if encoder is None else str(encoder))


def _parse(values: dict[str, Any], path: str) -> Calibration:
    if "scores" not in values:
        slope, intercept = float(values["slope"]), float(values["intercept"])
        if not (abs(slope) <= _LARGEST and abs(intercept) <= _LARGEST):
            raise ConfigError(f"--calibration {path}: 'slope' and 'intercept' must be finite")
        return Sigmoid(slope, intercept)
    scores = tuple(float(value) for value in values["scores"])
    heights = tuple(float(value) for value in values["probabilities"])
    if not scores or len(scores) != len(heights):
        raise ConfigError(f"--calibration {path}: 'scores' and 'probabilities' must be of one length, at least 1")
    if not all(math.isfinite(value) for value in scores) or np.any(np.diff(scores) <= 0):
        raise ConfigError(f"--calibration {path}: 'scores' must be finite and strictly increasing")
    if not all(0 <= value <= 1 for value in heights) or np.any(np.diff(heights) < 0):
        raise ConfigError(f"--calibration {path}: 'probabilities' must lie in 0..1 and never decrease")
    return Knots(scores, heights)
