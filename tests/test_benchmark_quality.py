from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import DATASETS, LOSSES, METHODS, QUICK, Results, ratios, run


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
    flip = LOSSES["flip"]
    assert LOSSES["flip_without_mcl"] == replace(flip, weight_mcl=0.0)
    assert LOSSES["flip_without_dist"] == replace(flip, weight_pairs=0.0, weight_matrix=0.0)
    assert set(METHODS) >= set(LOSSES)
    assert set(DATASETS) == {"icd9", "sec_names"}
