"""From log-odds to a probability."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Beyond this a probability is 0 or 1 in float32, and exp would overflow.
_MOST = 700


def sigmoid(log_odds: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """1 / (1 + exp(-x)) in float64, of the shape of ``log_odds``; NaN stays NaN.

    Not SciPy's ``expit``: its last bits are others, and scores are compared bit by bit from run to run.
    """
    bounded = np.clip(log_odds.astype(np.float64), -_MOST, _MOST)
    found: npt.NDArray[np.float64] = 1 / (1 + np.exp(-bounded))
    return found
