from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import QUICK, Results, ratios, run
from benchmarks.quality_sets import DATASETS, unlabelled_pairs, with_nearest
from benchmarks.quality_trial import METHODS, STUDENTS
from flipkd.demo.pair_sets import PairSet, PairSplits, pair_set


def row(method: str, auc: float, dataset: str = "icd9", seed: int = 0) -> dict[str, object]:
    figures = {"f1": auc / 2, "auc": auc, "ap": auc, "seconds": 1.0, "steps": 5}
    return {"dataset": dataset, "method": method, "split": "test", "seed": seed, **figures}


def test_a_finished_row_is_in_the_file_at_once_and_is_not_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "quality.json"
    run(["icd9", "sec_names"], ["token_set_ratio"], 0, QUICK, tmp_path / "work", Results(path, QUICK))
    found = json.loads(path.read_text())
    assert found.keys() == {"rows", "settings", "machine", "versions"}
    assert [(each["dataset"], each["method"], each["seed"]) for each in found["rows"]] == [
        ("icd9", "token_set_ratio", 0),
        ("sec_names", "token_set_ratio", 0),
    ]
    names = ["dataset", "method", "split", "seed", "f1", "auc", "ap", "seconds", "steps"]
    names += ["texts_per_second", "parameters"]
    assert all(list(each) == names for each in found["rows"])
    assert all(0.6 < each["auc"] < 0.95 for each in found["rows"])
    capsys.readouterr()

    before = path.stat().st_mtime_ns
    run(["icd9", "sec_names"], ["token_set_ratio"], 0, QUICK, tmp_path / "work", Results(path, QUICK))
    assert capsys.readouterr().out == ""
    assert path.stat().st_mtime_ns == before
    run(["icd9"], ["token_set_ratio"], 1, QUICK, tmp_path / "work", Results(path, QUICK))
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
    assert STUDENTS["flip_unlabelled"].loss == flip
    assert set(METHODS) >= set(STUDENTS)
    assert set(DATASETS) == {"icd9", "icd10", "sec_names", "banks"}


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
