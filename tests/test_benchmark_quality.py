from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.quality import QUICK, Results, Task, ratios, run, summary
from benchmarks.quality_methods import COMPARED, METHODS, STUDENTS, SWEPT
from benchmarks.quality_sets import DATASETS, read_pairs, some_groups, unlabelled_pairs, with_nearest
from benchmarks.quality_tables import draw, main_table, sweep_table
from benchmarks.splink_model import splink_scores
from flipkd.demo.pair_sets import PairSet, PairSplits, pair_set, write_pairs
from flipkd.demo.persons import COLUMNS, person_pairs


def row(method: str, auc: float, dataset: str = "icd9", seed: int = 0) -> dict[str, object]:
    figures = {"f1": auc / 2, "auc": auc, "ap": auc, "seconds": 1.0, "texts_per_second": 2.0, "steps": 5}
    return {**Task(dataset, method, "test", seed, 1.0)._asdict(), **figures, "parameters": 3}


def tasks(*datasets: str, seed: int = 0) -> list[Task]:
    return [Task(dataset, "token_set_ratio", "test", seed, 1.0) for dataset in datasets]


def test_a_finished_row_is_in_the_file_at_once_and_is_not_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "quality.json"
    run(tasks("icd9", "sec_names"), QUICK, tmp_path / "work", Results(path, QUICK))
    found = json.loads(path.read_text())
    assert found.keys() == {"rows", "settings", "machine", "versions"}
    assert [(each["dataset"], each["method"], each["seed"]) for each in found["rows"]] == [
        ("icd9", "token_set_ratio", 0),
        ("sec_names", "token_set_ratio", 0),
    ]
    names = ["dataset", "method", "split", "seed", "labels", "f1", "auc", "ap", "seconds", "steps"]
    names += ["texts_per_second", "parameters"]
    assert all(list(each) == names for each in found["rows"])
    assert all(0.6 < each["auc"] < 0.95 for each in found["rows"])
    capsys.readouterr()

    before = path.stat().st_mtime_ns
    run(tasks("icd9", "sec_names"), QUICK, tmp_path / "work", Results(path, QUICK))
    assert capsys.readouterr().out == ""
    assert path.stat().st_mtime_ns == before
    run(tasks("icd9", seed=1), QUICK, tmp_path / "work", Results(path, QUICK))
    assert len(json.loads(path.read_text())["rows"]) == 3


def test_rows_of_other_settings_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    Results(path, QUICK).add(row("flip", 0.9))
    with pytest.raises(SystemExit, match="other settings"):
        Results(path, replace(QUICK, steps=3))


def test_ratios_are_over_what_both_have() -> None:
    rows = [row("flip", 0.9), row("cosent", 0.6), row("flip", 0.8, "sec_names"), row("teacher", 0.95, "sec_names")]
    found = ratios(rows)
    assert found["flip_over_cosent_auc"] == pytest.approx(1.5)
    assert found["flip_over_teacher_f1"] == pytest.approx(round(0.8 / 0.95, 4))
    assert not any("untrained" in name for name in found)


def test_ablations_differ_from_flip_in_one_part_alone() -> None:
    flip = STUDENTS["flip"].loss
    assert STUDENTS["flip_without_mcl"].loss == replace(flip, weight_mcl=0.0)
    assert STUDENTS["flip_without_dist"].loss == replace(flip, weight_pairs=0.0, weight_matrix=0.0)
    assert STUDENTS["flip_without_infonce"].loss == replace(flip, weight_infonce=0.0)
    assert STUDENTS["flip_unlabelled"].loss == flip
    assert set(METHODS) >= set(COMPARED)
    for student in SWEPT.values():
        changed = [student.loss != flip, bool(student.student), bool(student.train), student.unlabelled]
        assert sum(changed) == 1
    assert set(DATASETS) == {"icd9", "icd10", "sec_names", "persons", "banks"}


def test_splink_scores_the_given_pairs_in_their_order() -> None:
    splits = person_pairs()
    train, some = splits.train.first(4000), splits.test.first(600)
    score = splink_scores(train, COLUMNS, seed=0, threads=1)
    scores = score(some)
    assert roc_auc_score(some.label, scores) > 0.97
    order = np.random.default_rng(0).permutation(len(some))
    # The frequency of a value is that among the given records, which are the same ones.
    np.testing.assert_allclose(score(some.take(order)), scores[order], atol=1e-6)


