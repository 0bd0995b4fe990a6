from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.cascade import SHARES, draw, gains, mixed
from benchmarks.cascade_prefixes import grouped_pairs
from flipkd.data.commit import write_json
from flipkd.data.location import open_location
from flipkd.run.combination import Combination, write_combination


def rows(f1: list[float], dataset: str = "icd9") -> list[dict[str, Any]]:
    return [
        {"dataset": dataset, "encoder": "minilm", "share": share, "f1": value, "ap": value / 2}
        for share, value in zip(SHARES, f1, strict=True)
    ]


def test_gains_are_parts_of_the_gain_of_asking_about_everything() -> None:
    found = gains([*rows([0.5, 0.5, 0.6, 0.68, 0.7, 0.7]), *rows([0.9, 0.9, 0.9, 0.91, 0.9, 0.85], "sec_names")])
    assert found == {"icd9_minilm_f1_gain_at_5": 0.9, "icd9_minilm_ap_gain_at_5": 0.9}  # none where it brings nothing


def test_what_a_smaller_share_would_give_is_chosen_as_a_job_chooses(tmp_path: Path) -> None:
    probability = np.linspace(0.025, 0.975, 20).astype(np.float32)
    answers, scores = (1 - probability).astype(np.float32), (2 * probability - 1).astype(np.float32)
    for name, more in (("scores", {}), ("rescored", {"llm_probability": answers})):
        (tmp_path / name).mkdir()
        table = pa.table({"score": scores, "probability": probability, **more})
        for part in range(2):
            pq.write_table(table.slice(part * 10, 10), tmp_path / name / f"part-{part}.parquet")
    write_json(open_location(tmp_path / "scores"), "_manifest.json", {"threshold": 0.5})
    combination = Combination(1.0, 0.5, 0.1)
    write_combination(open_location(tmp_path / "rescored"), combination, 20)
    chosen, before, after = mixed(tmp_path / "scores", tmp_path / "rescored", "20%")
    assert np.flatnonzero(chosen).tolist() == [8, 9, 10, 11]
    np.testing.assert_allclose(before, probability, atol=1e-6)
    np.testing.assert_allclose(after, combination.probability(answers, scores), atol=1e-6)
    assert not mixed(tmp_path / "scores", tmp_path / "rescored", "0%")[0].any()


def test_groups_of_candidates_hold_the_match(icd9: list[tuple[str, str, str]]) -> None:
    pairs = grouped_pairs(3)
    assert len(pairs) == 30
    assert len({left for left, _ in pairs}) == 3
    short = {long.lower(): short.lower() for _, long, short in icd9}
    for group in range(3):
        assert short[pairs[10 * group][0]] in [right for _, right in pairs[10 * group : 10 * group + 10]]


def test_the_picture_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(rows([0.5, 0.5, 0.6, 0.68, 0.7, 0.7]), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
