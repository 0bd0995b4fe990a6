"""``--top-k`` is exact over units and files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flipkd.config import ScoreConfig
from flipkd.run.pipeline import score
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
