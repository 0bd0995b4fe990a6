"""``--top-k`` is exact over units and files."""

from __future__ import annotations

import json
import os
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from flipkd.cli import main
from flipkd.config import ScoreConfig
from flipkd.run import score as score_job
from flipkd.run.job import Job
from flipkd.run.score import score
from flipkd.run.status import status
from flipkd.run.top_k import best_positions
from tests.run.conftest import World
from tests.run.test_score import read_scores

MakePairs = Callable[..., Path]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.one_of(st.just(float("nan")), st.integers(-2, 2))), max_size=40),
    st.integers(1, 4),
)
def test_best_positions_against_a_plain_sort(pairs: list[tuple[int, float]], k: int) -> None:
    groups: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for place, (left, value) in enumerate(pairs):
        if value == value:
            groups[left].append((-value, place))
    expected = sorted(place for group in groups.values() for _, place in sorted(group)[:k])
    left = np.array([left for left, _ in pairs], np.int32)
    score_values = np.array([value for _, value in pairs], np.float32)
    assert best_positions(left, score_values, k).tolist() == expected


@pytest.mark.parametrize("min_score", [None, 0.2])
def test_the_best_of_each_left_record_over_all_files(
    world: World, make_pairs: MakePairs, tmp_path: Path, min_score: float | None
) -> None:
    every = ScoreConfig(
        pairs=str(make_pairs(files=4, rows=200)),
        output=str(tmp_path / "every"),
        store=world.left_store,
        right_store=world.right_store,
        rows_per_unit=70,
    )
    score(every)
    best = ScoreConfig(**{**vars(every), "output": str(tmp_path / "best"), "top_k": 2, "min_score": min_score})
    manifest = score(best)
    rows = read_scores(tmp_path / "every").to_pylist()
    groups: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for place, row in enumerate(rows):
        if min_score is None or row["score"] >= min_score:
            groups[row["left_id"]].append((-row["score"], place))
    expected = [rows[place] for place in sorted(p for group in groups.values() for _, p in sorted(group)[:2])]
    found = read_scores(tmp_path / "best")
    assert found.to_pylist() == expected
    assert found.schema == read_scores(tmp_path / "every").schema
    assert (manifest["rows_in"], manifest["rows_out"]) == (800, len(expected))
    assert score(best)["units_resumed"] == manifest["units"]
    assert isinstance(found, pa.Table)


def test_what_is_kept_reaches_a_worker_through_the_disk(
    world: World, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run_job = {}, score_job.run_job

    def watched(job: Job, *rest: Any) -> dict[str, Any]:
        sizes[job.kind] = len(pickle.dumps(job.make_worker))
        return run_job(job, *rest)

    monkeypatch.setattr(score_job, "run_job", watched)
    stores = {"store": world.left_store, "right_store": world.right_store}
    manifest = score(ScoreConfig(str(make_pairs(files=2, rows=3000)), str(tmp_path / "out"), **stores, top_k=1000))
    assert manifest["rows_out"] > 5000
    assert sizes["score"] < 2000  # of what Ray gives to every worker


@pytest.mark.parametrize("broken", ["page", "footer"])
def test_a_skipped_unit_is_counted_and_the_rest_is_compared_again_with_it(
    world: World, make_pairs: MakePairs, tmp_path: Path, broken: str
) -> None:
    pairs = make_pairs(files=3, rows=3000)
    stores = {"store": world.left_store, "right_store": world.right_store}
    score(ScoreConfig(str(pairs), str(tmp_path / "every"), **stores))
    rows = read_scores(tmp_path / "every").to_pylist()

    def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first: dict[int, dict[str, Any]] = {}
        for row in rows:
            if row["left_id"] not in first or row["score"] > first[row["left_id"]]["score"]:
                first[row["left_id"]] = row
        return sorted(first.values(), key=lambda row: row["n"])

    path, output = pairs / "part-001.parquet", tmp_path / "out"
    whole, changed_ns = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(whole[:100] + b"\xff" * 1900 + whole[2000:] if broken == "page" else whole[:-100])
    os.utime(path, ns=(changed_ns, changed_ns))
    arguments = [
        "score", "--pairs", str(pairs), "--output", str(output), "--store", world.left_store, "--right-store",
        world.right_store, "--top-k", "1", "--on-bad-shard", "skip", "--no-progress",
    ]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 3
    assert "partial: 1 files or units were skipped" in done.stderr
    manifest = json.loads((output / "_manifest.json").read_text())
    assert not manifest["complete"]
    skipped = [*manifest["skipped_units"], *manifest["skipped_shards"]]
    assert len(skipped) == 1
    assert "part-001.parquet" in skipped[0]["error"]
    assert (manifest["units"], manifest["rows_in"]) == (2, 6000)
    assert read_scores(output).to_pylist() == best(rows[:3000] + rows[6000:])
    assert status(str(output))["state"] == "partial"

    path.write_bytes(whole)  # the file is as it was, so the names of the outputs are too, but not what survives
    os.utime(path, ns=(changed_ns, changed_ns))
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert read_scores(output).to_pylist() == best(rows)
    assert json.loads((output / "_manifest.json").read_text())["skipped_units"] == []
