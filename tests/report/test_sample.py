"""Samples to label: who is drawn, what a pair stands for, and that estimates from them are unbiased."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flipkd.errors import ConfigError, OutputError
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.report.metrics import Ranked, bootstrap, summary
from flipkd.report.sample import Reservoirs, allocate, equal_steps, random_numbers
from tests.report.conftest import MakeScores, labelled, score_table


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 400))
def test_allocation_is_equal_where_it_can_be(rows: list[int], size: int) -> None:
    counts = np.array(rows, np.int64)
    shares = allocate(counts, size)
    assert np.all(shares <= counts)
    least = np.minimum(counts, 2 if size >= 2 * len(rows) else 1)
    assert np.all(shares >= least)
    assert shares.sum() == max(min(size, counts.sum()), least.sum())
    free = shares[shares < counts]
    assert not len(free) or free.max() - free.min() <= 1


def _run(seed: int, rows: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """A run of which 2 % are matches."""
    generator = np.random.default_rng(seed)
    label = generator.random(rows) < 0.02
    return np.clip(generator.normal(np.where(label, 0.75, 0.3), 0.12), -1, 1).astype(np.float32), label


def _drawn(score: np.ndarray, label: np.ndarray, size: int, seed: int) -> pa.Table:
    reservoirs = Reservoirs(equal_steps(score.min(), score.max()), size, random_numbers(seed))
    table = pa.table({"score": score, "truth": label})
    for start in range(0, len(score), 3_000):
        reservoirs.add(table.slice(start, 3_000), score[start : start + 3_000])
    return reservoirs.draw(size)


def test_weighted_estimates_are_unbiased_and_intervals_hold() -> None:
    score, label = _run(0)
    threshold = 0.55
    truth = summary(Ranked(score, label).curve(np.ones(len(score))))
    matches, false = label.sum(), np.count_nonzero(~label & (score >= threshold))
    estimates, plain, inside = [], [], 0
    for seed in range(120):
        drawn = _drawn(score, label, 400, seed)
        weight, found = drawn.column("sample_weight").to_numpy(), drawn.column("truth").to_numpy()
        scores, stratum = drawn.column("score").to_numpy(), drawn.column("sample_stratum").to_numpy()
        assert weight.sum() == pytest.approx(len(score))
        curve = summary(Ranked(scores, found).curve(weight))
        estimates.append((weight[found].sum(), weight[~found & (scores >= threshold)].sum(), curve["roc_auc"]))
        plain.append(summary(Ranked(scores, found).curve(np.ones(len(weight))))["average_precision"])
        if seed < 60:
            interval, _ = bootstrap(labelled(scores, found, weight, stratum), summary, 100, np.random.default_rng(seed))
            low, high = interval["recall_at_precision_0.9"]
            inside += low <= truth["recall_at_precision_0.9"] <= high
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / np.sqrt(len(estimates))
    for estimate, spread, true in zip(mean, error, (matches, false, truth["roc_auc"]), strict=True):
        assert abs(estimate - true) < 3.5 * spread + 1e-3 * true
    assert abs(np.mean(plain) - truth["average_precision"]) > 0.03  # without the weights it is another figure
    assert inside >= 50


def test_every_row_of_a_stratum_is_as_likely_whatever_batch_it_is_in() -> None:
    score = np.linspace(0, 1, 1_000).astype(np.float32)
    times = np.zeros(1_000)
    for seed in range(300):
        reservoirs = Reservoirs(equal_steps(0, 1, 4), 20, np.random.default_rng(seed))
        for start, stop in ((0, 10), (10, 600), (600, 1_000)):
            reservoirs.add(pa.table({"row": np.arange(start, stop)}), score[start:stop])
        times[reservoirs.draw(40).column("row").to_numpy()] += 1
    for stratum in range(4):
        chances = times[stratum * 250 : (stratum + 1) * 250]
        assert chances.sum() == 300 * 10
        assert chances.reshape(5, 50).sum(1) == pytest.approx(np.full(5, 600), rel=0.2)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 39, 41])
def test_a_small_sample_is_as_large_as_was_asked_for(size: int, make_scores: MakeScores, tmp_path: Path) -> None:
    """10 drew 40: two of each of 20 strata."""
    scores = make_scores(score_table(rows=2_000, share=0.1).drop_columns(["label"]))
    target = tmp_path / "sample.parquet"
    assert evaluate(EvaluateConfig(scores=str(scores), output=str(target), sample=size))["pairs"] == size
    drawn = pq.read_table(target)
    assert drawn.num_rows == size
    per_stratum = pc.value_counts(drawn.column("sample_stratum")).field("counts").to_pylist()
    assert size == 1 or min(per_stratum) >= 2


def test_a_sample_is_written_labelled_and_read_back(make_scores: MakeScores, tmp_path: Path) -> None:
    whole = score_table(rows=6_000, share=0.1)
    scores = make_scores(whole.drop_columns(["label"]))
    target = tmp_path / "sample.parquet"
    common = {"scores": str(scores), "output": str(target), "sample": 600}
    facts = evaluate(EvaluateConfig(**common))
    drawn = pq.read_table(target)
    assert facts["pairs"] == drawn.num_rows == 600
    assert target.stat().st_mode & 0o777 == 0o600
    assert drawn.schema.names[: whole.num_columns - 1] == whole.drop_columns(["label"]).schema.names
    assert drawn.column("label").null_count == 600
    assert drawn.column("score").null_count == 0
    assert pc.sum(drawn.column("sample_weight")).as_py() == pytest.approx(6_000 - 120)
    with pytest.raises(OutputError, match="labels may have been filled in"):
        evaluate(EvaluateConfig(**common))
    with pytest.raises(ConfigError, match=r"in \.parquet"):
        evaluate(EvaluateConfig(**{**common, "output": str(tmp_path / "sample")}))
    evaluate(EvaluateConfig(**common, overwrite=True))
    assert pq.read_table(target).equals(drawn)  # seeded
    evaluate(EvaluateConfig(**common, overwrite=True, seed=1))
    assert not pq.read_table(target).equals(drawn)

    # A person fills the labels in with another program, which drops our footer; a third stays unlabelled.
    truth = np.asarray(whole.column("label"))[drawn.column("left_id").to_numpy()]
    labels = pa.array(truth.astype(float), mask=np.arange(600) % 3 == 0)
    filled = drawn.set_column(drawn.schema.get_field_index("label"), "label", labels)
    pq.write_table(filled.replace_schema_metadata(None), target)
    report = EvaluateConfig(scores=str(scores), labels=str(target), output=str(tmp_path / "report"), bootstrap=50)
    found = evaluate(report)
    assert found["labels_from"] == "sample"
    assert found["labelled"]["pairs"] == 400
    assert found["labelled"]["weight"] == pytest.approx(found["labels"]["sample"]["rows_represented"])
    assert found["rows"]["unscored"] == {"missing_record": 120}
    scored = whole.filter(pc.is_valid(whole.column("score")))
    true_auc = summary(
        Ranked(scored.column("score").to_numpy(), np.asarray(scored.column("label")) == 1).curve(
            np.ones(scored.num_rows)
        )
    )["roc_auc"]
    assert found["metrics"]["roc_auc"]["low"] - 0.02 < true_auc < found["metrics"]["roc_auc"]["high"] + 0.02
    matches = pc.sum(scored.column("label")).as_py()
    assert found["labelled"]["match_weight"] == pytest.approx(matches, rel=0.25)
    assert "stratified sample" in (tmp_path / "report/report.html").read_text()


def test_a_stratum_without_labels_is_told_of(make_scores: MakeScores, tmp_path: Path) -> None:
    scores, target = make_scores(score_table().drop_columns(["label"])), tmp_path / "sample.parquet"
    evaluate(EvaluateConfig(scores=str(scores), output=str(target), sample=100))
    drawn = pq.read_table(target)
    middle = pc.less(drawn.column("sample_stratum"), 12)
    labels = pc.if_else(middle, pc.cast(pc.greater(drawn.column("score"), 0.5), pa.int8()), pa.scalar(None, pa.int8()))
    pq.write_table(drawn.set_column(drawn.schema.get_field_index("label"), "label", labels), target)
    found = evaluate(EvaluateConfig(scores=str(scores), labels=str(target), output=str(tmp_path / "r"), bootstrap=20))
    assert found["labels"]["sample"]["strata_without_labels"] > 0
    assert any("Strata without any label" in warning for warning in found["warnings"])


def test_a_sample_of_other_scores_and_taken_names_are_refused(make_scores: MakeScores, tmp_path: Path) -> None:
    bare = score_table().drop_columns(["label"])
    scores, other = make_scores(bare), make_scores(score_table(300).drop_columns(["label"]), name="other")
    target = str(tmp_path / "sample.parquet")
    evaluate(EvaluateConfig(scores=str(scores), output=target, sample=50))
    report = str(tmp_path / "report")
    with pytest.raises(ConfigError, match="other scores"):
        evaluate(EvaluateConfig(scores=str(other), labels=target, output=report))
    with pytest.raises(ConfigError, match="--label-column"):
        evaluate(EvaluateConfig(scores=str(make_scores(name="labels")), output=target, sample=50, overwrite=True))
    with pytest.raises(ConfigError, match="--weight-column"):
        evaluate(EvaluateConfig(scores=str(scores), labels=target, output=report, weight_column="sample_weight"))


def test_the_limit_of_unseen_matches_holds(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table(rows=4_000, share=0.1).drop_columns(["label"])
    scores, target = make_scores(table), tmp_path / "sample.parquet"
    evaluate(EvaluateConfig(scores=str(scores), output=str(target), sample=200))
    drawn = pq.read_table(target)
    labels = pc.cast(pc.greater(drawn.column("score"), 0.6), pa.int8())
    pq.write_table(drawn.set_column(drawn.schema.get_field_index("label"), "label", labels), target)
    found = evaluate(EvaluateConfig(scores=str(scores), labels=str(target), output=str(tmp_path / "r"), bootstrap=20))
    below = drawn.filter(pc.less(drawn.column("score"), 0.55))
    largest = pc.max(below.column("sample_weight")).as_py()
    assert found["labels"]["sample"]["unseen_matches_limit"] == int(np.ceil(-np.log(0.05) * largest))
    assert any("there can still be" in warning for warning in found["warnings"])
