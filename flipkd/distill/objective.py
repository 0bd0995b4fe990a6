"""From the vectors of a batch to one loss and its metrics; which losses, says ``LossOptions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flipkd.distill.config import LossOptions
from flipkd.distill.infonce import infonce_loss
from flipkd.distill.losses import (
    cosent_loss,
    distill_matrix_loss,
    distill_pairs_loss,
    kl_loss,
    margin_mse_loss,
    mcl_loss,
)
from flipkd.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """P pairs over the N texts of a batch.

    Args:
        left: int64 [P], place of the left text in the batch.
        right: int64 [P].
        labels: float32 [P], or None.
        teacher: float32 [P] similarities, or None.
        teacher_vectors: float32 [N, D] unit rows, or None.
    """

    left: Tensor
    right: Tensor
    labels: Tensor | None
    teacher: Tensor | None
    teacher_vectors: Tensor | None


def check_objective(options: LossOptions, has_labels: bool, has_teacher: bool) -> None:
    """Refuses an objective that the data cannot feed.

    Raises:
        ConfigError: says what is missing.
    """
    needs_labels = options.objective in ("cosent", "cosent_infonce", "lm") or options.trains_language_model
    needs_teacher = options.objective in ("cosent_teacher", "margin_mse", "kl")
    if options.objective == "flip" and not has_teacher:
        needs_teacher = options.weight_pairs > 0 or options.weight_matrix > 0
    if needs_labels and not has_labels:
        raise ConfigError(
            f"--objective {options.objective} learns from labels, and the pairs have none: --label-column"
        )
    if needs_teacher and not has_teacher:
        raise ConfigError(f"--objective {options.objective} learns from teacher scores: run flipkd-batch teach first")


def batch_loss(options: LossOptions, vectors: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch but for the language model's part.

    Args:
        options: which losses, with which weights.
        vectors: float32 [N, d], unit rows, differentiable.
        batch: what is known of the pairs.

    Returns:
        The weighted sum, and 0-dim metrics: each part, MCL's counts, mean scores of positives and negatives.
    """
    student = (vectors[batch.left] * vectors[batch.right]).sum(dim=1)
    nothing = torch.full_like(student, torch.nan)
    teacher = batch.teacher if batch.teacher is not None else nothing
    parts: dict[str, tuple[float, Tensor]] = {}
    metrics: dict[str, Tensor] = {}
    if options.objective == "flip":
        if options.weight_mcl:
            found = mcl_loss(
                student,
                teacher,
                batch.labels,
                margin_between=options.margin_between,
                margin_within=options.margin_within,
                temperature=options.temperature,
                positive_threshold=options.positive_threshold,
                negative_threshold=options.negative_threshold,
            )
            parts["mcl"] = (options.weight_mcl, found.loss)
            metrics.update(found.counts)
        if options.weight_pairs:
            parts["pairs"] = (options.weight_pairs, distill_pairs_loss(student, teacher))
        if options.weight_matrix and batch.teacher_vectors is not None:
            matrix = distill_matrix_loss(vectors, batch.teacher_vectors, options.matrix_temperature)
            parts["matrix"] = (options.weight_matrix, matrix)
        if options.weight_infonce and batch.labels is not None:
            contrast = infonce_loss(
                vectors,
                batch.left,
                batch.right,
                batch.labels,
                batch.teacher,
                batch.teacher_vectors,
                temperature=options.temperature,
                positive_threshold=options.positive_threshold,
                negative_threshold=options.negative_threshold,
            )
            parts["infonce"] = (options.weight_infonce, contrast)
    elif options.objective in ("cosent", "cosent_infonce"):
        labels = batch.labels if batch.labels is not None else nothing
        parts["cosent"] = (1.0, cosent_loss(student, labels))
        if options.objective == "cosent_infonce":
            contrast = infonce_loss(vectors, batch.left, batch.right, labels, temperature=options.temperature)
            parts["infonce"] = (options.weight_infonce, contrast)
    elif options.objective == "cosent_teacher":
        parts["cosent"] = (1.0, cosent_loss(student, teacher))
    elif options.objective == "margin_mse":
        parts["margin_mse"] = (1.0, margin_mse_loss(student, teacher, batch.labels))
    elif options.objective == "kl":
        parts["kl"] = (1.0, kl_loss(student, teacher, options.matrix_temperature))
    loss = student.sum() * 0.0
    for weight, part in parts.values():
        loss = loss + weight * part
    metrics.update({f"loss_{name}": part.detach() for name, (_, part) in parts.items()})
    if batch.labels is not None:
        for name, value in (("positive", 1.0), ("negative", 0.0)):
            chosen = student.detach()[batch.labels == value]
            metrics[f"score_{name}"] = chosen.mean() if len(chosen) else chosen.sum()
    return loss, metrics


def metrics_of_step(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of the batches of one step as its own: losses and scores as their mean, counts as their sum."""
    found: dict[str, Any] = {}
    for name in batches[0]:
        total = sum(batch[name] for batch in batches)
        found[name] = total / len(batches) if name.startswith(("loss", "score_")) else total
    return found
