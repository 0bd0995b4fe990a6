"""Score one unit of pairs: read, resolve to store rows, run the kernel, write. One unit in, one file out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from flipkd.config import SCORE_COLUMNS
from flipkd.data.calibration import Calibration, kernel_arguments, probabilities
from flipkd.data.columns import first_clash, take_rows
from flipkd.data.location import Location
from flipkd.data.pairs import PairRows, resolve_ids, resolve_texts
from flipkd.data.shards import ShardReader
from flipkd.errors import ColumnError, ConfigError, InputError
from flipkd.kernels.pair_score import PairScores, pair_score
from flipkd.run.manifest import UnitReport
from flipkd.run.pair_unit import ScoredBatch, StageClock, reason_column, write_scored
from flipkd.run.top_k import LEFT_ROW, SCORE, best_positions
from flipkd.run.units import WorkUnit
from flipkd.vectors.store import VectorStore

# Rows read, scored and written at a time: bounds a worker's memory, whatever the size of a unit.
_BATCH_ROWS = 1 << 20
TEXT_BATCH_ROWS = 1 << 15


@dataclass(frozen=True)
class ScoreTask:
    """What a worker needs to score any unit of a job.

    Args:
        pairs: root of the pair table.
        output: the output folder.
        run_fingerprint: of the run.
        store: path of the left (and right) records' vector store.
        right_store: path of the right records' store, where they differ.
        pair_columns: names of the left and right column of ids, or of inline texts.
        digest_key: for inline texts: the key under which the store's ids are the digests of texts.
        columns: output columns in order; None means all input columns, then the score columns.
        calibration: from a score to the probability, or None.
        threshold: for the column ``match``.
        min_score: only pairs with at least this score are written.
        top_k: only the K best pairs of each left record *within a batch* are written, with the columns that
            ``flipkd.run.top_k`` compares them by.
        basis: fingerprint of the records that could not be read, see ``UnitReport``; empty where all could.
    """

    pairs: Location
    output: Location
    run_fingerprint: str
    store: str
    right_store: str | None
    pair_columns: tuple[str, str]
    digest_key: bytes | None
    columns: tuple[str, ...] | None
    calibration: Calibration | None
    threshold: float | None
    min_score: float | None
    top_k: int | None = None
    basis: str = ""


def output_columns(task: ScoreTask, input_names: Sequence[str], folder_names: Sequence[str] = ()) -> list[str]:
    """Names of the output's columns, in order.

    Args:
        task: of the job.
        input_names: columns of the file.
        folder_names: keys of its folders, as in ``year=2026``, which the output keeps.

    Raises:
        ConfigError: a score column is asked for that the options do not give, or an input column has the name of
            one, in upper or lower case; where all columns are written, of one that the options do not give, too.
    """
    made = ["score"]
    if task.calibration is not None:
        made.append("probability")
    if task.threshold is not None:
        made.append("match")
    made += ["reason", "truncated"]
    written = [name for name in made if task.columns is None or name in task.columns]
    clash = first_clash(folder_names, written)
    if clash is not None:
        raise ColumnError(f"a folder of the pairs, {clash}=..., has the name of a column of the output; rename it")
    if task.columns is None:
        known = [name for name in SCORE_COLUMNS if name in input_names]
        clash = known[0] if known else first_clash(input_names, made)
        if clash is not None:
            raise ColumnError(
                f"the pairs have a column {clash!r} already; rename it, or name the columns to write with --columns"
            )
        return [*input_names, *made]
    clash = first_clash([name for name in task.columns if name not in SCORE_COLUMNS], written)
    if clash is not None:
        raise ColumnError(f"--columns names {clash!r} and {clash.lower()!r}, one name to many programs; drop one")
    for name in task.columns:
        if name in SCORE_COLUMNS and name not in made:
            option = "--calibration" if name == "probability" else "--threshold"
            raise ConfigError(f"--columns asks for {name!r}, which needs {option}")
    return list(task.columns)


class ScoreWorker:
    """Maps the stores once and scores units."""

    def __init__(self, task: ScoreTask, threads: int) -> None:
        self._task, self._threads = task, threads
        self._left = VectorStore.open(task.store)
        self._right = self._left if task.right_store is None else VectorStore.open(task.right_store)

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        task = self._task
        with ShardReader(task.pairs, unit.shard, may_skip=True) as reader:
            names = output_columns(task, reader.schema.names)
            passed = [name for name in names if name not in SCORE_COLUMNS]
            columns = list(dict.fromkeys([*task.pair_columns, *passed]))
            batch_rows = _BATCH_ROWS if task.digest_key is None else TEXT_BATCH_ROWS

            def scored(table: pa.Table, clock: StageClock) -> ScoredBatch:
                pairs = clock.timed("look_up", self._resolve, table)
                result = clock.timed("score", self._score_batch, table, pairs, names)
                return ScoredBatch(result, pairs.reason, pairs.truncated)

            return write_scored(
                unit,
                reader,
                unit.read(reader, columns, batch_rows),
                scored,
                output=task.output,
                kind="score",
                run_fingerprint=task.run_fingerprint,
                basis=task.basis,
            )

    def _score_batch(self, table: pa.Table, pairs: PairRows, names: Sequence[str]) -> pa.Table:
        task = self._task
        may_be_nan = not self._left.rows.dtype == self._right.rows.dtype == "int8"
        scores = pair_score(
            self._left.rows,
            self._right.rows,
            pairs.left,
            pairs.right,
            calibration=kernel_arguments(task.calibration),
            min_score=None if may_be_nan else task.min_score,
            threads=self._threads,
        )
        if may_be_nan:
            self._refuse_nan(pairs, scores)
            if task.min_score is not None:
                scores = _survivors(scores, task.min_score)
        if task.calibration is not None and scores.probability is None:  # a form that the kernel does not compute
            scores = replace(scores, probability=probabilities(task.calibration, scores.score))
        if task.top_k is not None:
            return best_of_batch(table, pairs, scores, names, task.threshold, task.top_k)
        return assemble(table, pairs, scores, names, task.threshold)

    def _refuse_nan(self, pairs: PairRows, scores: PairScores) -> None:
        """An encoder never writes such a vector, so the store is damaged; --min-score must not hide it."""
        if np.isnan(scores.score[pairs.left >= 0]).any():
            stores = " or ".join(dict.fromkeys([str(self._left.path), str(self._right.path)]))
            raise InputError(f"a vector of the store {stores} is not a number; encode the records again")

    def _resolve(self, table: pa.Table) -> PairRows:
        task = self._task
        left, right = (table.column(name) for name in task.pair_columns)
        if task.digest_key is None:
            return resolve_ids(left, right, self._left, self._right, task.pair_columns, self._threads)
        return resolve_texts(left, right, self._left, task.digest_key, task.pair_columns, self._threads)


def _survivors(scores: PairScores, min_score: float) -> PairScores:
    """What the kernel does with int8 rows as it scores them."""
    kept = np.flatnonzero(scores.score >= np.float64(min_score))  # NumPy would round a plain number to float32
    probability = None if scores.probability is None else scores.probability[kept]
    return PairScores(scores.score[kept], probability, kept)


def assemble(
    table: pa.Table, pairs: PairRows, scores: PairScores, names: Sequence[str], threshold: float | None
) -> pa.Table:
    """The output rows of a batch: pass-through columns untouched, score columns null where there is a reason."""
    unscored = None if pairs.reason is None else pairs.reason != 0
    reason, truncated = pairs.reason, pairs.truncated
    if scores.position is not None:  # survivors only; a pair without a score is none
        take = pa.array(scores.position)
        table = take_rows(table, take)
        unscored = None
        reason = None if reason is None else reason[scores.position]
        truncated = None if truncated is None else truncated[scores.position]
    columns: dict[str, Any] = {}
    for name in names:
        if name == "score":
            columns[name] = pa.array(scores.score, pa.float32(), mask=unscored)
        elif name == "probability":
            columns[name] = pa.array(scores.probability, pa.float32(), mask=unscored)
        elif name == "match":
            assert threshold is not None
            judged = scores.score if scores.probability is None else scores.probability
            columns[name] = pa.array(judged >= threshold, pa.bool_(), mask=unscored)
        elif name == "reason":
            columns[name] = reason_column(reason, len(scores.score))
        elif name == "truncated":
            columns[name] = pa.array(np.zeros(len(scores.score), np.bool_) if truncated is None else truncated)
        else:
            columns[name] = table.column(name)
    fields = [
        table.schema.field(name) if name not in SCORE_COLUMNS else pa.field(name, columns[name].type) for name in names
    ]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def best_of_batch(
    table: pa.Table, pairs: PairRows, scores: PairScores, names: Sequence[str], threshold: float | None, k: int
) -> pa.Table:
    """Like ``assemble``, for the K best pairs of each left record, with the row of that record and the score."""
    left = pairs.left if scores.position is None else pairs.left[scores.position]
    best = best_positions(left, scores.score, k)
    chosen = PairScores(
        score=scores.score[best],
        probability=None if scores.probability is None else scores.probability[best],
        position=best if scores.position is None else scores.position[best],
    )
    result = assemble(table, pairs, chosen, names, threshold)
    result = result.append_column(LEFT_ROW, pa.array(left[best].astype(np.int64)))
    return result.append_column(SCORE, pa.array(chosen.score))
