"""How good a student is on held-out pairs, during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.distill.language_model import answer_log_odds
from flipkd.distill.training_pairs import TrainingPairs
from flipkd.models.llm_prompt import PairPrompt
from flipkd.models.student import Student


def validate(
    student: Student,
    pairs: TrainingPairs,
    ids: Sequence[Sequence[int]],
    max_tokens: int,
    prompt: PairPrompt | None = None,
    trains_vectors: bool = True,
) -> dict[str, float]:
    """Scores held-out pairs.

    Args:
        student: scored without dropout.
        pairs: P held-out pairs.
        ids: token ids of their texts.
        max_tokens: tokens in one pass.
        prompt: of the language model's loss, where it is trained.
        trains_vectors: whether the vectors are trained too.

    Returns:
        Of the pairs with a label, where both classes are among them, ``auc`` (area under the ROC curve),
        ``average_precision``, ``f1`` and ``f1_threshold`` (the best over all thresholds: an upper bound for a threshold
        set elsewhere). With teacher scores ``spearman`` (rank correlation with them). With a prompt the former four of
        the student's own answers: ``answer_auc`` and so on (thresholds are of log-odds).
    """
    found: dict[str, float] = {}
    labelled = np.flatnonzero(~np.isnan(pairs.labels)) if pairs.labels is not None else np.empty(0, np.int64)
    labels = pairs.labels[labelled] if pairs.labels is not None else np.empty(0, np.float32)
    has_both = 0 < labels.sum() < len(labels)
    if prompt is not None and has_both:
        bodies = [student.body(text) for text in ids]
        asked = [(bodies[pairs.left[pair]], bodies[pairs.right[pair]]) for pair in labelled]
        odds = answer_log_odds(student, prompt, asked, max_tokens)
        found |= {f"answer_{name}": value for name, value in label_metrics(labels, odds).items()}
    if not trains_vectors:
        return found
    vectors = student.encode_tokens(ids, max_tokens).cpu().numpy()
    scores = np.einsum("pd,pd->p", vectors[pairs.left], vectors[pairs.right])
    if has_both:
        found |= label_metrics(labels, scores[labelled])
    if pairs.teacher is not None:
        from scipy.stats import spearmanr

        if np.ptp(pairs.teacher) > 0 and np.ptp(scores) > 0:
            found["spearman"] = float(spearmanr(scores, pairs.teacher).statistic)
    return found


def label_metrics(labels: npt.NDArray[Any], scores: npt.NDArray[Any]) -> dict[str, float]:
    """AUC, average precision and the best F1 with its threshold (a pair matches from the threshold on)."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    return {
        "auc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
        "f1": float(f1[best]),
        "f1_threshold": float(thresholds[best]),
    }


def deciding_value(metrics: dict[str, float]) -> float | None:
    """What early stopping and the choice of the best step go by.

    The vectors' AUC, else their correlation with the teacher; where they are not trained, the AUC of the answers.
    """
    return metrics.get("auc", metrics.get("spearman", metrics.get("answer_auc")))
