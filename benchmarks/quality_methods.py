"""The students of ``benchmarks.quality``: what each is trained on, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from flipkd.distill.config import LossOptions


@dataclass(frozen=True)
class Student:
    """How a student is trained.

    Args:
        loss: what is minimised.
        unlabelled: whether unlabelled pairs stand beside the labelled ones in every batch.
        answers: whether the decoder's answer is the score, in place of the encoder's cosine.
        teacher: ``encoder``; ``weak``, the same with a tenth of the labels; or ``cross``, a cross-encoder, which gives
            no vectors.
        run: the training it shares with another row; None for its own.
        student: options of ``StudentOptions`` that differ.
        train: options of ``TrainConfig`` that differ.
    """

    loss: LossOptions = field(default_factory=LossOptions)
    unlabelled: bool = False
    answers: bool = False
    teacher: Literal["encoder", "weak", "cross"] = "encoder"
    run: str | None = None
    student: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


_WITH_LM = LossOptions(weight_lm=0.1)
COMPARED = {
    "lm": Student(LossOptions(objective="lm"), answers=True),
    "cosent": Student(LossOptions(objective="cosent")),
    "cosent_infonce": Student(LossOptions(objective="cosent_infonce")),
    "margin_mse": Student(LossOptions(objective="margin_mse")),
    "kl": Student(LossOptions(objective="kl")),
    "flip": Student(),
    "flip_without_mcl": Student(LossOptions(weight_mcl=0.0)),
    "flip_without_dist": Student(LossOptions(weight_pairs=0.0, weight_matrix=0.0)),
    "flip_without_infonce": Student(LossOptions(weight_infonce=0.0)),
    "flip_without_filter": Student(LossOptions(positive_threshold=-np.inf, negative_threshold=np.inf)),
    "flip_unlabelled": Student(unlabelled=True),
    "flip_unlabelled_without_infonce": Student(LossOptions(weight_infonce=0.0), unlabelled=True),
    "flip_weak_teacher": Student(teacher="weak"),
    "flip_cross_encoder": Student(teacher="cross"),
    "flip_lm": Student(_WITH_LM),
    "flip_decoder": Student(_WITH_LM, answers=True, run="flip_lm"),
}
# One option each that differs from flip's; tried on validation pairs alone.
SWEPT = {
    **{f"layer {k}": Student(student={"layer": k}) for k in (5, 12, 16)},
    "attention full": Student(student={"attention": "full"}),
    "attention full, layer 12": Student(student={"attention": "full", "layer": 12}),
    **{f"rank {rank}": Student(student={"rank": rank, "alpha": float(rank)}) for rank in (16, 256)},
    "dimension 256": Student(student={"dimension": 256}),
    **{f"pooling {pooling}": Student(student={"pooling": pooling}) for pooling in ("last", "weighted")},
    "dropout 0.1": Student(student={"dropout": 0.1}),
    **{f"learning rate {rate:g}": Student(train={"learning_rate": rate}) for rate in (1e-3, 4e-3)},
    "start random": Student(train={"start": "random"}),
    **{f"weight of pairs {weight:g}": Student(LossOptions(weight_pairs=weight)) for weight in (0, 10)},
    **{f"weight of matrix {weight:g}": Student(LossOptions(weight_matrix=weight)) for weight in (0, 5, 80)},
    **{f"margin between {margin}": Student(LossOptions(margin_between=margin)) for margin in (0.1, 0.4)},
    **{f"weight of infonce {weight:g}": Student(LossOptions(weight_infonce=weight)) for weight in (1, 20)},
    "margin within 0.3": Student(LossOptions(margin_within=0.3)),
    **{f"temperature {value}": Student(LossOptions(temperature=value)) for value in (0.02, 0.1)},
    **{f"matrix temperature {value}": Student(LossOptions(matrix_temperature=value)) for value in (0.02, 0.1)},
}
STUDENTS = {**COMPARED, **SWEPT}
# What is run with every seed; the others with the first one alone.
SEEDED = ("teacher", "cosent", "cosent_infonce", "flip_unlabelled", "flip", "flip_without_mcl")
TEACHERS = ("teacher", "weak_teacher", "cross_encoder")
METHODS = ("token_set_ratio", "splink", "minilm", *TEACHERS, "untrained", *COMPARED)
