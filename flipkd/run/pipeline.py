"""The whole of ``score``: plan, encode what has no vector yet, score, write the manifest."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flipkd.config import EncodeConfig, ScoreConfig
from flipkd.data.shards import Location, ShardReader, find_shards, open_location
from flipkd.errors import ConfigError
from flipkd.run.encode import (
    PARTS,
    STORE_FILE,
    EncodePlan,
    check_schema,
    encode_planned,
    encoder_fingerprint,
    plan_encode,
)
from flipkd.run.job import Job, plan_facts, run_job
from flipkd.run.manifest import WORK_FOLDER, read_json
from flipkd.run.output import locked, prepare, refuse_overlap, remove_folder
from flipkd.run.score import ScoreTask, ScoreWorker, output_columns
from flipkd.run.texts import TextsTask, TextsWorker, merge_texts
from flipkd.run.top_k import TopKTask, TopKWorker, compare_candidates
from flipkd.run.units import Plan, fingerprint, plan_units

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorePlan:
    """A planned ``score``.

    Args:
        config: what was asked for.
        encodes: stores to build first, left then right, from record tables; empty otherwise.
        stores: folders of the left and right stores; the second is None when one store serves both sides.
        task: what a worker scores with.
        job: the score job over the pairs.
    """

    config: ScoreConfig
    encodes: list[EncodePlan]
    task: ScoreTask
    job: Job


def plan_score(config: ScoreConfig) -> ScorePlan:
    """Reads footers and headers and decides everything, without starting any work.

    Raises:
        ConfigError: an option or a column cannot be used.
        InputError: an input cannot be read.
    """
    pairs, output = open_location(config.pairs), open_location(config.output)
    inputs = [("--pairs", config.pairs), ("--records", config.records), ("--right-records", config.right_records)]
    inputs += [("--store", config.store), ("--right-store", config.right_store)]
    refuse_overlap(output, [(option, open_location(uri)) for option, uri in inputs if uri is not None])
    calibration = None if config.calibration is None else read_calibration(config.calibration)
    shards = find_shards(pairs)

    encodes: list[EncodePlan] = []
    source: Mapping[str, Any]
    store, right_store = config.store, config.right_store
    if config.store is not None:
        source = {"stores": [store_fingerprint(path) for path in (store, right_store) if path is not None]}
    elif config.records is not None:
        encodes = [plan_encode(_encode_config(config, path)) for path in _record_tables(config)]
        encodes = [replace(plan, config=replace(plan.config, output=_store_folder(config, plan))) for plan in encodes]
        source = {"stores": [plan.fingerprint for plan in encodes]}
        store = encodes[0].config.output
        right_store = encodes[1].config.output if len(encodes) > 1 else None
    else:
        assert config.encoder is not None
        source = {"inline": encoder_fingerprint(config.encoder), "dtype": config.dtype}
    run_fingerprint = fingerprint(
        {
            "kind": "score",
            "format": 1,
            "source": source,
            "pair_columns": config.pair_columns,
            "columns": config.columns,
            "calibration": calibration,
            "threshold": config.threshold,
            "min_score": config.min_score,
            "top_k": config.top_k,
            "rows_per_unit": config.rows_per_unit,
        }
    )
    skip = config.run.on_bad_shard == "skip"
    plan = plan_units(pairs, shards, config.rows_per_unit, run_fingerprint, skip_bad_shards=skip)
    check_schema(pairs, plan, config.pair_columns)
    if config.is_inline:
        store = _work_folder(config, plan, run_fingerprint).child("store").path
    assert store is not None
    task = ScoreTask(
        pairs=pairs,
        output=output,
        run_fingerprint=run_fingerprint,
        store=store,
        right_store=right_store,
        pair_columns=config.pair_columns,
        digest_key=bytes.fromhex(run_fingerprint) if config.is_inline else None,
        columns=config.columns,
        calibration=calibration,
        threshold=config.threshold,
        min_score=config.min_score,
    )
    _check_output_columns(task, pairs, plan)
    job = Job(
        kind="score",
        output=output,
        plan=plan,
        fingerprint=run_fingerprint,
        make_worker=partial(ScoreWorker, task),
        run=config.run,
        unit_name="pairs",
        uses_model=False,
        output_bytes=_output_bytes(config, plan),
        about={"columns": list(config.columns) if config.columns else None},
    )
    return ScorePlan(config, encodes, task, job)


def score(config: ScoreConfig) -> dict[str, Any]:
    """Scores all pairs; a run that was broken off goes on where it was. Returns the manifest.

    Raises:
        FlipkdError: see ``flipkd.errors``; what was finished stays, and the same call goes on from there.
    """
    planned = plan_score(config)
    job = planned.job
    with locked(job.output):
        # Whose folder it is must be known before hours of encoding.
        done = prepare(job.output, {unit.output for unit in job.plan.units}, config.run.overwrite)
        stages: dict[str, Any] = {}
        if len(done) < len(job.plan.units):
            for name, encode_plan in zip(("encode_left", "encode_right"), planned.encodes, strict=False):
                stages[name] = _summary(encode_planned(encode_plan))
            if config.is_inline:
                stages.update(_encode_inline(planned))
            if config.top_k is not None:
                job, stages["candidates"] = _top_k_job(planned)
        complete = all(stage.get("complete", True) for stage in stages.values())
        manifest = run_job(replace(job, about={**job.about, "stages": stages, "stages_complete": complete}))
        _remove_work(planned)
    return manifest


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
            "distinct_texts_at_most": plan.plan.rows,
            "sealed": read_json(open_location(plan.config.output), STORE_FILE) is not None,
        }
        for plan in planned.encodes
    ]
    if config.is_inline:
        facts["stages"] = [{"kind": "texts"}, {"kind": "encode", "distinct_texts_at_most": 2 * planned.job.plan.rows}]
    return facts


def _encode_inline(planned: ScorePlan) -> dict[str, Any]:
    """Distinct texts of all units, then their store."""
    config, task = planned.config, planned.task
    assert config.encoder is not None
    assert task.digest_key is not None
    work = _work_folder(config, planned.job.plan, task.run_fingerprint)
    lists = work.child("lists")
    texts_task = TextsTask(task.pairs, lists, task.run_fingerprint, task.pair_columns, task.digest_key)
    listed = run_job(
        replace(planned.job, kind="texts", output=lists, make_worker=partial(TextsWorker, texts_task), output_bytes=0)
    )
    outputs = [unit.output for unit in planned.job.plan.units]
    failed = {failure["output"] for failure in listed["skipped_units"]}
    merge_texts(lists, [name for name in outputs if name not in failed], work.child("texts"))
    encoded = encode_planned(
        plan_encode(
            EncodeConfig(
                encoder=config.encoder,
                records=work.child("texts").path,
                output=task.store,
                dtype=config.dtype,
                run=config.run,
            )
        )
    )
    return {"texts": _summary(listed), "encode": _summary(encoded)}


def _top_k_job(planned: ScorePlan) -> tuple[Job, dict[str, Any]]:
    """Scores into candidates, compares them over all units, and gives the job that writes the survivors."""
    config, task = planned.config, planned.task
    assert config.top_k is not None
    candidates = _work_folder(config, planned.job.plan, task.run_fingerprint).child("candidates")
    worker = partial(ScoreWorker, replace(task, output=candidates, top_k=config.top_k))
    found = run_job(replace(planned.job, output=candidates, make_worker=worker))
    failed = {failure["output"] for failure in found["skipped_units"]}
    units = [unit for unit in planned.job.plan.units if unit.output not in failed]
    names = [unit.output for unit in units]
    keep = dict(zip(names, compare_candidates(candidates, names, config.top_k), strict=True))
    last = TopKTask(candidates, task.output, task.run_fingerprint, keep)
    plan = replace(planned.job.plan, units=units)
    return replace(planned.job, plan=plan, make_worker=partial(TopKWorker, last)), _summary(found)


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    kept = ("complete", "units", "rows_in", "rows_out", "reasons", "counts", "seconds", "wall_seconds", "seal_seconds")
    return {key: manifest[key] for key in (*kept, "store") if key in manifest}


def _record_tables(config: ScoreConfig) -> list[str]:
    assert config.records is not None
    return [config.records] if config.right_records is None else [config.records, config.right_records]


def _encode_config(config: ScoreConfig, records: str) -> EncodeConfig:
    assert config.encoder is not None
    return EncodeConfig(
        encoder=config.encoder,
        records=records,
        output="",
        id_column=config.id_column,
        text_column=config.text_column,
        template=config.template,
        dtype=config.dtype,
        run=config.run,
    )


def _store_folder(config: ScoreConfig, plan: EncodePlan) -> str:
    root = open_location(config.cache) if config.cache else open_location(config.output).child(WORK_FOLDER)
    if not root.is_local:
        raise ConfigError("a vector store is mapped into memory: name a local folder for it with --cache")
    return root.child(f"store-{plan.fingerprint[:16]}").path


def _work_folder(config: ScoreConfig, plan: Plan, run_fingerprint: str) -> Location:
    """Of one run over one input, so that work for another input is never taken for this one's."""
    own = fingerprint({"run": run_fingerprint, "units": [unit.fingerprint for unit in plan.units]})
    root = open_location(config.cache) if config.cache else open_location(config.output).child(WORK_FOLDER)
    if not root.is_local:
        raise ConfigError("a vector store is mapped into memory: name a local folder for it with --cache")
    return root.child(f"work-{own[:16]}")


