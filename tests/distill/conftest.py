"""Real medical pairs with labels and the scores of a noisy teacher, and a small run over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import RunOptions
from flipkd.distill.config import TrainConfig
from flipkd.models.options import StudentOptions

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory, icd9: list[tuple[str, str, str]]) -> Path:
    """Long against short descriptions of 120 codes and their neighbours, with labels and scores of a noisy teacher."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = icd9[:120]
    places = [(i, j) for i in range(len(rows)) for j in (i - 1, i, i + 1) if 0 <= j < len(rows)]
    labels = np.array([i == j for i, j in places], np.int8)
    noise = np.random.default_rng(0).random(len(places))
    table = pa.table(
        {
            "left_text": [rows[i][1].lower() for i, _ in places],
            "right_text": [rows[j][2].lower() for _, j in places],
            "label": labels,
            "teacher_score": (0.4 * labels + 0.5 * noise).astype(np.float32),
        }
    )
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), folder / "part-0.parquet")
    pq.write_table(table.slice(half), folder / "part-1.parquet")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, base_dir: Path, pairs_dir: Path) -> MakeConfig:
    """make_config(steps=4) -> a configuration of a small run in a folder of the test's own."""

    def make(**options: Any) -> TrainConfig:
        student = StudentOptions(str(base_dir), **{"layer": 2, "dimension": 8, "rank": 4, **options.pop("student", {})})
        usual: dict[str, Any] = {
            "pairs": str(pairs_dir), "output": str(tmp_path / "run"), "student": student, "steps": 6, "batch_pairs": 16,
            "evaluate_every": 3, "log_every": 1, "device": "cpu",
            "checkpoint_every": 6,  # the curve is drawn with each: longer than a step
            # Small models gain nothing from more, and OpenMP's busy waiting is slow on a shared machine.
            "run": RunOptions(threads=1),
        }  # fmt: skip
        return TrainConfig(**{**usual, **options})

    return make
