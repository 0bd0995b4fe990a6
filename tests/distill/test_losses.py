"""The losses against slow loops over their equations, at the edges of their domain, and by their gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from flipkd.distill.losses import (
    LossResult,
    cosent_loss,
    distill_matrix_loss,
    distill_pairs_loss,
    kl_loss,
    language_model_loss,
    margin_mse_loss,
    mcl_loss,
)

NAN = math.nan
OPTIONS = {
    "margin_between": 0.3,
    "margin_within": 0.1,
    "temperature": 0.2,
    "positive_threshold": 0.2,
    "negative_threshold": 0.8,
}
Batch = tuple[list[float], list[float], list[float]]
PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def mcl(student: Tensor, teacher: Tensor, labels: Tensor | None, **changed: float) -> LossResult:
    return mcl_loss(student, teacher, labels, **{**OPTIONS, **changed})


PAIR_LOSSES: dict[str, PairLoss] = {
    "mcl": lambda s, t, y: mcl(s, t, y).loss,
    "mcl_unlabelled": lambda s, t, y: mcl(s, t, None).loss,
    "distill_pairs": lambda s, t, y: distill_pairs_loss(s, t),
    "cosent_labels": lambda s, t, y: cosent_loss(s, y),
    "cosent_teacher": lambda s, t, y: cosent_loss(s, t),
    "margin_mse": lambda s, t, y: margin_mse_loss(s, t, y),
    "margin_mse_unlabelled": lambda s, t, y: margin_mse_loss(s, t),
    "kl": lambda s, t, y: kl_loss(s, t, 0.2),
}
each_pair_loss = pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES.keys())

# Few values make ties, equal thresholds and empty classes common; the floats make everything else.
score = st.one_of(st.sampled_from([-1.0, 0.0, 0.2, 0.5, 0.8, 1.0]), st.floats(-1, 1))
row = st.tuples(score, st.one_of(st.just(NAN), score), st.sampled_from([0.0, 1.0, NAN]))
labelled_row = st.tuples(score, score, st.sampled_from([0.0, 1.0]))
unlabelled_row = st.tuples(score, st.one_of(st.just(NAN), score), st.just(NAN))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rows = draw(st.sampled_from([row, labelled_row, unlabelled_row]).flatmap(lambda r: st.lists(r, max_size=9)))
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def tensors(batch: Batch, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, labels = (torch.tensor(values, dtype=dtype) for values in batch)
    return student.requires_grad_(), teacher, labels


def random_batch(pairs: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Both classes without ties: pairs 1 and 4 are noise, 2 has no teacher score, 5 has no label."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.rand(pairs, generator=generator, dtype=torch.float64) * 2 - 1
    labels = torch.arange(pairs, dtype=torch.float64) % 2
    teacher = 0.6 * labels + 0.4 * torch.rand(pairs, generator=generator, dtype=torch.float64)
    teacher[1], teacher[4], teacher[2], labels[5] = 0.1, 0.9, NAN, NAN
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels.to(dtype)


def unit_rows(texts: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    vectors = torch.randn(texts, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(vectors, dim=1)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, of)  # raises if the loss is not connected to it
    return result


# ---- against loops over the equations


def slow_log_one_plus_sum(exponents: list[float]) -> float:
    top = max([0.0, *exponents])
    return top + math.log(math.fsum([math.exp(-top), *(math.exp(value - top) for value in exponents)]))


def slow_mcl(batch: Batch) -> tuple[float, dict[str, int]]:
    """Literally the docstring of mcl_loss, two loops over Python floats."""
    s, t, y = batch
    unlabelled_batch = all(math.isnan(label) for label in y)
    names = ("filtered_positives", "filtered_negatives", "kept_positives", "kept_negatives", "between_active")
    counts = dict.fromkeys((*names, "between_total", "within_active", "within_total", "one_class"), 0)
    group: list[str | None] = []
    for teacher, label in zip(t, y, strict=True):
        if unlabelled_batch:
            group.append("all")
        elif math.isnan(label):
            group.append(None)
        elif label == 1:
            noise = not math.isnan(teacher) and not teacher >= OPTIONS["positive_threshold"]
            counts["filtered_positives" if noise else "kept_positives"] += 1
            group.append(None if noise else "positive")
        else:
            noise = not math.isnan(teacher) and not teacher <= OPTIONS["negative_threshold"]
            counts["filtered_negatives" if noise else "kept_negatives"] += 1
            group.append(None if noise else "negative")
    if not unlabelled_batch and not {"positive", "negative"} <= set(group):
        counts["one_class"] = 1
    exponents = []
    for i in range(len(s)):
        for j in range(len(s)):
            if group[i] == "positive" and group[j] == "negative":
                zone, margin = "between", OPTIONS["margin_between"]
            elif group[i] is not None and group[i] == group[j] and t[i] > t[j]:  # False for NaN
                zone, margin = "within", OPTIONS["margin_within"] * (t[i] - t[j])
            else:
                continue
            counts[f"{zone}_total"] += 1
            counts[f"{zone}_active"] += s[j] - s[i] + margin > 0
            exponents.append((s[j] - s[i] + margin) / OPTIONS["temperature"])
    return slow_log_one_plus_sum(exponents), counts


@settings(max_examples=300)
@given(batches())
def test_mcl_is_its_equation(batch: Batch) -> None:
    expected, expected_counts = slow_mcl(batch)
    result = mcl(*tensors(batch))
    assert result.loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert {name: int(count) for name, count in result.counts.items()} == expected_counts


@settings(max_examples=200)
@given(batches())
def test_cosent_is_its_equation(batch: Batch) -> None:
    student, teacher, labels = tensors(batch)
    for target, values in ((labels, batch[2]), (teacher, batch[1])):
        s, pairs = batch[0], range(len(batch[0]))
        exponents = [20.0 * (s[j] - s[i]) for i in pairs for j in pairs if values[i] > values[j]]
        expected = slow_log_one_plus_sum(exponents)
        assert cosent_loss(student, target).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=200)
@given(batches())
def test_margin_mse_is_its_equation(batch: Batch) -> None:
    s, t, y = batch
    student, teacher, labels = tensors(batch)
    every, across = [], []
    for i, j in itertools.combinations(range(len(s)), 2):
        error = ((s[i] - s[j]) - (t[i] - t[j])) ** 2
        if not math.isnan(error):
            every.append(error)
            if {y[i], y[j]} == {0.0, 1.0}:
                across.append(error)
    expected = every if all(math.isnan(label) for label in y) else across
    for given_labels, errors in ((labels, expected), (None, every)):
        value = margin_mse_loss(student, teacher, given_labels)
        assert value.item() == pytest.approx(math.fsum(errors) / max(len(errors), 1), rel=1e-12, abs=1e-12)


@settings(max_examples=200)
@given(batches())
def test_pairwise_and_list_wise_distillation_are_their_equations(batch: Batch) -> None:
    student, teacher, _ = tensors(batch)
    scored = [(s, t) for s, t in zip(batch[0], batch[1], strict=True) if not math.isnan(t)]
    squares = math.fsum((s - t) ** 2 for s, t in scored) / max(len(scored), 1)
    assert distill_pairs_loss(student, teacher).item() == pytest.approx(squares, rel=1e-12, abs=1e-12)
    t_logits, s_logits = ([pair[column] / 0.2 for pair in scored] for column in (1, 0))
    t_total, s_total = (math.fsum(map(math.exp, logits)) for logits in (t_logits, s_logits))
    divergence = math.fsum(
        math.exp(a) / t_total * ((a - math.log(t_total)) - (b - math.log(s_total)))
        for a, b in zip(t_logits, s_logits, strict=True)
    )
    assert kl_loss(student, teacher, 0.2).item() == pytest.approx(divergence, rel=1e-9, abs=1e-12)


def test_matrix_loss_is_kl_div_without_the_diagonal() -> None:
    student, teacher = unit_rows(6, 4), unit_rows(6, 9, seed=1)
    off = ~torch.eye(6, dtype=torch.bool)
    log_q = (student @ student.T)[off].view(6, 5).div(0.05).log_softmax(1)
    p = (teacher @ teacher.T)[off].view(6, 5).div(0.05).softmax(1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(1)
    torch.testing.assert_close(distill_matrix_loss(student, teacher), expected.mean())


def test_language_model_loss_is_the_cross_entropy() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 10, 0])
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(language_model_loss(logits, targets), expected)


# ---- a batch worked out by hand


def test_counts_and_loss_of_a_batch_worked_out_by_hand() -> None:
    # thresholds 0.5 and 0.5, margins 0.5 and 0.5, temperature 0.5
    student = torch.tensor([0.90, 0.60, 0.80, 0.50, 0.05, 0.70, 0.30, 0.20])
    teacher = torch.tensor([0.90, 0.70, 0.40, 0.20, 0.40, 0.60, NAN, 0.80])
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, NAN])
    # kept positives 0, 1 and 6 (without a teacher score); filtered positive 2 (0.4 < 0.5)
    # kept negatives 3, 4; filtered negative 5 (0.6 > 0.5); 7 has no label and is left out
    # between, s_j - s_i + 0.5:  0-3: 0.10   0-4: -0.35   1-3: 0.40   1-4: -0.05   6-3: 0.70   6-4: 0.25
    # within, s_j - s_i + 0.5 (t_i - t_j):  0-1: 0.60 - 0.90 + 0.10 = -0.20   4-3: 0.50 - 0.05 + 0.10 = 0.55
    gaps = [0.10, -0.35, 0.40, -0.05, 0.70, 0.25, -0.20, 0.55]
    result = mcl_loss(
        student,
        teacher,
        labels,
        margin_between=0.5,
        margin_within=0.5,
        temperature=0.5,
        positive_threshold=0.5,
        negative_threshold=0.5,
    )
    assert result.loss.item() == pytest.approx(math.log(1 + sum(math.exp(gap / 0.5) for gap in gaps)), rel=1e-6)
    assert {name: int(count) for name, count in result.counts.items()} == {
        "filtered_positives": 1,
        "filtered_negatives": 1,
        "kept_positives": 3,
        "kept_negatives": 2,
        "between_active": 4,
        "between_total": 6,
        "within_active": 1,
        "within_total": 2,
        "one_class": 0,
    }
    assert torch.stack(list(result.counts.values())).dtype == torch.int64  # one transfer for all


def test_a_margin_that_is_just_reached_is_not_active() -> None:
    student, teacher, labels = torch.tensor([0.75, 0.25]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    counts = mcl(student, teacher, labels, margin_between=0.5).counts
    assert (int(counts["between_active"]), int(counts["between_total"])) == (0, 1)


def test_a_float32_score_reaches_the_threshold_it_was_written_as() -> None:
    student = torch.zeros(2, dtype=torch.float64)
    result = mcl(student, torch.tensor([0.7, 0.3]), torch.tensor([1.0, 0.0]), positive_threshold=0.7)
    assert int(result.counts["kept_positives"]) == 1  # though float32's 0.7 is less than float64's


# ---- what must not change it, and what must


@each_pair_loss
def test_the_order_of_the_pairs_does_not_matter(loss: PairLoss) -> None:
    batch = random_batch(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(*(values[order] for values in batch)), loss(*batch))


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"distill_pairs"}))
def test_the_level_of_the_scores_does_not_matter(name: str) -> None:
    student, teacher, labels = random_batch(12)
    loss = PAIR_LOSSES[name]
    torch.testing.assert_close(loss(student + 0.37, teacher, labels), loss(student, teacher, labels))


@pytest.mark.parametrize("name", ["mcl", "cosent_labels"])
def test_a_better_separation_is_a_lower_loss(name: str) -> None:
    student, teacher, labels = random_batch(12)
    known = teacher.nan_to_num(0.5)
    # Within a class order counts too, so only the extremes have a sure direction.
    best = int(torch.where(labels == 1, known, -1.0).argmax())
    worst = int(torch.where(labels == 0, known, 2.0).argmin())
    slope = gradient(PAIR_LOSSES[name](student, teacher, labels), student)
    assert slope[best] < 0 < slope[worst]
    moved = student.detach().clone()
    moved[best] += 0.1
    assert PAIR_LOSSES[name](moved, teacher, labels) < PAIR_LOSSES[name](student, teacher, labels)


@pytest.mark.parametrize("name", ["distill_pairs", "margin_mse", "margin_mse_unlabelled", "kl"])
def test_a_student_like_its_teacher_has_no_loss(name: str) -> None:
    _, teacher, labels = random_batch(12)
    student = teacher.nan_to_num(0.9).requires_grad_()
    loss = PAIR_LOSSES[name](student, teacher, labels)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(gradient(loss, student), torch.zeros_like(student))


def test_margins_between_and_within_raise_the_loss() -> None:
    batch = random_batch(12)
    loss = mcl(*batch).loss
    assert mcl(*batch, margin_between=0.4).loss > loss
    assert mcl(*batch, margin_within=0.2).loss > loss


def test_filtered_and_unlabelled_pairs_are_as_if_absent() -> None:
    student, teacher, labels = random_batch(12)
    absent = torch.zeros(12, dtype=torch.bool)
    absent[[1, 4, 5]] = True
    loss = mcl(student, teacher, labels).loss
    torch.testing.assert_close(loss, mcl(student[~absent], teacher[~absent], labels[~absent]).loss)
    assert torch.equal(gradient(loss, student) == 0, absent)


def test_without_labels_the_teacher_alone_gives_the_order() -> None:
    student, teacher, labels = random_batch(12)
    alone = mcl(student, teacher, None, positive_threshold=math.inf, negative_threshold=-math.inf)
    assert torch.equal(alone.loss, mcl(student, teacher, torch.full_like(labels, NAN)).loss)
    # 11 pairs have a teacher score and no two are equal; the thresholds, which would filter all of them, do not apply
    assert int(alone.counts["within_total"]) == 55
    assert int(alone.counts["between_total"]) == int(alone.counts["one_class"]) == 0
    bare = mcl(student, teacher, None, margin_within=0.0, temperature=1 / 20).loss
    torch.testing.assert_close(bare, cosent_loss(student, teacher))


def test_labels_of_any_type_are_taken() -> None:
    student, teacher, labels = random_batch(12)
    labels[5] = 1.0
    for name, dtype in itertools.product(
        ["mcl", "margin_mse", "cosent_labels"], [torch.int64, torch.bool, torch.float32]
    ):
        loss = PAIR_LOSSES[name]
        assert torch.equal(loss(student, teacher, labels.to(dtype)), loss(student, teacher, labels))


# ---- gradients and precision


@each_pair_loss
def test_gradient_of_pair_losses(loss: PairLoss) -> None:
    student, teacher, labels = random_batch(9)
    assert gradcheck(lambda s: loss(s, teacher, labels), (student,))


def test_gradient_of_the_matrix_loss() -> None:
    student, teacher = unit_rows(5, 3).requires_grad_(), unit_rows(5, 4, seed=1)
    assert gradcheck(lambda vectors: distill_matrix_loss(vectors, teacher, 0.2), (student,))


def test_gradient_of_the_language_model_loss() -> None:
    logits = unit_rows(5, 7).requires_grad_()
    assert gradcheck(lambda x: language_model_loss(x, torch.tensor([2, 4, 6, 0, 3])), (logits,))


@each_pair_loss
def test_no_gradient_flows_into_the_teacher(loss: PairLoss) -> None:
    student, teacher, labels = random_batch(12)
    teacher.requires_grad_()
    loss(student, teacher, labels).backward()
    assert teacher.grad is None
    assert student.grad is not None


@each_pair_loss
def test_bf16_scores_are_worked_on_in_float32(loss: PairLoss) -> None:
    student, teacher, labels = random_batch(12, torch.float32)
    rounded = student.detach().bfloat16()
    result = loss(rounded, teacher, labels)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(rounded.float(), teacher, labels))


def test_autocast_changes_nothing() -> None:
    batch = random_batch(12, torch.float32)
    student, teacher = unit_rows(40, 64, dtype=torch.float32), unit_rows(40, 64, seed=1, dtype=torch.float32)
    logits, targets = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(6)
    expected = [loss(*batch) for loss in PAIR_LOSSES.values()]
    expected += [distill_matrix_loss(student, teacher), language_model_loss(logits.float(), targets)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [loss(*batch) for loss in PAIR_LOSSES.values()]
        found += [distill_matrix_loss(student, teacher), language_model_loss(logits, targets)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- edges

EDGES: dict[str, Batch] = {
    "empty": ([], [], []),
    "one pair": ([0.5], [0.5], [1.0]),
    "positives only": ([0.5, -0.2, 0.1], [0.9, 0.8, 0.8], [1.0] * 3),
    "negatives only": ([0.5, -0.2, 0.1], [0.1, 0.2, 0.2], [0.0] * 3),
    "all filtered": ([0.5, -0.2, 0.1, 0.3], [0.1, 0.0, 0.9, 1.0], [1.0, 1.0, 0.0, 0.0]),
    "all ties": ([0.5] * 4, [0.5] * 4, [1.0, 1.0, 0.0, 0.0]),
    "no teacher scores": ([0.5, -0.2, 0.1, 0.3], [NAN] * 4, [1.0, 1.0, 0.0, 0.0]),
    "no labels": ([0.5, -0.2, 0.1, 0.3], [0.1, 0.0, 0.9, 1.0], [NAN] * 4),
    "neither": ([0.5, -0.2], [NAN] * 2, [NAN] * 2),
    "all wrong": ([-1.0, -1.0, 1.0, 1.0], [1.0, 0.9, 0.0, 0.1], [1.0, 1.0, 0.0, 0.0]),
    "logits": ([-1.0, -1.0, 1.0, 1.0], [80.0, 70.0, -80.0, -70.0], [1.0, 1.0, 0.0, 0.0]),
}
NOTHING_TO_LEARN = {
    "mcl": {"empty", "one pair", "all filtered", "neither"},
    "mcl_unlabelled": {"empty", "one pair", "all ties", "no teacher scores", "neither"},
    "distill_pairs": {"empty", "one pair", "all ties", "no teacher scores", "neither"},
    "cosent_labels": {"empty", "one pair", "positives only", "negatives only", "no labels", "neither"},
    "cosent_teacher": {"empty", "one pair", "all ties", "no teacher scores", "neither"},
    "margin_mse": {"empty", "one pair", "positives only", "negatives only", "all ties", "no teacher scores", "neither"},
    "margin_mse_unlabelled": {"empty", "one pair", "all ties", "no teacher scores", "neither"},
    "kl": {"empty", "one pair", "all ties", "no teacher scores", "neither"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_edges_are_finite_and_connected(name: str, edge: str, dtype: torch.dtype) -> None:
    student, teacher, labels = tensors(EDGES[edge], dtype)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either: a user's debugging would stop there
        loss = PAIR_LOSSES[name](student, teacher, labels)
        slope = gradient(loss, student)
    assert loss.shape == ()
    assert loss.dtype == dtype
    assert loss.isfinite()
    assert slope.isfinite().all()
    nothing = edge in NOTHING_TO_LEARN[name]
    assert (loss.item() == 0 and not slope.any()) if nothing else loss.item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_extreme_temperatures_give_finite_losses_and_gradients(temperature: float, dtype: torch.dtype) -> None:
    vectors, teacher_vectors = unit_rows(6, 4, dtype=dtype).requires_grad_(), unit_rows(6, 4, seed=1, dtype=dtype)
    losses = [(distill_matrix_loss(vectors, teacher_vectors, temperature), vectors)]
    for batch in (*EDGES.values(), None):
        student, teacher, labels = random_batch(64, dtype) if batch is None else tensors(batch, dtype)
        losses += [(mcl(student, teacher, y, temperature=temperature).loss, student) for y in (labels, None)]
        losses += [(kl_loss(student, teacher, temperature), student)]
    for loss, of in losses:
        assert loss.isfinite()
        assert gradient(loss, of).isfinite().all()


def test_mcl_at_extreme_temperatures_is_the_largest_gap_and_the_number_of_terms() -> None:
    student, teacher, labels = tensors(EDGES["all wrong"], torch.float32)
    # Worst term: a positive at -1 and a negative at 1 with margin 0.3. Terms: 2 x 2 between, 1 + 1 within.
    assert mcl(student, teacher, labels, temperature=1e-4).loss.item() == pytest.approx(2.3 / 1e-4, rel=1e-3)
    assert mcl(student, teacher, labels, temperature=1e4).loss.item() == pytest.approx(math.log(1 + 6), rel=1e-3)


@pytest.mark.parametrize("edge", ["positives only", "negatives only", "all filtered"])
def test_one_class_is_counted(edge: str) -> None:
    counts = mcl(*tensors(EDGES[edge])).counts
    assert int(counts["one_class"]) == 1
    assert int(counts["between_total"]) == 0


@pytest.mark.parametrize("texts", [0, 1, 2])
def test_a_matrix_of_fewer_than_three_texts_has_no_loss(texts: int) -> None:
    student = unit_rows(texts, 4).requires_grad_()
    loss = distill_matrix_loss(student, unit_rows(texts, 9, seed=1))
    assert loss.item() == 0
    assert not gradient(loss, student).any()


def test_no_label_token_gives_no_language_model_loss() -> None:
    loss = language_model_loss(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0


# ---- refusals


@pytest.mark.parametrize("label", [0.5, 2.0, -1.0, math.inf])
def test_other_labels_are_refused(label: float) -> None:
    student, teacher, labels = random_batch(12)
    labels[3] = label
    for loss in (PAIR_LOSSES["mcl"], PAIR_LOSSES["margin_mse"]):
        with pytest.raises(ValueError, match=r"labels must be 1, 0 or NaN .* 1 of 12 are not"):
            loss(student, teacher, labels)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.0),
        ("temperature", NAN),
        ("temperature", math.inf),
        ("margin_between", -0.1),
        ("margin_within", NAN),
        ("positive_threshold", NAN),
        ("negative_threshold", NAN),
    ],
)
def test_options_outside_their_range_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{option} is"):
        mcl(*random_batch(12), **{option: value})


def test_other_temperatures_are_refused_by_name() -> None:
    student, teacher, _ = random_batch(12)
    with pytest.raises(ValueError, match=r"^temperature is 0"):
        kl_loss(student, teacher, 0.0)
    with pytest.raises(ValueError, match=r"^temperature is -1"):
        distill_matrix_loss(unit_rows(4, 4), unit_rows(4, 4), -1.0)


@each_pair_loss
def test_shapes_that_would_broadcast_are_refused(loss: PairLoss) -> None:
    student, teacher, labels = random_batch(12)
    with pytest.raises(ValueError, match=r"must be \[P\] each"):
        loss(student[:, None], teacher, labels)
    with pytest.raises(ValueError, match=r"must be \[P\] each"):
        loss(student, teacher[:1], labels[:1])


def test_vectors_and_logits_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        distill_matrix_loss(unit_rows(4, 3), unit_rows(5, 3))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5,\)"):
        language_model_loss(unit_rows(4, 3), torch.zeros(5, dtype=torch.int64))
