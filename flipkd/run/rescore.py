"""The cascade: a copy of ``score``'s output in which an LLM has answered for the pairs near the threshold.

Rows, their order and all columns stay as they are, but for ``probability`` (and ``match``) of the pairs that the LLM
was asked, and two columns more: ``llm_probability`` float32, null where it was not asked, and ``rescore_reason``, why
not (null where it was).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.columns import as_numbers, take_rows
from flipkd.data.location import Location
from flipkd.data.pairs import NOT_SCORED, NOT_SELECTED, distinct_texts, first_reasons, text_reasons
from flipkd.data.record_texts import RecordTexts
from flipkd.data.shards import ShardReader
from flipkd.errors import NotFiniteError
from flipkd.models.folder import absolute_model
from flipkd.models.llm import LlmAnswers, PairLlm, load_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.run.combination import Combination, fit_from_output, write_combination
from flipkd.run.job import Job, available_cores, begin, run_job
from flipkd.run.join import RecordTable, texts_of_ids
from flipkd.run.lock import locked
from flipkd.run.manifest import UnitReport
from flipkd.run.observe import observed
from flipkd.run.output import remove_otherwise_made
from flipkd.run.overlap import refuse_other_kind
from flipkd.run.pair_unit import ScoredBatch, StageClock, reason_column, write_scored
from flipkd.run.plan_rescore import LLM_PROBABILITY, RESCORE_REASON, RescorePlan, plan_rescore
from flipkd.run.ray_session import ray_session
from flipkd.run.rescore_config import RescoreConfig, budget_rows
from flipkd.run.score_unit import TEXT_BATCH_ROWS
from flipkd.run.select import Band, Selection, select_nearest
from flipkd.run.units import WorkUnit


@dataclass(frozen=True)
class RescoreTask:
    """What a worker needs to rescore any unit of a job.

    Args:
        scores: root of the scores.
        output: the output folder.
        run_fingerprint: of the run.
        column: of the scores, which decides.
        selection: which pairs are asked.
        pair_columns: names of the left and right column of texts, or of ids.
        tables: record tables of the ids; empty for texts.
        combination: of answer and score, or None.
        threshold: of the column ``match``, or None.
    """

    scores: Location
    output: Location
    run_fingerprint: str
    column: str
    selection: Selection
    pair_columns: tuple[str, str]
    tables: tuple[RecordTable, ...]
    combination: Combination | None
    threshold: float | None


class RescoreWorker:
    """Loads the LLM (and reads the record tables) once; each distinct pair of a unit is asked once."""

    def __init__(self, task: RescoreTask, options: LlmOptions, threads: int) -> None:
        self._task = task
        tables = [table.read() for table in task.tables]
        self._sides: tuple[RecordTexts, RecordTexts] | None = (tables[0], tables[-1]) if tables else None
        self._llm: PairLlm = load_llm(options, threads)

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        task = self._task
        with ShardReader(task.scores, unit.shard, may_skip=True) as reader:
            names = reader.schema.names
            columns = list(dict.fromkeys([*task.pair_columns, *names]))
            whole = pa.concat_tables(unit.read(reader, columns, TEXT_BATCH_ROWS))

            def scored(table: pa.Table, clock: StageClock) -> ScoredBatch:
                return self._rescore(table, names, unit, clock)

            return write_scored(
                unit,
                reader,
                iter([whole]),
                scored,
                output=task.output,
                kind="rescore",
                run_fingerprint=task.run_fingerprint,
                basis=task.selection.basis(unit.output),
            )

    def ask(self, table: pa.Table) -> tuple[LlmAnswers, npt.NDArray[np.uint8]]:
        """Asks the LLM about pairs.

        Args:
            table: with the columns of the pairs, [P] rows.

        Returns:
            The answers for the pairs that have both texts, and [P] position in ``REASONS`` of why others have none.

        Raises:
            NotFiniteError: the model gives no number for some pairs; ``places`` are rows of the table.
        """
        sides, reasons = [], []
        for place, name in enumerate(self._task.pair_columns):
            column = table.column(name)
            if self._sides is None:
                distinct, places = distinct_texts(column, name)
                own = text_reasons(distinct)[places]
                texts = distinct.values.to_pylist()
            else:
                found, own = texts_of_ids(self._sides[place], column, name)
                texts, places = found.to_pylist(), np.arange(len(found), dtype=np.int32)
            sides.append((texts, places))
            reasons.append(own)
        reason = first_reasons(*reasons)
        asked = np.flatnonzero(reason == 0)
        try:
            answers = self._llm.score_pairs(*([texts[place] for place in places[asked]] for texts, places in sides))
        except NotFiniteError as error:
            raise NotFiniteError(str(error), asked[error.places].tolist()) from error
        return answers, reason

    def _rescore(self, table: pa.Table, names: Sequence[str], unit: WorkUnit, clock: StageClock) -> ScoredBatch:
        task, rows = self._task, table.num_rows
        values = as_numbers(table.column(task.column))
        chosen = task.selection.chosen(values, unit.output)
        reason = np.full(rows, NOT_SELECTED, np.uint8)
        reason[~np.isfinite(values)] = NOT_SCORED
        places = np.flatnonzero(chosen)
        pairs = take_rows(table.select(task.pair_columns), pa.array(places))
        try:
            answers, reason[places] = clock.timed("ask", self.ask, pairs)
        except NotFiniteError as error:
            bad = unit.first_row + places[error.places]
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise NotFiniteError(
                f"the language model gives numbers that are not finite, in float32 too, for {len(bad)} pairs of "
                f"{unit.shard.name} of {task.scores.uri} (rows {shown}, counted from 0): its weights or these texts "
                "are out of range; name another --llm, or leave the pairs out; finished units are kept",
                error.places,
            ) from error
        asked = reason == 0
        llm, truncated = np.zeros(rows, np.float32), np.zeros(rows, np.bool_)
        llm[asked], truncated[asked] = answers.probabilities, answers.truncated
        probability = llm.copy()
        if task.combination is not None:
            scores = as_numbers(table.column("score"))
            probability[asked] = task.combination.probability(llm[asked], scores[asked])
            asked_without_score = asked & ~np.isfinite(scores)
            probability[asked_without_score] = llm[asked_without_score]
        result = _replaced(table.select(names), asked, probability, task.threshold)
        result = result.append_column(LLM_PROBABILITY, pa.array(llm, pa.float32(), mask=~asked))
        result = result.append_column(RESCORE_REASON, reason_column(reason, rows))
        counts = {"rescored": int(np.count_nonzero(asked)), "distinct_pairs": answers.distinct}
        return ScoredBatch(result, reason, truncated, {**counts, "tokens": int(answers.tokens.sum())})


def _replaced(
    table: pa.Table, asked: npt.NDArray[np.bool_], probability: npt.NDArray[np.float32], threshold: float | None
) -> pa.Table:
    """The table with the probabilities, and matches, of the pairs that were asked; the others' are untouched."""
    mask = pa.array(asked)
    if "probability" in table.schema.names:
        place = table.schema.get_field_index("probability")
        field = table.schema.field(place)
        own = pa.array(probability).cast(field.type)
        table = table.set_column(place, field, pc.if_else(mask, own, table.column(place)))
    else:
        table = table.append_column("probability", pa.array(probability, pa.float32(), mask=~asked))
    if threshold is not None:
        place = table.schema.get_field_index("match")
        own = pa.array(probability >= threshold)
        table = table.set_column(
            place, table.schema.field(place), pc.if_else(mask, own, table.column(place).cast(pa.bool_()))
        )
    return table


