"""The whole of ``teach``: join texts to ids, encode distinct texts or read pairs together, score, write the manifest.

A bi-encoder's score of a pair is the same in both orders; a cross-encoder's is that of (left, right) as it stands, and
may differ from that of (right, left).
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from flipkd.config import EncodeConfig, TeachConfig
from flipkd.data.commit import make_private_folder, read_json, sync, write_json, writing
from flipkd.data.location import Location
from flipkd.data.teacher_scores import TEACHER_VECTORS
from flipkd.errors import OutputError
from flipkd.models.folder import absolute_model
from flipkd.run.inline import encode_inline
from flipkd.run.job import Job, begin, run_job
from flipkd.run.join import JoinTask, JoinWorker, joined_plan
from flipkd.run.local import UnitFunction
from flipkd.run.lock import locked
from flipkd.run.manifest import WORK_FOLDER
from flipkd.run.observe import observed
from flipkd.run.output import remove_folder, remove_stale_work
from flipkd.run.overlap import refuse_other_kind
from flipkd.run.plan_teach import TeachPlan, plan_teach
from flipkd.run.ray_session import ray_session
from flipkd.run.stages import skipped_before, stages_told, summary
from flipkd.run.teach_unit import BiEncoderWorker, CrossEncoderWorker, TeachTask
from flipkd.run.texts import TEXT_COLUMN, TextsTask
from flipkd.run.units import Plan, plan_fingerprint, without_failed, work_name

# In the folder of teacher vectors: of which run over which pairs they are.
_VECTORS_OF = "_teach.json"
_JOINED = "joined"


def teach(config: TeachConfig) -> dict[str, Any]:
    """Scores all pairs with the teacher; a run that was broken off goes on where it was.

    Output, see ``flipkd.data.teacher_scores``: the pairs' own columns (and the texts, for pairs of ids),
    ``teacher_score``, ``reason`` and ``truncated``, rows in input order; for a bi-encoder also the vectors of all
    distinct texts as a store, whose ids are ``text_digests(texts, bytes.fromhex(manifest["fingerprint"]))``.

    Returns:
        The manifest; ``teacher`` and ``label_column`` in it say what the scores are.

    Raises:
        FlipkdError: see ``flipkd.errors``; what was finished stays, and the same call goes on from there.
    """
    planned = plan_teach(config)
    output, plan = planned.output, planned.plan
    is_bi_encoder = planned.teacher.kind == "bi-encoder"
    vectors = output.child(TEACHER_VECTORS)
    work = output.child(WORK_FOLDER).child(work_name(plan, planned.run_fingerprint))
    job = _teach_job(planned, work, vectors)
    with locked(output), ray_session(), observed("teach", config.run, output):
        refuse_other_kind(output, "teach")
        _vectors_of(vectors)  # something else in their place is refused before anything is deleted
        done = begin(job)
        has_vectors = _check_vectors(planned, vectors, work)
        remove_stale_work(output.child(WORK_FOLDER), {posixpath.basename(work.path)})
        is_whole = len(done) == len(plan.units) and (has_vectors or not is_bi_encoder)
        stages = (stages_told(output, job.fingerprint) if is_whole else None) or {}
        if not is_whole:
            if planned.tables:
                plan, stages["join"] = _join(planned, job, work)
            if is_bi_encoder and not has_vectors:
                plan, encode_stages = _encode(planned, replace(job, plan=plan), work, vectors)
                stages.update(encode_stages)
            plan = without_failed(planned.plan, plan, done)
            job = replace(job, skipped_units=skipped_before(stages, planned.plan, plan))
        complete = all(stage["complete"] for stage in stages.values())
        about = {**job.about, "stages": stages, "stages_complete": complete}
        manifest = run_job(replace(job, plan=plan, about=about), done)
        remove_folder(work)
    return manifest


def _teach_job(planned: TeachPlan, work: Location, vectors: Location) -> Job:
    config, plan = planned.config, planned.plan
    pairs = work.child(_JOINED) if planned.tables else planned.pairs
    task = TeachTask(pairs, planned.output, planned.run_fingerprint, planned.teacher)
    teacher = replace(config.teacher, folder=absolute_model(config.teacher.folder))
    worker: Callable[[int], UnitFunction] = partial(CrossEncoderWorker, task, teacher)
    if planned.teacher.kind == "bi-encoder":
        worker = partial(BiEncoderWorker, task, vectors.path)
    return Job(
        kind="teach",
        output=planned.output,
        plan=plan,
        fingerprint=planned.run_fingerprint,
        make_worker=worker,
        run=config.run,
        unit_name="pairs",
        uses_model=planned.teacher.kind == "cross-encoder",
        output_bytes=5 * plan.rows + plan.bytes_in,
        about={"teacher": asdict(planned.teacher), "label_column": planned.teacher.label_column},
        device=config.teacher.device,
    )


def _join(planned: TeachPlan, job: Job, work: Location) -> tuple[Plan, dict[str, Any]]:
    """Gives every pair of ids its two texts; what follows then is the way of inline texts."""
    config, joined = planned.config, work.child(_JOINED)
    task = JoinTask(
        pairs=planned.pairs,
        output=joined,
        run_fingerprint=planned.run_fingerprint,
        tables=planned.tables,
        id_columns=config.pair_columns,
        text_columns=planned.teacher.text_columns,
    )
    worker = partial(JoinWorker, task)
    manifest = run_job(replace(job, kind="join", output=joined, make_worker=worker, uses_model=False, about={}))
    failed = {failure["output"] for failure in manifest["skipped_units"]}
    return joined_plan(planned.plan, joined, failed), summary(manifest)


def _encode(planned: TeachPlan, job: Job, work: Location, vectors: Location) -> tuple[Plan, dict[str, Any]]:
    """Vectors of all distinct texts, built in the work folder and then renamed, so that they are whole or not there."""
    config, pairs = planned.config, work.child(_JOINED) if planned.tables else planned.pairs
    key = bytes.fromhex(planned.run_fingerprint)
    texts = TextsTask(pairs, work.child("lists"), planned.run_fingerprint, planned.teacher.text_columns, key)
    store = work.child("store")
    encode = EncodeConfig(
        encoder=config.teacher,
        records=work.child("texts").path,
        text_column=TEXT_COLUMN,
        output=store.path,
        dtype="float32",
        cache=config.cache,
        cache_limit_bytes=config.cache_limit_bytes,
        run=config.run,
    )
    plan, stages = encode_inline(job, texts, work, encode, planned.teacher.fingerprint)
    # Where units were skipped the vectors serve this run, and the next one makes them again.
    complete = len(plan.units) == len(planned.plan.units) and stages["encode"]["complete"]
    of = plan_fingerprint(planned.plan, planned.run_fingerprint) if complete else None
    write_json(store, _VECTORS_OF, {"pairs": of})
    with writing(vectors.uri):
        os.replace(store.path, vectors.path)
        sync(planned.output.path)
    return plan, stages


def _vectors_of(vectors: Location) -> dict[str, Any] | None:
    """Of which run over which pairs the vectors are; None where there are none.

    Raises:
        OutputError: something else has their place.
    """
    if not vectors.is_local or not os.path.lexists(vectors.path):
        return None
    found = read_json(vectors, _VECTORS_OF, pairs=(str, type(None))) if os.path.isdir(vectors.path) else None
    if found is None:
        raise OutputError(f"{vectors.uri} is not a folder of teacher vectors; choose another --output, or remove it")
    return found


def _check_vectors(planned: TeachPlan, vectors: Location, work: Location) -> bool:
    """Whether the vectors of this run over these pairs are there. Vectors of another run of ``teach`` are removed.

    Raises:
        OutputError: something else has their place.
    """
    found = _vectors_of(vectors)
    if found is None:
        return False
    of = plan_fingerprint(planned.plan, planned.run_fingerprint)
    if planned.teacher.kind == "bi-encoder" and found["pairs"] == of:
        return True
    # Out of the way first: a removal that breaks off must not leave half a store in this place.
    old = work.child("replaced")
    with writing(vectors.uri):
        make_private_folder(work.path)
        remove_folder(old)
        os.replace(vectors.path, old.path)
    remove_folder(old)
    return False
