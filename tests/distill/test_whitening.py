"""The whitened start."""

from __future__ import annotations

from pathlib import Path

import torch

from flipkd.distill.gradients import Workers
from flipkd.distill.whitening import whiten_projection
from flipkd.models.adapter import new_student
from flipkd.models.options import StudentOptions


def test_vectors_of_the_texts_are_white(base_dir: Path, icd9: list[tuple[str, str, str]]) -> None:
    student = new_student(StudentOptions(str(base_dir), layer=2, dimension=8, rank=4))
    before = student.projection.norm().item()
    ids = student.tokenize([long for _, long, _ in icd9[:400]]).ids
    whiten_projection(student, ids, Workers(), 1000, seed=0)
    with torch.no_grad():
        vectors = student.states(ids) @ student.projection.T
    covariance = torch.cov(vectors.T)
    torch.testing.assert_close(covariance / covariance.diagonal().mean(), torch.eye(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(student.projection.norm().item(), before, rtol=1e-4, atol=0)


def test_fewer_texts_than_dimensions(base_dir: Path) -> None:
    """What the texts do not fill stays as it was, and nothing is infinite."""
    student = new_student(StudentOptions(str(base_dir), layer=2, dimension=16, rank=4))
    before = student.projection.detach().clone()
    ids = student.tokenize(["renal failure", "sepsis", "sepsis", "acute renal failure"]).ids
    whiten_projection(student, ids, Workers(), 1000, seed=0)
    assert torch.isfinite(student.projection).all()
    assert torch.equal(student.projection[2:], before[2:])
    assert not torch.equal(student.projection[:2], before[:2])
