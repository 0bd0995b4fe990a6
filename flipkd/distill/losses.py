"""The losses of flipped distillation (arXiv 2507.05617), and three to compare with, as pure functions.

Notation, for the P pairs of a batch: s is the student's score (a cosine, [P], differentiable), t the teacher's ([P],
NaN where it has none), y the label ([P], 1, 0, or NaN where there is none). "i above j" says that the student should
score pair i higher than pair j.

The paper names the parts (margin-aware contrastive loss, dual threshold, L_dist, language-model loss), but where we
could read it gives no formula. Each docstring says what is the paper's idea and what is our choice.

Holds for all functions:

- The arithmetic is float32 (float64 for float64 input), also under autocast; the result is 0-dim, of that dtype.
- Teacher scores (finite or NaN), teacher vectors and labels are constants: no gradient flows into them.
- Where there is nothing to learn (an empty batch, only ties) the loss is 0 and still part of the graph: its gradients
  are zeros, not None.
- Memory grows with P x P at most; on a GPU only the check of labels and a bool mask of rows wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipkd.distill.pairwise import (
    above,
    check_margin,
    check_positive,
    check_threshold,
    checked_pairs,
    differences,
    divergences,
    filled,
    log_one_plus_sum,
    wide,
)

_COSENT_SCALE = 20.0  # the inverse of a temperature


@dataclass(frozen=True, slots=True)
class LossResult:
    """A loss (0-dim, differentiable), and what it was made of."""

    loss: Tensor
    counts: dict[str, Tensor]  # 0-dim int64 on the loss's device; torch.stack them to read all in one transfer


def mcl_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    margin_between: float,
    margin_within: float,
    temperature: float,
    positive_threshold: float,
    negative_threshold: float,
) -> LossResult:
    """Margin-aware contrastive loss with a dual threshold.

    .. math::
        L = log(1 + sum_{i above j} exp((s_j - s_i + m_ij) / temperature))

    Two zones, i above j if

    - between: i is a kept positive and j a kept negative; m_ij = margin_between;
    - within: both are kept, of one class, and t_i > t_j; m_ij = margin_within (t_i - t_j). With margin_within 0 the
      order inside a class is still learned, without a margin.

    Kept: y = 1 with t >= positive_threshold, and y = 0 with t <= negative_threshold; the others are filtered as noise.
    A labelled pair without a teacher score cannot be judged: it is kept, and joins the between zone only. A pair
    without a label is left out, unless the whole batch has no label: then the order is the teacher's alone (all scored
    pairs count as one kept class, and the thresholds do not apply).

    The margin between classes, the order by teacher score inside each and the dual threshold are the paper's ideas. The
    formula (CoSENT's with margins; a sum over terms, not a mean) and the rules for missing values are our choice.

    Args:
        student: [P] floating.
        teacher: [P] floating, NaN for no score; compared with the thresholds in its own dtype.
        labels: [P], 1, 0 or NaN (no label); None for no labels.
        margin_between: in units of the student's score, >= 0.
        margin_within: student's score per unit of teacher score, >= 0.
        temperature: in units of the student's score, > 0.
        positive_threshold: in units of the teacher's score; ``-inf`` keeps all positives.
        negative_threshold: in units of the teacher's score; ``inf`` keeps all negatives.

    Returns:
        The loss, and counts: ``filtered_positives``, ``filtered_negatives``, ``kept_positives``, ``kept_negatives``
        (pairs); ``between_total``, ``within_total`` (terms) and ``between_active``, ``within_active`` (those with
        s_j - s_i + m_ij > 0: margin not reached); ``one_class`` (1 if a batch with labels has no between zone, else 0).

    Raises:
        ValueError: an option outside its range, shapes that differ, or labels other than 1, 0 and NaN.
    """
    check_positive("temperature", temperature)
    check_margin("margin_between", margin_between)
    check_margin("margin_within", margin_within)
    check_threshold("positive_threshold", positive_threshold)
    check_threshold("negative_threshold", negative_threshold)
    labels = checked_pairs(student, teacher, labels)
    student = wide(student)

    with torch.no_grad():
        # In the teacher's dtype: a float32 score of 0.7 reaches a threshold of 0.7, which it would not in float64.
        filtered_positives = (labels == 1) & (teacher < positive_threshold)
        filtered_negatives = (labels == 0) & (teacher > negative_threshold)
        positives = (labels == 1) & ~filtered_positives
        negatives = (labels == 0) & ~filtered_negatives
        has_labels = ~labels.isnan().all()

        between = positives[:, None] & negatives[None, :]
        same_class = (positives[:, None] & positives[None, :]) | (negatives[:, None] & negatives[None, :]) | ~has_labels
        within = same_class & above(teacher)

        margin = margin_within * differences(filled(teacher, ~teacher.isnan(), student))
        margin.masked_fill_(between, margin_between)

    gaps = margin - differences(student)
    with torch.no_grad():
        active = gaps > 0
        counts = {
            "filtered_positives": filtered_positives.sum(),
            "filtered_negatives": filtered_negatives.sum(),
            "kept_positives": positives.sum(),
            "kept_negatives": negatives.sum(),
            "between_active": (between & active).sum(),
            "between_total": between.sum(),
            "within_active": (within & active).sum(),
            "within_total": within.sum(),
            "one_class": (has_labels & ~(positives.any() & negatives.any())).long(),
        }
    return LossResult(log_one_plus_sum(gaps / temperature, between | within), counts)


def distill_pairs_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_dist over pairs: the squared error of the student's score.

    .. math::
        L = 1/n sum_i (s_i - t_i)^2    over the n pairs with a teacher score

    To align the student's cosine with the teacher's similarity is the paper's idea; the squared error is our choice.
    Scores are compared as they are: a teacher's logits have to be brought to the cosine's scale first.

    Args:
        student: [P] floating.
        teacher: [P] floating, NaN for no score.

    Raises:
        ValueError: shapes that differ.
    """
    checked_pairs(student, teacher, None)
    student = wide(student)
    scored = ~teacher.isnan()
    errors = (student - filled(teacher, scored, student)).masked_fill(~scored, 0.0)
    return errors.square().sum() / scored.sum().clamp(min=1)


def distill_matrix_loss(student_vectors: Tensor, teacher_vectors: Tensor, temperature: float = 0.05) -> Tensor:
    """L_dist over the in-batch matrix: each text's similarities to all other texts, as the teacher distributes them.

    .. math::
        p_i = softmax_{j != i}(T_i . T_j / temperature),    q_i = softmax_{j != i}(S_i . S_j / temperature)

        L = mean_i KL(p_i || q_i) = mean_i sum_{j != i} p_ij (log p_ij - log q_ij)

    Needs no label. Our choice, after a first trial in which squared error over the matrix hurt and this helped. Below
    three texts there is nothing to distribute, and the loss is 0.

    Args:
        student_vectors: [N, d] floating, unit rows, of N distinct texts.
        teacher_vectors: [N, D] floating, unit rows, of the same texts.
        temperature: in units of the cosine, > 0; the same for both.

    Raises:
        ValueError: a temperature that is not > 0, or other shapes.
    """
    check_positive("temperature", temperature)
    shapes = f"{tuple(student_vectors.shape)} and {tuple(teacher_vectors.shape)}"
    if student_vectors.ndim != 2 or teacher_vectors.ndim != 2 or len(student_vectors) != len(teacher_vectors):
        raise ValueError(
            f"student_vectors and teacher_vectors must be [N, d] and [N, D] of the same texts, got {shapes}"
        )
    student_vectors = wide(student_vectors)
    teacher_vectors = teacher_vectors.detach().to(student_vectors)
    if len(student_vectors) == 0:
        return student_vectors.sum() * 0.0
    # A bf16 product would be wrong by 0.004 / 0.05 in the exponent, so autocast stays out.
    with torch.autocast(student_vectors.device.type, enabled=False):
        student_scores = student_vectors @ student_vectors.T
        teacher_scores = teacher_vectors @ teacher_vectors.T
    others = ~torch.eye(len(student_vectors), dtype=torch.bool, device=student_vectors.device)
    return divergences(student_scores / temperature, teacher_scores / temperature, others).mean()


def cosent_loss(student: Tensor, target: Tensor) -> Tensor:
    """CoSENT, a rank loss without margins, to compare with.

    .. math::
        L = log(1 + sum_{t_i > t_j} exp(20 (s_j - s_i)))

    Source: Jianlin Su, https://kexue.fm/archives/8847; the scale 20 is his, and sentence-transformers' default.

    Args:
        student: [P] floating.
        target: [P] labels or teacher scores, larger is more alike; pairs with NaN are left out.

    Raises:
        ValueError: shapes that differ.
    """
    checked_pairs(student, target, None)
    return log_one_plus_sum(-_COSENT_SCALE * differences(wide(student)), above(target))


def margin_mse_loss(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """MarginMSE: the student's score differences against the teacher's, to compare with.

    .. math::
        L = mean_{(i, j)} ((s_i - s_j) - (t_i - t_j))^2

    Source: Hofstätter et al. 2020, arXiv 2010.02666, there over a positive and a negative document of one query. Our
    pairs have no query, so (i, j) are all positives and negatives of the batch (our choice); if it has no label at all,
    all i < j. Pairs without a teacher score are left out, and so are those without a label in a batch that has some.

    Args:
        student: [P] floating.
        teacher: [P] floating, NaN for no score.
        labels: [P], 1, 0 or NaN (no label); None for no labels.

    Raises:
        ValueError: shapes that differ, or labels other than 1, 0 and NaN.
    """
    labels = checked_pairs(student, teacher, labels)
    student = wide(student)
    scored = ~teacher.isnan()
    # Each (i, j) of two classes stands once here, and each of i != j twice: the same mean as over i < j.
    compared = (labels[:, None] == 1) & (labels[None, :] == 0)
    compared |= labels.isnan().all() & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    compared &= scored[:, None] & scored[None, :]
    errors = differences(student - filled(teacher, scored, student)).masked_fill(~compared, 0.0)
    return errors.square().sum() / compared.sum().clamp(min=1)


def kl_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """List-wise KL divergence over the pairs of a batch, to compare with.

    .. math::
        p = softmax(t / temperature),    q = softmax(s / temperature),    L = KL(p || q) = sum_i p_i (log p_i - log q_i)

    over the pairs with a teacher score. One list per batch is our choice: the softened softmax is that of Hinton et al.
    2015 (arXiv 1503.02531), with pairs in the place of classes, and not multiplied by the squared temperature.

    Args:
        student: [P] floating.
        teacher: [P] floating, NaN for no score.
        temperature: in units of the scores, > 0; the same for both.

    Raises:
        ValueError: a temperature that is not > 0, or shapes that differ.
    """
    check_positive("temperature", temperature)
    checked_pairs(student, teacher, None)
    student = wide(student)
    scored = ~teacher.isnan()
    return divergences(student / temperature, filled(teacher, scored, student) / temperature, scored)


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """L_LM: cross entropy of the label's tokens in the joint prompt.

    .. math::
        L = -1/n sum_i log softmax(logits_i)[targets_i]

    To train the label's language-model loss along is the paper's idea; that no other token counts is our choice.

    Args:
        logits: [N, V] floating, already shifted: row i predicts targets[i]. Best only the rows that count: they are
            widened to float32 here.
        targets: int64 [N], token ids.

    Raises:
        ValueError: other shapes.
    """
    shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits and targets must be [N, V] and [N], got {shapes}")
    total = torch.nn.functional.cross_entropy(wide(logits), targets, reduction="sum")
    return total / max(len(targets), 1)
