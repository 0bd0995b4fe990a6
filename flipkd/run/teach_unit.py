"""Score one unit of pairs with a teacher. One unit in, one file out, rows in input order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.config import EncoderOptions
from flipkd.data.location import Location
from flipkd.data.pairs import distinct_texts, first_reasons, resolve_texts, text_reasons
from flipkd.data.shards import ShardReader
from flipkd.data.teacher_scores import TEACHER_SCORE, TeacherFacts
from flipkd.kernels.pair_score import pair_score
from flipkd.run.join import JOIN_REASON
from flipkd.run.manifest import UnitReport
from flipkd.run.pair_unit import ScoredBatch, StageClock, reason_column, write_scored
from flipkd.run.score_unit import TEXT_BATCH_ROWS
from flipkd.run.units import WorkUnit
from flipkd.vectors.store import VectorStore

if TYPE_CHECKING:
    from flipkd.models.cross_encoder import CrossEncoder


@dataclass(frozen=True)
class TeachTask:
    """What a worker needs to score any unit of a job.

    Args:
        pairs: root of the pair table; joined pairs, if the job's are pairs of ids.
        output: the output folder.
        run_fingerprint: of the run; as bytes, the key under which teacher vectors are found.
        teacher: what the scores mean; its text columns are what is scored.
    """

    pairs: Location
    output: Location
    run_fingerprint: str
    teacher: TeacherFacts


@dataclass(frozen=True)
class TaughtPairs:
    """Scores of P pairs: ``scores`` float32 [P]; ``reason`` uint8 [P] and ``truncated`` bool [P] as in ``PairRows``."""

    scores: npt.NDArray[np.float32]
    reason: npt.NDArray[np.uint8] | None
    truncated: npt.NDArray[np.bool_] | None
    counts: Mapping[str, int] = field(default_factory=dict)


Teacher = Callable[[pa.ChunkedArray, pa.ChunkedArray], TaughtPairs]


class BiEncoderWorker:
    """Maps the store of teacher vectors once; a score is the float32 dot product of two of its rows, their cosine."""

    def __init__(self, task: TeachTask, store: str, threads: int) -> None:
        self._task, self._threads = task, threads
        self._store = VectorStore.open(store)

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        return _teach(self._task, unit, self._score, by_unit=False)

    def _score(self, left: pa.ChunkedArray, right: pa.ChunkedArray) -> TaughtPairs:
        task, store = self._task, self._store
        key = bytes.fromhex(task.run_fingerprint)
        rows = resolve_texts(left, right, store, key, task.teacher.text_columns, self._threads)
        scores = pair_score(store.rows, store.rows, rows.left, rows.right, threads=self._threads).score
        return TaughtPairs(scores, rows.reason, rows.truncated)


class CrossEncoderWorker:
    """Loads a cross-encoder once; each distinct pair of a unit is scored once."""

    def __init__(self, task: TeachTask, options: EncoderOptions, threads: int) -> None:
        from flipkd.models.cross_encoder import load_cross_encoder

        self._task, self._max_tokens = task, options.max_tokens
        self._encoder: CrossEncoder = load_cross_encoder(
            options.folder,
            dtype=options.dtype,
            device=options.device,
            max_length=options.max_length,
            trust_remote_code=options.trust_remote_code,
            threads=threads,
        )

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        return _teach(self._task, unit, self._score, by_unit=True)

    def _score(self, left: pa.ChunkedArray, right: pa.ChunkedArray) -> TaughtPairs:
        sides, reasons = [], []
        for column, name in zip((left, right), self._task.teacher.text_columns, strict=True):
            texts, places = distinct_texts(column, name)
            sides.append((texts.values.to_pylist(), places))
            reasons.append(text_reasons(texts)[places])
        reason = first_reasons(*reasons)
        scored = np.flatnonzero(reason == 0)
        found = self._encoder.score_pairs(
            *([texts[place] for place in places[scored]] for texts, places in sides), max_tokens=self._max_tokens
        )
        scores, truncated = np.full(len(reason), np.nan, np.float32), np.zeros(len(reason), np.bool_)
        scores[scored], truncated[scored] = found.scores, found.truncated
        return TaughtPairs(scores, reason, truncated, {"distinct_pairs": found.distinct})


def _teach(task: TeachTask, unit: WorkUnit, teacher: Teacher, *, by_unit: bool) -> UnitReport:
    """Reads, scores and commits a unit.

    Args:
        task: of the job.
        unit: the unit.
        teacher: scores the two text columns of a table.
        by_unit: whether the teacher is given the whole unit at once.
    """
    with ShardReader(task.pairs, unit.shard, may_skip=True) as reader:
        names = reader.schema.names
        columns = list(dict.fromkeys([*task.teacher.text_columns, *names]))
        batches = unit.read(reader, columns, TEXT_BATCH_ROWS)
        if by_unit:
            batches = iter([pa.concat_tables(batches)])

        def scored(table: pa.Table, clock: StageClock) -> ScoredBatch:
            left, right = (table.column(name) for name in task.teacher.text_columns)
            taught = clock.timed("score", teacher, left, right)
            reason = taught.reason
            if JOIN_REASON in names:
                # A pair whose texts could not be joined has a null text: that is not why.
                joined = table.column(JOIN_REASON).to_numpy()
                reason = joined if reason is None else np.where(joined != 0, joined, reason)
            return ScoredBatch(_assemble(table.select(names), taught, reason), reason, taught.truncated, taught.counts)

        return write_scored(
            unit,
            reader,
            batches,
            scored,
            output=task.output,
            kind="teach",
            run_fingerprint=task.run_fingerprint,
            metadata=task.teacher.footer(),
        )


def _assemble(table: pa.Table, taught: TaughtPairs, reason: npt.NDArray[np.uint8] | None) -> pa.Table:
    """The rows of a batch with their scores, null where there is a reason."""
    if JOIN_REASON in table.schema.names:
        table = table.drop_columns([JOIN_REASON])
    rows = table.num_rows
    scores = pa.array(taught.scores, pa.float32(), mask=None if reason is None else reason != 0)
    truncated = np.zeros(rows, np.bool_) if taught.truncated is None else taught.truncated
    table = table.append_column(TEACHER_SCORE, scores)
    table = table.append_column("reason", reason_column(reason, rows))
    return table.append_column("truncated", pa.array(truncated))
