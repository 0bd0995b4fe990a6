"""Contrast within a batch: a match against all other texts that happen to stand in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flipkd.distill.pairwise import check_positive, check_threshold, checked_pairs, wide


def infonce_loss(
    student_vectors: Tensor,
    left: Tensor,
    right: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    teacher_vectors: Tensor | None = None,
    *,
    temperature: float,
    positive_threshold: float = float("-inf"),
    negative_threshold: float = float("inf"),
) -> Tensor:
    """InfoNCE with in-batch negatives, in both directions.

    .. math::
        L = 1/2n sum_{(a, b)} (l(a, b) + l(b, a)),
        l(a, b) = -log(e_ab / (e_ab + sum_{j in N(a)} e_aj)),    e_ij = exp(S_i . S_j / temperature)

    over the n kept positives (a, b): y = 1 and not t < positive_threshold. N(a) are the texts of the batch but a
    itself, those that a pair with y = 1 joins to a, and those that the teacher scores above negative_threshold with a:
    a random text is now and then a match too.

    Sources: Henderson et al. 2017 (arXiv 1705.00652), van den Oord et al. 2018 (arXiv 1807.03748). Not in the paper of
    flipped distillation; that the teacher says which texts are no negatives is our choice.

    Args:
        student_vectors: [N, d] floating, unit rows, of N distinct texts.
        left: int64 [P], row of each pair's left text.
        right: int64 [P].
        labels: [P], 1, 0 or NaN (no label).
        teacher: [P] floating, NaN for no score; None for no scores.
        teacher_vectors: [N, D] floating, unit rows, of the same texts; None where the teacher gives none: then its
            scores of the pairs are all that is known of other texts.
        temperature: in units of the cosine, > 0.
        positive_threshold: in units of the teacher's score; ``-inf`` keeps all positives.
        negative_threshold: in units of the teacher's score; ``inf`` keeps all negatives.

    Returns:
        0-dim; 0 where no positive is kept.

    Raises:
        ValueError: an option outside its range, shapes that differ, or labels other than 1, 0 and NaN.
    """
    check_positive("temperature", temperature)
    check_threshold("positive_threshold", positive_threshold)
    check_threshold("negative_threshold", negative_threshold)
    vectors = wide(student_vectors)
    scores = torch.full(labels.shape, torch.nan, device=vectors.device) if teacher is None else teacher.detach()
    labels = checked_pairs(scores, scores, labels)
    matches = labels == 1
    kept = matches & ~(scores < positive_threshold)
    if not bool(kept.any()):
        return vectors.sum() * 0.0
    is_match = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    matches = matches | (scores > negative_threshold)
    is_match[left[matches], right[matches]] = True
    is_match |= is_match.T.clone()
    if teacher_vectors is not None:
        constant = teacher_vectors.detach().to(vectors)
        with torch.autocast(vectors.device.type, enabled=False):
            is_match |= constant @ constant.T > negative_threshold
    loss = vectors.sum() * 0.0
    for anchors, wanted in ((left[kept], right[kept]), (right[kept], left[kept])):
        # A bf16 product would be wrong by 0.004 / 0.05 in the exponent, so autocast stays out.
        with torch.autocast(vectors.device.type, enabled=False):
            logits = vectors[anchors] @ vectors.T / temperature
        left_out = is_match[anchors].scatter(1, wanted[:, None], False)
        loss = loss + 0.5 * cross_entropy(logits.masked_fill(left_out, -torch.inf), wanted)
    return loss
