"""What the losses share: sums over pairs of pairs, masks, and checks of their input."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_one_plus_sum(exponents: Tensor, chosen: Tensor) -> Tensor:
    """Return log(1 + sum of exp(exponents) where chosen), both [P, P], as a stable logsumexp with a zero appended."""
    # The lowest finite number: over a row of -inf, the gradient of logsumexp is NaN.
    exponents = exponents.masked_fill(~chosen, torch.finfo(exponents.dtype).min)
    return torch.cat([exponents.logsumexp(dim=1), exponents.new_zeros(1)]).logsumexp(dim=0)


def divergences(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) over the last dim's chosen entries: [..., n] to [...]."""
    lowest = torch.finfo(student.dtype).min  # with -inf, log p - log q and a list with nothing chosen would be NaN
    log_p = teacher.masked_fill(~chosen, lowest).log_softmax(dim=-1)
    log_q = student.masked_fill(~chosen, lowest).log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~chosen, 0.0).sum(dim=-1)


def above(target: Tensor) -> Tensor:
    """Return bool [P, P]: target[i] > target[j], False where either is NaN."""
    return target[:, None] > target[None, :]


def differences(values: Tensor) -> Tensor:
    """Return [P, P] of values[i] - values[j]."""
    return values[:, None] - values[None, :]


def filled(teacher: Tensor, scored: Tensor, student: Tensor) -> Tensor:
    """Return the teacher's scores as constants of the student's dtype, 0 where there is none."""
    return teacher.detach().masked_fill(~scored, 0.0).to(student.dtype)


def wide(values: Tensor) -> Tensor:
    """Return ``values`` in float32, float64 as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def checked_pairs(student: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
    """Check that all are [P] and that labels are 1, 0 or NaN; return floating labels, all NaN for None."""
    shapes = [tuple(values.shape) for values in (student, target, labels) if values is not None]
    if student.ndim != 1 or len(set(shapes)) > 1:
        raise ValueError(f"scores and labels of P pairs must be [P] each, got {', '.join(map(str, shapes))}")
    if labels is None:
        return torch.full_like(student, torch.nan)
    labels = labels.detach()
    refused = ~(labels.isnan() | (labels == 0) | (labels == 1))
    if bool(refused.any()):
        raise ValueError(
            f"labels must be 1, 0 or NaN (no label), but {int(refused.sum())} of {len(labels)} are not: "
            "cut soft labels at a threshold, or give them as teacher scores"
        )
    return labels if labels.is_floating_point() else labels.to(torch.float32)


def check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, but must be a finite number > 0")


def check_margin(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, but must be a finite number >= 0")


def check_threshold(name: str, value: float) -> None:
    if math.isnan(value):
        raise ValueError(f"{name} is NaN, but must be a number (-inf and inf are allowed)")