def rescore(config: RescoreConfig) -> dict[str, Any]:
    """Asks the LLM about the pairs near the threshold; a run that was broken off goes on where it was.

    Returns:
        The manifest; ``selection`` in it tells which pairs were asked, ``combination`` what was fitted.

    Raises:
        FlipkdError: see ``flipkd.errors``; what was finished stays, and the same call goes on from there.
    """
    planned = plan_rescore(config)
    with locked(planned.output), ray_session(), observed("rescore", config.run, planned.output):
        refuse_other_kind(planned.output, "rescore")
        return rescore_planned(planned, {})


def rescore_planned(planned: RescorePlan, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a planned job whose output the caller has locked; ``facts`` are further ones for the manifest."""
    selection, about = select_pairs(planned)
    job = _job(planned, selection, about)
    done = begin(job)
    done = remove_otherwise_made(job.output, done, selection.basis)
    manifest = run_job(replace(job, about={**job.about, **facts}), done)
    if planned.config.fit_labels is not None:
        combination, pairs = fit_from_output(planned.output, planned.config.fit_labels)
        write_combination(planned.output, combination, pairs)
    return manifest


def select_pairs(planned: RescorePlan) -> tuple[Selection, dict[str, Any]]:
    """Which pairs are asked, and what the manifest says of it."""
    config, column = planned.config, planned.column
    if config.band is not None:
        return Band(*config.band), {"column": column.name, "band": list(config.band)}
    assert config.budget is not None
    assert planned.center is not None
    nearest, pairs, scored = select_nearest(
        column,
        planned.plan.units,
        planned.center,
        partial(budget_rows, config.budget),
        config.run.threads or available_cores(),
    )
    about = {"budget": config.budget, "center": planned.center, "pairs": pairs, "scored_pairs": scored}
    return nearest, {"column": column.name, **about}


def rescore_task(planned: RescorePlan, selection: Selection) -> RescoreTask:
    config = planned.config
    return RescoreTask(
        scores=planned.scores,
        output=planned.output,
        run_fingerprint=planned.run_fingerprint,
        column=planned.column.name,
        selection=selection,
        pair_columns=config.pair_columns,
        tables=planned.tables,
        combination=planned.combination,
        threshold=planned.threshold,
    )


def _job(planned: RescorePlan, selection: Selection, about: dict[str, Any]) -> Job:
    config = planned.config
    prompt_file = config.llm.prompt_file and os.path.abspath(config.llm.prompt_file)
    llm = replace(config.llm, folder=absolute_model(config.llm.folder), prompt_file=prompt_file)
    return Job(
        kind="rescore",
        output=planned.output,
        plan=planned.plan,
        fingerprint=planned.run_fingerprint,
        make_worker=partial(RescoreWorker, rescore_task(planned, selection), llm),
        run=config.run,
        unit_name="pairs",
        uses_model=True,
        output_bytes=5 * planned.plan.rows + planned.plan.bytes_in,
        about={"selection": about, "threshold": planned.threshold, "engine": config.llm.engine},
        device=config.llm.device if config.llm.engine == "torch" else "auto",
    )