def letters(texts: list[str]) -> np.ndarray:
    """Unit rows of letter counts: an encoder whose nearest neighbours can be told by hand."""
    counts = np.array([[text.count(letter) for letter in "abcdef"] for text in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_the_nearest_text_of_another_owner_is_a_negative() -> None:
    rows = [("1", "1:x", "aab", "aabb", 1, "g"), ("2", "2:y", "cc", "ccd", 1, "h"), ("3", "3:z", "bb", "abb", 1, "h")]
    found = with_nearest(pair_set(rows), letters)
    pairs = set(zip(found.left_text, found.right_text, found.label.tolist(), strict=True))
    assert pairs == {
        ("aab", "aabb", 1), ("cc", "ccd", 1), ("bb", "abb", 1), ("aab", "abb", 0), ("bb", "aabb", 0), ("cc", "aabb", 0),
    }  # fmt: skip


def test_unlabelled_pairs_hold_no_text_that_is_tested() -> None:
    def part(*texts: str) -> PairSet:
        return pair_set([(str(n), str(n), text, f"{text}f", 1, "g") for n, text in enumerate(texts)])

    splits = PairSplits(part("a", "ab"), part("b"), part("c"))
    found = unlabelled_pairs(["c", "cd", "d", "bf", "e"], splits, letters, seed=0)
    texts = {*found.left_text, *found.right_text}
    assert texts <= {"a", "af", "ab", "abf", "cd", "d", "e"}
    assert set(found.left_text) == {"a", "af", "ab", "abf", "cd", "d", "e"}
    assert all(left != right for left, right in zip(found.left_text, found.right_text, strict=True))


def test_a_share_of_labels_is_a_share_of_groups() -> None:
    rows = [(str(n), str(n), f"left {n}", f"right {n}", 1, str(n // 3)) for n in range(90)]
    pairs = pair_set(rows)
    tenth, half = some_groups(pairs, 0.1), some_groups(pairs, 0.5)
    assert len(tenth) == 9
    assert len(half) == 45
    assert set(tenth.group) < set(half.group)
    assert some_groups(pairs, 1.0) is pairs


def test_pairs_come_back_from_disk(tmp_path: Path) -> None:
    pairs = pair_set([("1", "2", "a", "b", 1, "g"), ("1", "3", "a", "c", 0, "g")])
    write_pairs(pairs, tmp_path / "pairs.parquet")
    found = read_pairs(tmp_path / "pairs.parquet")
    assert (found.left_text, found.right_text, found.group) == (pairs.left_text, pairs.right_text, pairs.group)
    assert found.label.tolist() == [1, 0]


def test_the_summary_is_over_the_seeds() -> None:
    (line,) = summary([row("flip", 0.9), row("flip", 0.8, seed=1)])
    assert (line["seeds"], line["auc"], line["f1_spread"]) == (2, pytest.approx(0.85), pytest.approx(0.05))


def test_what_fails_is_told_and_costs_no_other_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes; the training of an unknown method fails."""
    results = Results(tmp_path / "quality.json", QUICK)
    wanted = [*tasks("sec_names"), Task("sec_names", "no_such_method", "test", 0, 1.0)]
    failed = run(wanted, QUICK, tmp_path / "work", results, jobs=2)
    assert [each["method"] for each in results.rows] == ["token_set_ratio"]
    assert len(failed) == 1
    assert "no_such_method" in failed[0]
    assert failed[0] in capsys.readouterr().out


def test_tables_and_the_picture(tmp_path: Path) -> None:
    rows = [row("flip", 0.9), row("flip", 0.8, seed=1), row("teacher", 0.7), row("flip", 0.6, "sec_names")]
    lines = main_table(rows).splitlines()
    assert lines[0] == "| method | icd9 | sec_names |"
    assert lines[2] == "| teacher | 35.0 / 70.0 |  |"
    assert lines[3] == "| flip | 42.5 ± 2.5 / 85.0 | 30.0 / 60.0 |"
    swept = [row("flip", 0.8), row("rank 16", 0.7), row("layer 5", 0.9)]
    assert [line.split(" | ")[0] for line in sweep_table(swept).splitlines()[2:]] == [
        "| nothing",
        "| layer 5",
        "| rank 16",
    ]
    assert "+5.0 / +10.0" in sweep_table(swept)
    few = [{**each, "labels": 0.1} for each in rows]
    draw([*rows, *few], tmp_path / "labels.svg")
    picture = (tmp_path / "labels.svg").read_text()
    assert "icd9" in picture
    assert "student, flipped" in picture
