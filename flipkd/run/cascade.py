"""``score`` and ``rescore`` as one job: every pair by the encoder, the uncertain ones by an LLM, one output folder.

The scores are an intermediate result. Unless they are asked for they lie hidden in the output folder
(``.flipkd/scores``) and are deleted once the copy is complete: a running job takes the disk of two tables, a finished
one that of one. A job that was broken off, in either stage, goes on with what is there.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.config import SCORE_COLUMNS, ScoreConfig
from flipkd.data.commit import read_json, write_json
from flipkd.data.find import find_shards
from flipkd.data.location import open_location
from flipkd.data.pairs import PairRows
from flipkd.errors import FlipkdError
from flipkd.kernels.pair_score import PairScores
from flipkd.run import score as score_job
from flipkd.run.lock import locked
from flipkd.run.manifest import MANIFEST, WORK_FOLDER, read_whole_reports
from flipkd.run.observe import observed
from flipkd.run.output import list_outputs, own_outputs, remove_folder, remove_manifest
from flipkd.run.overlap import refuse_other_kind, refuse_overlap
from flipkd.run.plan_rescore import check_scores, plan_rescore
from flipkd.run.plan_score import ScorePlan, plan_score, score_inputs
from flipkd.run.ray_session import ray_session
from flipkd.run.record_template import template_of_scores
from flipkd.run.rescore import rescore_planned
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score_unit import assemble, output_columns
from flipkd.run.stages import summary
from flipkd.run.units import fingerprint, plan_fingerprint

SCORES = f"{WORK_FOLDER}/scores"
_NOTE, _FACT = f"{WORK_FOLDER}/cascade.json", "cascade_fingerprint"


@dataclass(frozen=True)
class Cascade:
    """Two configurations that fit each other.

    Args:
        score: its output is where the scores lie.
        rescore: its scores are those, its output is the job's.
        keeps_scores: whether the scores stay.
    """

    score: ScoreConfig
    rescore: RescoreConfig
    keeps_scores: bool


def as_cascade(score: ScoreConfig, rescore: RescoreConfig, scores: str | None = None) -> Cascade:
    """Fits two configurations together.

    Args:
        score: pairs to scores; its output is that of the whole job.
        rescore: whom to ask about which pairs. Its ``scores`` and ``output`` are not used; ``records`` are those of
            ``score`` where it names none, and the columns are always those of ``score``.
        scores: folder that keeps the scores as they were before the LLM answered; None for none.
    """
    output = open_location(score.output)
    folder = output.child(SCORES).address if scores is None else scores
    names = ("left_text", "right_text", "left_column", "right_column", "id_column")
    records, right_records = rescore.records, rescore.right_records
    if records is None:
        records, right_records = score.records, score.right_records
    of_the_right = ("right_id_column", "right_text_column", "right_template")
    right: dict[str, Any] = {name: getattr(score, name) if right_records is not None else None for name in of_the_right}
    return Cascade(
        replace(score, output=folder),
        replace(
            rescore,
            scores=folder,
            output=score.output,
            records=records,
            right_records=right_records,
            text_column=score.text_column or RescoreConfig.text_column,
            template=template_of_scores(score),
            **{name: getattr(score, name) for name in names},
            **right,
        ),
        scores is not None,
    )


def score_and_rescore(score: ScoreConfig, rescore: RescoreConfig, scores: str | None = None) -> dict[str, Any]:
    """Scores all pairs and lets an LLM answer for the uncertain ones; see ``as_cascade`` for the arguments.

    Returns:
        The manifest of the copy; ``stages`` in it tells of everything before, ``score`` among them.

    Raises:
        FlipkdError: see ``flipkd.errors``; what was finished stays, and the same call goes on from there. What the
            second stage would refuse (columns, prompt, model) is refused before the first one starts.
    """
    job = as_cascade(score, rescore, scores)
    output = open_location(job.rescore.output)
    planned = plan_score(job.score)
    own = check_cascade(job, planned)
    with locked(output), ray_session(), observed("score", job.rescore.run, output):
        refuse_other_kind(output, "rescore")
        note = read_json(output, _NOTE)
        is_same = note is not None and note["fingerprint"] == own
        done = list_outputs(output)[0]
        # Whose folder it is must be known before hours of scoring.
        own_outputs(output, done if is_same else set(), job.rescore.run.overwrite)
        manifest = read_json(output, MANIFEST) or {}
        is_whole = manifest.get(_FACT) == own and manifest["complete"] and len(done) == manifest["units"]
        if not is_whole or any(
            isinstance(found, Exception) for found in read_whole_reports(output, dict.fromkeys(done))
        ):
            remove_manifest(output)
            write_json(output, _NOTE, {"fingerprint": own})
            manifest = _run(job, own)
        if manifest["complete"] and not job.keeps_scores:
            remove_folder(output.child(SCORES))
    return manifest


def _run(job: Cascade, own: str) -> dict[str, Any]:
    before = read_json(open_location(job.score.output), MANIFEST)
    scored = score_job.score(job.score)
    if (
        before is not None
        and before["fingerprint"] == scored["fingerprint"]
        and scored["units_resumed"] == scored["units"]
    ):
        scored = before  # of the run that did the work: it tells more of it
    stages = {**scored.get("stages", {}), "score": summary(scored)}
    planned = plan_rescore(job.rescore, owns_scores=True)
    return rescore_planned(planned, {_FACT: own, "stages": stages, "stages_complete": scored["complete"]})


def check_cascade(job: Cascade, planned: ScorePlan) -> str:
    """Plans the second stage on a copy of the scores to come that has no rows.

    Args:
        job: the job.
        planned: its first stage.

    Returns:
        The fingerprint of everything that decides the output.

    Raises:
        FlipkdError: what the second stage would refuse.
    """
    output = open_location(job.rescore.output)
    inputs = score_inputs(job.score)
    if job.keeps_scores:
        inputs.append(("--rescore-scores", open_location(job.score.output)))
    refuse_overlap(output, inputs)
    with tempfile.TemporaryDirectory() as folder:
        root = open_location(folder)
        first_of_form = _first_of_form(planned)
        for name, schema in first_of_form[:1]:
            _write_scores_to_come(planned, schema, Path(folder) / name)
        write_json(root, MANIFEST, {"threshold": job.score.threshold})
        try:
            # The name of one file is in the fingerprint, as it always was: the others are looked at afterwards.
            second = plan_rescore(replace(job.rescore, scores=folder), owns_scores=True)
            for name, schema in first_of_form[1:]:
                _write_scores_to_come(planned, schema, Path(folder) / name)
            if first_of_form:
                check_scores(second.config, root, find_shards(root), second.tables)
        except FlipkdError as error:
            why = str(error).replace(root.uri, "the scores to come")
            raise type(error)(f"second stage (--rescore-...): {why}") from error
    first = plan_fingerprint(planned.job.plan, planned.task.run_fingerprint)
    return fingerprint({"kind": "cascade", "format": 1, "score": first, "rescore": second.run_fingerprint})


def _first_of_form(planned: ScorePlan) -> list[tuple[str, pa.Schema]]:
    """Name and schema of the first file of pairs, and of the first of each other schema."""
    found: dict[tuple[pa.Schema, tuple[str, ...]], tuple[str, pa.Schema]] = {}
    for unit in planned.job.plan.units:
        schema = planned.schemas[unit.shard.name]
        form = (schema.remove_metadata(), tuple(name for name, _ in unit.shard.partitions))
        found.setdefault(form, (unit.shard.name, schema))
    return list(found.values())


def _write_scores_to_come(planned: ScorePlan, pairs: pa.Schema, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(scores_without_rows(planned, pairs), path)


def scores_without_rows(planned: ScorePlan, pairs: pa.Schema) -> pa.Table:
    """What a planned ``score`` will write of pairs of this schema, without a row."""
    task = planned.task
    none = np.zeros(0, np.float32)
    rows = PairRows(np.zeros(0, np.int32), np.zeros(0, np.int32), None, None)
    scores = PairScores(none, None if task.calibration is None else none, None)
    names = output_columns(task, pairs.names)
    stored = pairs.remove_metadata().empty_table()
    for name in names:
        if name not in pairs.names and name not in SCORE_COLUMNS:  # of a folder's name
            stored = stored.append_column(name, pa.array([], pa.string()))
    return assemble(stored, rows, scores, names, task.threshold)
