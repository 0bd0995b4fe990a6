"""What a cascade would cost: pairs, tokens and seconds per stage, from a run of both stages over a small sample here.

The sample is some rows of some units with their records. It is scored by the real job, into a folder that is deleted;
the LLM is asked about some of its pairs. Reading, looking up, scoring and writing are measured on many copies of the
sample, or else the opening of files would be most of it. All of it runs in this process: on Ray divide by the workers.
Vectors that a cache holds already would cost less than is said here.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.config import RunOptions, ScoreConfig
from flipkd.data.columns import as_numbers
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError
from flipkd.run import score as score_job
from flipkd.run.cascade import Cascade, as_cascade, check_cascade
from flipkd.run.join import record_tables
from flipkd.run.plan_score import ScorePlan, plan_score
from flipkd.run.rescore_config import RescoreConfig, budget_rows
from flipkd.run.rescore_cost import dry_run as dry_run_rescore
from flipkd.run.select import Band

# Our choices: some hundred texts to encode, enough rows that reading and writing are not all overhead.
_SAMPLE_UNITS, _SAMPLE_ROWS, _TIMED_UNITS, _TIMED_ROWS = 8, 256, 16, 200_000
_EVERYTHING = (-math.inf, math.inf)


def dry_run(score: ScoreConfig, rescore: RescoreConfig) -> dict[str, Any]:
    """Estimates a job of ``flipkd.run.cascade.score_and_rescore``; the same arguments, and the same errors.

    Returns:
        ``pairs``, ``units``, ``stages`` and ``seconds``. Of each stage: ``kind``, how many of what, the rate and the
        ``load_seconds`` of a model that were measured, and ``seconds``.
    """
    job = as_cascade(score, rescore)
    planned = plan_score(job.score)
    check_cascade(job, planned)
    plan = score_job.dry_run(job.score)
    pairs = planned.job.plan.rows
    if not pairs:
        raise ConfigError(f"--pairs {score.pairs} holds no rows: there is nothing to measure")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sample = _sample(planned)
        pq.write_table(sample, root / "pairs.parquet")
        copies = pa.concat_tables([sample] * -(-_TIMED_ROWS // sample.num_rows))
        pq.write_table(copies, root / "copies.parquet", row_group_size=-(-copies.num_rows // _TIMED_UNITS))
        small = _for_sample(job, root, sample)
        first = score_job.score(replace(small, pairs=str(root / "pairs.parquet"), output=str(root / "scores")))
        many = score_job.score(
            replace(small, pairs=str(root / "copies.parquet"), output=str(root / "many"), rows_per_unit=1)
        )
        asked = dry_run_rescore(
            replace(
                job.rescore,
                scores=str(root / "scores"),
                output=str(root / "rescored"),
                band=_EVERYTHING,
                budget=None,
                fit_labels=None,
            )
        )
        chosen = _chosen(job.rescore, root / "scores", pairs, sample.num_rows)
    stages = _before_scores(plan["stages"], first, many, pairs)
    scoring = many["wall_seconds"] + many["stages"].get("candidates", {}).get("wall_seconds", 0.0)
    stages.append({"kind": "score", "pairs": pairs, **_timed("pairs", pairs, copies.num_rows, scoring)})
    rate = asked["pairs_per_second"]
    stages.append(
        {
            "kind": "rescore",
            "pairs": chosen,
            "tokens": round(asked["tokens"] / max(asked["pairs_to_rescore"], 1) * chosen),
            "pairs_per_second": rate,
            "load_seconds": asked["load_seconds"],
            "seconds": round(asked["load_seconds"] + (chosen / rate if rate else 0.0), 1),
        }
    )
    return {
        "files": plan["files"],
        "units": plan["units"],
        "pairs": pairs,
        "sample_pairs": sample.num_rows,
        "stages": stages,
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
    }


def _sample(planned: ScorePlan) -> pa.Table:
    """The first rows of some units, spread over all; candidates of one left record often stand together."""
    units = [unit for unit in planned.job.plan.units if unit.rows]
    parts: list[pa.Table] = []
    places = sorted({round(place) for place in np.linspace(0, len(units) - 1, _SAMPLE_UNITS)})
    for unit in (units[place] for place in places):
        with ShardReader(planned.task.pairs, unit.shard) as reader:
            table = next(unit.read(reader, reader.schema.names, _SAMPLE_ROWS // min(len(units), _SAMPLE_UNITS)))
        parts.append(table)
    return pa.concat_tables(parts, promote_options="permissive")


def _for_sample(job: Cascade, root: Path, sample: pa.Table) -> ScoreConfig:
    """The configuration over the sample: record tables of its records alone, one process, a cache of its own."""
    config = job.score
    small = replace(
        config, cache=str(root / "cache"), cache_limit_bytes=None, run=RunOptions(threads=config.run.threads)
    )
    if config.records is None:
        return small
    tables: dict[str, Any] = {}
    text_column = f"text of {config.id_column}"  # another name than that of the ids
    ids = [sample.column(name) for name in config.pair_columns]
    places_of = {"records": ids} if config.right_records is None else {"records": ids[:1], "right_records": ids[1:]}
    # The second stage knows the template that the encoder records, if it does.
    told = replace(config, text_column=job.rescore.text_column, template=job.rescore.template)
    for table, (name, columns) in zip(record_tables(told.record_sides), places_of.items(), strict=True):
        records = table.read()
        found = np.unique(np.concatenate([records.look_up(column, table.id_column) for column in columns]))
        places = pa.array(found[found >= 0])
        sampled = {config.id_column: records.ids.take(places), text_column: records.texts.take(places)}
        pq.write_table(pa.table(sampled), root / f"{name}.parquet")
        tables[name] = str(root / f"{name}.parquet")
    as_left: dict[str, Any] = {"right_id_column": None, "right_text_column": None, "right_template": None}
    return replace(small, text_column=text_column, template=None, **as_left, **tables)


def _before_scores(
    planned: list[dict[str, Any]], first: dict[str, Any], many: dict[str, Any], pairs: int
) -> list[dict[str, Any]]:
    """The stages before the scores: texts are listed (inline pairs alone), and encoded."""
    found = []
    for stage in planned:
        name = stage["kind"]
        if name == "texts":
            done = many["stages"][name]
            timed = _timed("pairs", pairs, done["rows_in"], done["wall_seconds"])
            found.append({"kind": name, "pairs": pairs, **timed})
    encodes = [(name, done) for name, done in first["stages"].items() if name.startswith("encode")]
    estimates = [stage["distinct_texts_estimate"] for stage in planned if stage["kind"] == "encode"]
    for texts, (name, done) in zip(estimates, encodes, strict=True):
        encoded = max(done["counts"].get("distinct_texts", 0), 1)
        seconds = dict(done["seconds"])
        load = seconds.pop("load", 0.0)
        timed = _timed("texts", texts, encoded, sum(seconds.values()))
        found.append(
            {
                "kind": name,
                "distinct_texts": texts,
                "tokens": round(done["counts"].get("tokens", 0) / encoded * texts),
                **timed,
                "load_seconds": round(load, 1),
                "seconds": round(timed["seconds"] + load, 1),
            }
        )
    return found


def _timed(unit: str, wanted: int, measured: int, seconds: float) -> dict[str, Any]:
    """The rate of a stage, and the seconds that it takes for so many."""
    each = seconds / max(measured, 1)
    return {f"{unit}_per_second": round(1 / each, 1) if each else None, "seconds": round(each * wanted, 1)}


def _chosen(config: RescoreConfig, scores: Path, pairs: int, sample_rows: int) -> int:
    """Pairs that the LLM would be asked: of the scored ones, of whom the sample tells how many there will be."""
    parts = [pq.read_table(path) for path in sorted(scores.rglob("*.parquet"))]
    table = pa.concat_tables(parts)
    name = "probability" if "probability" in table.schema.names else "score"
    values = as_numbers(table.column(name))
    scored = int(np.isfinite(values).sum())
    if config.band is not None:
        scored = int(Band(*config.band).chosen(values, "").sum())
        return round(scored / sample_rows * pairs)
    assert config.budget is not None
    return budget_rows(config.budget, round(scored / sample_rows * pairs))
