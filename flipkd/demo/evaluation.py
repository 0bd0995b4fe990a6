"""How good scores are against labels: the threshold is chosen on the validation pairs and applied to the test pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.demo.pair_sets import PairSet


@dataclass(frozen=True)
class Quality:
    """Figures of one method on one test set.

    Args:
        f1: at the threshold with the best F1 on the validation pairs; a pair matches from the threshold on.
        auc: area under the ROC curve.
        ap: average precision.
        threshold: the threshold.
    """

    f1: float
    auc: float
    ap: float
    threshold: float


def quality(
    validation_labels: npt.ArrayLike,
    validation_scores: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    test_scores: npt.ArrayLike,
) -> Quality:
    """Quality on the test pairs.

    Args:
        validation_labels: [V] 0 or 1, both there; ``test_labels`` [T] likewise.
        validation_scores: [V], higher for a match; ``test_scores`` [T] likewise.
    """
    from sklearn.metrics import f1_score

    from flipkd.distill.validation import label_metrics

    threshold = label_metrics(np.asarray(validation_labels), np.asarray(validation_scores))["f1_threshold"]
    labels, scores = np.asarray(test_labels), np.asarray(test_scores)
    found = label_metrics(labels, scores)
    f1 = float(f1_score(labels, scores >= threshold))
    return Quality(f1=f1, auc=found["auc"], ap=found["average_precision"], threshold=threshold)


def string_similarity(pairs: PairSet) -> npt.NDArray[np.float64]:
    """rapidfuzz's token_set_ratio of each pair, 0 to 100; its ``default_process`` first (letters and digits only)."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.utils import default_process

    texts = {text: default_process(text) for text in {*pairs.left_text, *pairs.right_text}}
    both = zip(pairs.left_text, pairs.right_text, strict=True)
    return np.array([token_set_ratio(texts[left], texts[right]) for left, right in both])


def quality_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table: ``method``, ``f1``, ``auc``, ``ap``, ``seconds``."""
    lines = [f"  {'':44}{'F1':>7}{'AUC':>7}{'AP':>7}{'seconds':>9}"]
    for row in rows:
        figures = "".join(f"{row[name]:>7.3f}" for name in ("f1", "auc", "ap"))
        lines.append(f"  {row['method']:44}{figures}{row['seconds']:>9.1f}")
    return lines
