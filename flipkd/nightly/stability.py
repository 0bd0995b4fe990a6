"""How far the scores of two nights lie apart.

The population stability index over B bins, with p_b tonight's share of bin b and q_b last night's (Yurdakul,
Statistical Properties of Population Stability Index, Western Michigan University, 2018)::

    PSI = sum over b of (p_b - q_b) ln(p_b / q_b)

which is the Kullback-Leibler divergence in both directions, summed. Between two samples of one population, of N and M
independent scores, PSI / (1/N + 1/M) follows a chi-squared distribution with B - 1 degrees of freedom (same source).
Below 0.1 counts as stable and above 0.25 as changed; that is a convention of credit scoring, not a result.

Our choices: the bins are last night's steps of equal share, open at both ends, and half a pair is added to every bin,
so that an empty one gives a large value and not an infinite one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

_ADDED_TO_BIN = 0.5
_CHANCE_LEVEL = 0.95


def population_stability_index(tonight: npt.ArrayLike, last: npt.ArrayLike) -> float | None:
    """The index over [B] counts of each night; None where one of them has no score."""
    now, before = np.asarray(tonight, np.float64), np.asarray(last, np.float64)
    if not now.sum() or not before.sum():
        return None
    p, q = ((counts + _ADDED_TO_BIN) / (counts + _ADDED_TO_BIN).sum() for counts in (now, before))
    return float(np.sum((p - q) * np.log(p / q)))


def chance_limit(tonight: npt.ArrayLike, last: npt.ArrayLike) -> float | None:
    """What the index stays below in 95 of 100 cases if nothing has changed; None where there is no score."""
    bins = len(np.asarray(tonight))
    sizes = [int(np.sum(counts)) for counts in (tonight, last)]
    if not all(sizes) or bins < 2:
        return None
    return float(sum(1 / size for size in sizes) * stats.chi2.ppf(_CHANCE_LEVEL, bins - 1))


def relative_change(tonight: float, last: float) -> float | None:
    """|tonight - last| / last; None where last night had none and tonight has."""
    if last == 0:
        return 0.0 if tonight == 0 else None
    return abs(tonight - last) / last


def share(part: float, whole: float) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None
