"""The whole of ``score``: encode what has no vector yet, score, write the manifest."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from flipkd.config import EncodeConfig, ScoreConfig
from flipkd.data.commit import read_json
from flipkd.data.location import open_location
from flipkd.data.records import as_text, normalise, render_texts
from flipkd.data.shards import ShardReader
from flipkd.data.template import template_fields
from flipkd.run.encode import (
    STORE_FILE,
    EncodePlan,
    encode_planned,
)
from flipkd.run.inline import encode_inline
from flipkd.run.job import Job, begin, plan_facts, run_job
from flipkd.run.kept_stores import in_use, remove_older
from flipkd.run.lock import locked
from flipkd.run.manifest import UnitReport
from flipkd.run.observe import observed
from flipkd.run.output import prepare, remove_folder, remove_otherwise_made
from flipkd.run.overlap import refuse_other_kind
from flipkd.run.plan_score import ENCODER_FACT, ScorePlan, plan_score, remove_stale
from flipkd.run.ray_session import ray_session
from flipkd.run.score_unit import ScoreTask, ScoreWorker
from flipkd.run.stages import skipped_before, stages_told, summary
from flipkd.run.texts import SAMPLE_ROWS, TEXT_COLUMN, TextsTask, estimate_distinct
from flipkd.run.top_k import TopKTask, TopKWorker, compare_candidates
from flipkd.run.units import Plan, fingerprint, without_failed

logger = logging.getLogger(__name__)


def score(config: ScoreConfig) -> dict[str, Any]:
    """Scores all pairs; a run that was broken off goes on where it was. Returns the manifest.

    Raises:
        FlipkdError: see ``flipkd.errors``; what was finished stays, and the same call goes on from there.
    """
    planned = plan_score(config)
    job = planned.job
    with contextlib.ExitStack() as held:
        held.enter_context(locked(job.output))
        held.enter_context(ray_session())
        held.enter_context(observed("score", config.run, job.output))
        # Whose folder it is must be known before hours of encoding.
        refuse_other_kind(job.output, "score")
        done = begin(job)
        remove_stale(planned)
        stages = _stages_of_finished(planned, done)
        if stages is None:
            stages = {}
            if config.cache is not None:
                held.enter_context(in_use(planned.encodes))
            for name, encode_plan in zip(("encode_left", "encode_right"), planned.encodes, strict=False):
                stages[name] = summary(encode_planned(encode_plan, waits=config.cache is not None))
            if config.is_inline:
                found, texts_stages = _encode_inline(planned)
                # The best K are compared anew over what can be read now, whatever an earlier run wrote.
                plan = found if config.top_k is not None else without_failed(job.plan, found, done)
                job = replace(job, plan=plan)
                stages.update(texts_stages)
            task = replace(planned.task, basis=_unread_records(stages))
            basis = task.basis
            if config.top_k is not None:
                job, stages["candidates"], basis = _top_k_job(planned, task, job)
            elif basis:
                job = replace(job, make_worker=partial(ScoreWorker, task))
            done = remove_otherwise_made(job.output, done, lambda _: basis)
            job = replace(job, skipped_units=skipped_before(stages, planned.job.plan, job.plan))
        complete = all(stage.get("complete", True) for stage in stages.values())
        manifest = run_job(replace(job, about={**job.about, "stages": stages, "stages_complete": complete}), done)
        _remove_work(planned, manifest["complete"])
    return manifest


def _stages_of_finished(planned: ScorePlan, done: Mapping[str, UnitReport]) -> dict[str, Any] | None:
    """What the stages of a run were where every output is there; None where they have to run.

    They have to where records could not be read: perhaps they can be now.
    """
    job = planned.job
    if len(done) < len(job.plan.units):
        return None
    told = stages_told(job.output, job.fingerprint)
    if told is None and not (done and planned.encodes):
        return {}
    return None if told is None or _unread_records(told) else told


def dry_run(config: ScoreConfig) -> dict[str, Any]:
    """The plan, without any work: files, units, rows, texts to encode, disk space."""
    planned = plan_score(config)
    facts = plan_facts(planned.job)
    facts["files"] = len({unit.shard.name for unit in planned.job.plan.units})
    facts["stages"] = [
        {
            "kind": "encode",
            "records": plan.plan.rows,
            "units": len(plan.plan.units),
            "distinct_texts_estimate": _distinct_records(plan),
            "sealed": read_json(open_location(plan.config.output), STORE_FILE) is not None,
        }
        for plan in planned.encodes
    ]
    if config.is_inline:
        estimate = _distinct_inline_texts(planned)
        facts["stages"] = [{"kind": "texts"}, {"kind": "encode", "distinct_texts_estimate": estimate}]
    return facts


def _distinct_records(planned: EncodePlan) -> int:
    template = planned.config.text_template
    for unit in planned.plan.units[:1]:
        with ShardReader(open_location(planned.config.records), unit.shard, may_skip=True) as reader:
            table = next(unit.read(reader, template_fields(template), SAMPLE_ROWS))
        return estimate_distinct([render_texts(table, template).values], planned.plan.rows)
    return 0


def _distinct_inline_texts(planned: ScorePlan) -> int:
    task, plan = planned.task, planned.job.plan
    for unit in plan.units[:1]:
        with ShardReader(task.pairs, unit.shard, may_skip=True) as reader:
            table = next(unit.read(reader, list(dict.fromkeys(task.pair_columns)), SAMPLE_ROWS))
        texts = [normalise(as_text(table.column(name), name)[0]) for name in task.pair_columns]
        return estimate_distinct(texts, 2 * plan.rows)
    return 0


def _encode_inline(planned: ScorePlan) -> tuple[Plan, dict[str, Any]]:
    config, task, work = planned.config, planned.task, planned.work
    assert config.encoder is not None
    assert task.digest_key is not None
    assert work is not None
    texts = TextsTask(task.pairs, work.child("lists"), task.run_fingerprint, task.pair_columns, task.digest_key)
    encode = EncodeConfig(
        encoder=config.encoder,
        records=work.child("texts").path,
        text_column=TEXT_COLUMN,
        output=task.store,
        dtype=config.dtype,
        cache=config.cache,
        cache_limit_bytes=config.cache_limit_bytes,
        run=config.run,
    )
    return encode_inline(planned.job, texts, work, encode, planned.job.about[ENCODER_FACT])


def _unread_records(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Fingerprint of the records that ``encode`` could not read: their pairs have no score. Empty where all were."""
    unread = [
        [side, key, one]
        for side in ("encode_left", "encode_right")
        for key, named in (("skipped_shards", "name"), ("skipped_units", "output"))
        for one in sorted(entry[named] for entry in stages.get(side, {}).get(key, ()))
    ]
    return fingerprint({"unread": unread}) if unread else ""


