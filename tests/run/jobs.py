"""One small job of every kind, over the same real records: for tests of what all jobs have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig, TeachConfig
from flipkd.models.llm_options import LlmOptions
from flipkd.run.cascade import score_and_rescore
from flipkd.run.encode import encode
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score import score
from flipkd.run.teach import teach
from tests.run.conftest import RECORDS, World, record_id

FILES, ROWS = 3, 20


@dataclass(frozen=True)
class SmallJob:
    """A job that has not run yet.

    Args:
        run: runs it, with these ``RunOptions``; returns the manifest.
        output: where.
        last: kind of its last stage.
        command: its name.
    """

    run: Callable[[RunOptions], dict[str, Any]]
    output: Path
    last: str
    command: str


def make_inputs(world: World, folder: Path) -> None:
    """``ids``: pairs of ids, some of them of no record; ``texts``: inline pairs with a label."""
    generator = np.random.default_rng(0)
    for name in ("ids", "texts"):
        (folder / name).mkdir(parents=True)
    for file in range(FILES):
        left, right = generator.integers(0, RECORDS, (2, ROWS))
        ids = pa.table({"left_id": left + record_id(0), "right_id": np.append(right[1:] + record_id(0), 5)})
        pq.write_table(ids, folder / f"ids/{file}.parquet")
        same = generator.random(ROWS) < 0.5
        columns = {
            "left_text": [world.texts[0][row] for row in left],
            "right_text": [world.texts[1][row] for row in np.where(same, left, right)],
            "label": same.astype(np.int8),
        }
        pq.write_table(pa.table(columns), folder / f"texts/{file}.parquet")


def make_job(name: str, world: World, llm: Path, folder: Path) -> SmallJob:
    """The job of that name, over inputs that are made in ``folder``."""
    make_inputs(world, folder)
    output, encoder = folder / "out", EncoderOptions(world.encoder)
    options: dict[str, Any]
    ids, texts = str(folder / "ids"), str(folder / "texts")

    def job(function: Callable[[Any], dict[str, Any]], config: Any, last: str) -> SmallJob:
        return SmallJob(lambda run: function(replace(config, run=run)), output, last, last)

    if name == "encode":
        return job(encode, EncodeConfig(encoder, world.left, str(output), rows_per_unit=20), "encode")
    if name == "teach":
        return job(teach, TeachConfig(encoder, texts, str(output)), "teach")
    if name == "teach-ids":
        config = TeachConfig(encoder, ids, str(output), records=world.left, right_records=world.right)
        return job(teach, config, "teach")
    if name == "rescore":
        score(ScoreConfig(texts, str(folder / "scores"), encoder=encoder, threshold=0.5))
        options = {"llm": LlmOptions(str(llm), device="cpu"), "budget": "50%", "threshold": 0.5}
        return job(rescore, RescoreConfig(scores=str(folder / "scores"), output=str(output), **options), "rescore")
    if name == "cascade":
        first = ScoreConfig(texts, str(output), encoder=encoder)
        second = RescoreConfig(LlmOptions(str(llm), device="cpu"), "", "", band=(0.4, 1.0))

        def both(run: RunOptions) -> dict[str, Any]:
            return score_and_rescore(replace(first, run=run), replace(second, run=run))

        return SmallJob(both, output, "rescore", "score")
    options = {
        "store": {"pairs": ids, "store": world.left_store, "right_store": world.right_store},
        "records": {"pairs": ids, "encoder": encoder, "records": world.left, "right_records": world.right},
        "inline": {"pairs": texts, "encoder": encoder},
        "top-k": {"pairs": ids, "store": world.left_store, "right_store": world.right_store, "top_k": 1},
    }
    options["cache"] = {**options["records"], "cache": str(folder / "cache")}
    return job(score, ScoreConfig(output=str(output), **options[name]), "score")


NAMES = ("encode", "store", "records", "inline", "top-k", "cache", "teach", "teach-ids", "rescore", "cascade")
