"""Made-up scores whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.report.pairs import LabelledPairs

MakeScores = Callable[..., Path]


def labelled(score: Any, label: Any, weight: Any = None, stratum: Any = None) -> LabelledPairs:
    score = np.asarray(score, np.float32)
    rows = len(score)
    return LabelledPairs(
        score,
        np.asarray(label, np.bool_),
        np.ones(rows) if weight is None else np.asarray(weight, np.float64),
        np.zeros(rows, np.int64) if stratum is None else np.asarray(stratum, np.int64),
        np.arange(rows),
    )


def random_pairs(rows: int = 400, seed: int = 0, share: float = 0.3) -> LabelledPairs:
    generator = np.random.default_rng(seed)
    label = generator.random(rows) < share
    score = np.round(generator.normal(np.where(label, 0.6, 0.4), 0.15), 2)  # rounded: with ties
    return labelled(score, label, generator.uniform(0.5, 3.0, rows))


def score_table(rows: int = 600, seed: int = 0, share: float = 0.3) -> pa.Table:
    """Columns as ``score`` writes them, and ``label``; every 50th row has no score."""
    generator = np.random.default_rng(seed)
    label = generator.random(rows) < share
    score = np.clip(generator.normal(np.where(label, 0.7, 0.4), 0.15), -1, 1).astype(np.float32)
    missing = np.arange(rows) % 50 == 49
    return pa.table(
        {
            "left_id": pa.array(np.arange(rows), pa.int64()),
            "right_id": pa.array(10_000 + np.arange(rows), pa.int64()),
            "country": pa.array(generator.choice(["DE", "FR", "IT"], rows)),
            "label": pa.array(label.astype(np.int8)),
            "score": pa.array(score, mask=missing),
            "reason": pa.array(np.where(missing, "missing_record", None), pa.string()),
        }
    )


@pytest.fixture
def make_scores(tmp_path: Path) -> MakeScores:
    """make_scores(table, files=3, name="scores") -> a folder of the rows, a third of a file in a row group."""

    def make(table: pa.Table | None = None, files: int = 3, name: str = "scores") -> Path:
        table = score_table() if table is None else table
        folder = tmp_path / name
        folder.mkdir()
        size = -(-table.num_rows // files)
        for file in range(files):
            part = table.slice(file * size, size)
            pq.write_table(part, folder / f"part-{file}.parquet", row_group_size=max(size // 3, 1))
        return folder

    return make