def _top_k_job(planned: ScorePlan, task: ScoreTask, job: Job) -> tuple[Job, dict[str, Any], str]:
    """Scores into candidates, compares them over all units, and gives the job that writes the survivors.

    What survives of a unit depends on all units that could be read: the basis of the outputs comes last.
    """
    config = planned.config
    assert config.top_k is not None
    assert planned.work is not None
    candidates = planned.work.child("candidates")
    worker = partial(ScoreWorker, replace(task, output=candidates, top_k=config.top_k))
    scored = prepare(candidates, job.plan.units, overwrite=False)
    scored = remove_otherwise_made(candidates, scored, lambda _: task.basis)
    found = run_job(replace(job, kind="candidates", output=candidates, make_worker=worker), scored)
    failed = {failure["output"] for failure in found["skipped_units"]}
    units = [unit for unit in job.plan.units if unit.output not in failed]
    names = [unit.output for unit in units]
    places = planned.work.child("kept")
    compare_candidates(candidates, names, config.top_k, places)
    basis = fingerprint({"compared": names, "unread": task.basis})
    last = TopKTask(candidates, places, task.output, task.run_fingerprint, basis)
    last_job = replace(job, plan=replace(job.plan, units=units), make_worker=partial(TopKWorker, last))
    return last_job, summary(found), basis


def _remove_work(planned: ScorePlan, complete: bool) -> None:
    if planned.work is not None:
        remove_folder(planned.work)
    if planned.config.cache is None:
        for plan in planned.encodes:
            remove_folder(open_location(plan.config.output))
    elif complete:
        remove_older(planned.encodes)
