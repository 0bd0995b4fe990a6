"""What ``rescore --dry-run`` tells: pairs, tokens and time, from a short measurement."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from flipkd.data.columns import take_rows
from flipkd.data.shards import ShardReader
from flipkd.errors import InputError
from flipkd.run.job import available_cores
from flipkd.run.plan_rescore import RescorePlan, plan_rescore
from flipkd.run.rescore import RescoreWorker, rescore_task, select_pairs
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score_unit import TEXT_BATCH_ROWS
from flipkd.run.select import Selection

# Pairs that are asked, to measure how long one takes: our choice, some seconds for a small model on a CPU.
_SAMPLE_PAIRS = 64


def dry_run(config: RescoreConfig) -> dict[str, Any]:
    """What a run would do: pairs that would be asked, their tokens and the time, from a measurement on this machine.

    Asks the LLM about the first few of the pairs, and takes the others for alike.
    """
    planned = plan_rescore(config)
    selection, about = select_pairs(planned)
    started = time.perf_counter()
    worker = RescoreWorker(rescore_task(planned, selection), config.llm, config.run.threads or available_cores())
    load_seconds = time.perf_counter() - started
    pairs, sample = _sample(planned, selection)
    worker.ask(sample.slice(0, 2))  # the first call pays for what later ones find ready
    started = time.perf_counter()
    answers, _ = worker.ask(sample)
    seconds = time.perf_counter() - started
    asked = len(answers.tokens)
    per_pair, tokens = (seconds / asked, answers.tokens.sum() / asked) if asked else (0.0, 0.0)
    return {
        "units": len(planned.plan.units),
        "pairs": planned.plan.rows,
        "pairs_to_rescore": pairs,
        "tokens": round(tokens * pairs),
        "sample_pairs": asked,
        "pairs_per_second": round(1 / per_pair, 1) if per_pair else None,
        "load_seconds": round(load_seconds, 1),
        "seconds": round(load_seconds + per_pair * pairs, 1),
        "selection": about,
    }


def _sample(planned: RescorePlan, selection: Selection) -> tuple[int, pa.Table]:
    """How many pairs are selected, and the first of them."""
    names = list(dict.fromkeys([*planned.config.pair_columns, planned.column.name]))
    count, taken = 0, 0
    parts: list[pa.Table] = []
    for unit in planned.plan.units:
        try:
            values = np.concatenate([*planned.column.values(unit), np.empty(0)])
            chosen = selection.chosen(values, unit.output)
        except InputError:
            if not planned.column.skip_bad_shards:
                raise
            continue
        count += int(np.count_nonzero(chosen))
        if taken < _SAMPLE_PAIRS and (chosen.any() or not parts):
            with ShardReader(planned.scores, unit.shard) as reader:
                table = pa.concat_tables(unit.read(reader, names, TEXT_BATCH_ROWS))
            parts.append(take_rows(table, pa.array(np.flatnonzero(chosen)[: _SAMPLE_PAIRS - taken])))
            taken += parts[-1].num_rows
    if not parts:
        raise InputError(f"no file of {planned.scores.uri} can be read")
    return count, pa.concat_tables(parts)