def _remove_work(planned: ScorePlan) -> None:
    config = planned.config
    if config.is_inline or config.top_k is not None:
        remove_folder(_work_folder(config, planned.job.plan, planned.task.run_fingerprint))
    for plan in planned.encodes if config.cache is None else ():
        remove_folder(open_location(plan.config.output))


def _check_output_columns(task: ScoreTask, pairs: Location, plan: Plan) -> None:
    if plan.units:
        with ShardReader(pairs, plan.units[0].shard) as reader:
            output_columns(task, reader.schema.names)


def _output_bytes(config: ScoreConfig, plan: Plan) -> int:
    if config.min_score is not None or config.top_k is not None:
        return 0  # how many pairs survive is not known beforehand
    passes = config.columns is None or any(name in config.pair_columns for name in config.columns)
    return 5 * plan.rows + (plan.bytes_in if passes else 0)


def store_fingerprint(path: str) -> str:
    """Fingerprint of a finished store.

    Raises:
        ConfigError: the folder holds none.
    """
    location = open_location(path)
    header = read_json(location, STORE_FILE) if location.is_local else None
    if header is None:
        unfinished = read_json(location, f"{PARTS}/{WORK_FOLDER}/plan.json") if location.is_local else None
        hint = "it is not finished: run encode again" if unfinished else "make one with flipkd-batch encode"
        raise ConfigError(f"{path} holds no vector store; {hint}")
    return str(header["fingerprint"])


def read_calibration(path: str) -> tuple[float, float]:
    """Slope and intercept from a calibration file.

    Raises:
        ConfigError: the file cannot be read, or has no finite ``slope`` and ``intercept``.
    """
    try:
        values = json.loads(Path(path).read_text())
        slope, intercept = float(values["slope"]), float(values["intercept"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--calibration {path}: expected a JSON object with numbers 'slope' and 'intercept'"
        ) from error
    if not (abs(slope) < float("inf") and abs(intercept) < float("inf")):
        raise ConfigError(f"--calibration {path}: 'slope' and 'intercept' must be finite")
    return slope, intercept
