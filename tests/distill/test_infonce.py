"""InfoNCE against a slow loop over its equation, and what it must leave out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from flipkd.distill.config import LossOptions
from flipkd.distill.infonce import infonce_loss
from flipkd.distill.objective import Batch, batch_loss

NAN = math.nan
TEXTS, PAIRS = 9, 7


def rows(seed: int, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(TEXTS, width, generator=generator, dtype=torch.float64), dim=1)


def slow(
    vectors: Tensor,
    pairs: list[tuple[int, int]],
    labels: list[float],
    scores: list[float],
    teacher: Tensor | None,
    temperature: float,
    low: float,
    high: float,
) -> float:
    matches = {frozenset(pair) for pair, label, t in zip(pairs, labels, scores, strict=True) if label == 1 or t > high}
    kept = [pair for pair, label, t in zip(pairs, labels, scores, strict=True) if label == 1 and not t < low]

    def is_negative(a: int, j: int) -> bool:
        if a == j or frozenset((a, j)) in matches:
            return False
        return teacher is None or not float(teacher[a] @ teacher[j]) > high

    def term(a: int, b: int) -> float:
        def e(j: int) -> float:
            return math.exp(float(vectors[a] @ vectors[j]) / temperature)

        return -math.log(e(b) / (e(b) + sum(e(j) for j in range(TEXTS) if j != b and is_negative(a, j))))

    return sum(term(a, b) + term(b, a) for a, b in kept) / (2 * len(kept)) if kept else 0.0


text = st.integers(0, TEXTS - 1)
pair = st.tuples(text, text).filter(lambda found: found[0] != found[1])


@settings(max_examples=80)
@given(
    pairs=st.lists(pair, min_size=PAIRS, max_size=PAIRS),
    labels=st.lists(st.sampled_from([1.0, 0.0, NAN]), min_size=PAIRS, max_size=PAIRS),
    scores=st.lists(st.sampled_from([-0.2, 0.3, 0.9, 0.95, NAN]), min_size=PAIRS, max_size=PAIRS),
    has_vectors=st.booleans(),
    seed=st.integers(0, 50),
)
def test_is_its_equation(
    pairs: list[tuple[int, int]], labels: list[float], scores: list[float], has_vectors: bool, seed: int
) -> None:
    student = rows(seed).requires_grad_()
    teacher = rows(seed + 1, 2) if has_vectors else None
    left, right = torch.tensor(pairs).T
    found = infonce_loss(
        student,
        left,
        right,
        torch.tensor(labels, dtype=torch.float64),
        torch.tensor(scores, dtype=torch.float64),
        teacher,
        temperature=0.2,
        positive_threshold=0.3,
        negative_threshold=0.9,
    )
    expected = slow(student.detach(), pairs, labels, scores, teacher, 0.2, 0.3, 0.9)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all()
    assert (expected == 0) == bool((gradient == 0).all()) or expected < 1e-6


def test_a_match_nearer_than_all_others_costs_next_to_nothing() -> None:
    vectors = torch.eye(4)[[0, 0, 1, 1]]
    left, right, labels = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2)
    assert infonce_loss(vectors, left, right, labels, temperature=0.05) < 1e-6
    swapped = infonce_loss(vectors, left, torch.tensor([3, 1]), labels, temperature=0.05)
    assert swapped > 10


def test_nothing_flows_into_the_teacher_and_bf16_is_widened() -> None:
    student, teacher = rows(1).bfloat16().requires_grad_(), rows(2).requires_grad_()
    scores = torch.rand(2, requires_grad=True)
    left, right = torch.tensor([0, 2]), torch.tensor([1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        loss = infonce_loss(student, left, right, torch.ones(2), scores, teacher, temperature=0.05)
    assert loss.dtype is torch.float32
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert scores.grad is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"temperature": 0.0}, "temperature"), ({"temperature": 1.0, "negative_threshold": NAN}, "negative_threshold")],
)
def test_options_outside_their_range_are_refused(changed: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        infonce_loss(rows(0), torch.tensor([0]), torch.tensor([1]), torch.ones(1), **changed)


def test_labels_other_than_0_and_1_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must be"):
        infonce_loss(rows(0), torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]), temperature=1.0)


def test_its_weight_is_that_of_the_options() -> None:
    vectors = rows(3).float()
    batch = Batch(torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]), torch.tensor([1.0, 0.0, NAN]), None, None)
    for objective in ("flip", "cosent_infonce"):
        totals = []
        for weight in (0.0, 1.0, 3.0):
            options = LossOptions(objective, weight_pairs=0, weight_matrix=0, weight_infonce=weight)  # type: ignore[arg-type]
            total, metrics = batch_loss(options, vectors, batch)
            totals.append(float(total))
        assert totals[2] - totals[0] == pytest.approx(3 * float(metrics["loss_infonce"]), rel=1e-5)
        assert totals[1] - totals[0] == pytest.approx(float(metrics["loss_infonce"]), rel=1e-5)
