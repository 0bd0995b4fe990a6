"""Plan a ``score``: read footers and headers, decide everything, start nothing."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from flipkd.config import SCORE_COLUMNS, EncodeConfig, ScoreConfig
from flipkd.data.calibration import as_json, read_calibration
from flipkd.data.commit import read_json
from flipkd.data.find import Shard, find_shards
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import check_pair_columns
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError
from flipkd.record_sides import RecordSide
from flipkd.run.cached_encoder import cache_root
from flipkd.run.encode import PARTS, EncodePlan, encoder_fingerprint, plan_encode
from flipkd.run.job import Job, check_device
from flipkd.run.manifest import WORK_FOLDER
from flipkd.run.output import remove_stale_work
from flipkd.run.overlap import real_uri, refuse_overlap
from flipkd.run.score_unit import ScoreTask, ScoreWorker, output_columns
from flipkd.run.units import Plan, fingerprint, plan_units, work_name
from flipkd.vectors.layout import check_files, is_sealed, read_header

# Key of the manifest: fingerprint of the encoder whose scores these are.
ENCODER_FACT = "encoder_fingerprint"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorePlan:
    """A planned ``score``.

    Args:
        config: what was asked for.
        encodes: stores to build first, left then right, from record tables; empty otherwise.
        task: what a worker scores with.
        job: the score job over the pairs.
        schemas: of the files of pairs, by name.
    """

    config: ScoreConfig
    encodes: list[EncodePlan]
    task: ScoreTask
    job: Job
    schemas: Mapping[str, pa.Schema]

    @property
    def work(self) -> Location | None:
        """The folder for lists, texts and candidates; None where the job has none."""
        if self.config.is_inline or self.config.top_k is not None:
            return _work_folder(self.config, self.job.plan, self.task.run_fingerprint)
        return None


def plan_score(config: ScoreConfig) -> ScorePlan:
    """Reads footers and headers and decides everything, without starting any work.

    Raises:
        ConfigError: an option or a column cannot be used.
        InputError: an input cannot be read.
    """
    pairs, output = open_location(config.pairs), open_location(config.output)
    refuse_overlap(output, score_inputs(config), config.cache)
    calibrated = None if config.calibration is None else read_calibration(config.calibration)
    calibration = None if calibrated is None else calibrated.calibration
    shards = find_shards(pairs)

    encodes: list[EncodePlan] = []
    id_kinds: list[str] = []
    source: Mapping[str, Any]
    store, right_store = config.store, config.right_store
    if config.store is not None:
        headers = _store_headers(config)
        # Workers on Ray have another working directory.
        store = open_location(config.store).path
        right_store = None if config.right_store is None else open_location(config.right_store).path
        source = {"stores": [_name_of(header) for header in headers]}
        encoder = headers[0].get("encoder")  # None where a store does not tell
        id_kinds = [header["id_kind"] for header in headers]
    elif config.records is not None:
        for side in config.record_sides:
            known = encodes[0].encoder_fingerprint if encodes else None
            encodes.append(plan_encode(encode_config(config, side), side.is_right, known))
        encodes = [replace(plan, config=replace(plan.config, output=_store_folder(config, plan))) for plan in encodes]
        source = {"stores": [plan.fingerprint for plan in encodes]}
        encoder = encodes[0].encoder_fingerprint
        id_kinds = [plan.id_kind for plan in encodes]
        store = encodes[0].config.output
        right_store = encodes[1].config.output if len(encodes) > 1 else None
    else:
        assert config.encoder is not None
        if config.cache is not None:
            cache_root(config.cache)
        check_device(config.encoder.device, config.run)
        encoder = encoder_fingerprint(config.encoder)
        source = {"inline": encoder, "dtype": config.dtype}
    if calibrated is not None and calibrated.encoder_fingerprint not in (None, encoder):
        raise ConfigError(
            f"--calibration {config.calibration} was fitted to the scores of another encoder (or of other encoder "
            "options), whose scale may differ; run evaluate on scores of this one"
        )
    run_fingerprint = fingerprint(
        {
            "kind": "score",
            "format": 1,
            "source": source,
            "pair_columns": config.pair_columns,
            "columns": config.columns,
            # The numbers, not the file: a file that moved, or tells another story of the same curve, is the same run.
            "calibration": None if calibration is None else as_json(calibration),
            "threshold": config.threshold,
            "min_score": config.min_score,
            "top_k": config.top_k,
            "rows_per_unit": config.rows_per_unit,
        }
    )
    task = ScoreTask(
        pairs=pairs,
        output=output,
        run_fingerprint=run_fingerprint,
        store=store or "",  # inline texts: see below
        right_store=right_store,
        pair_columns=config.pair_columns,
        digest_key=bytes.fromhex(run_fingerprint) if config.is_inline else None,
        columns=config.columns,
        calibration=calibration,
        threshold=config.threshold,
        min_score=config.min_score,
    )
    schemas: dict[str, pa.Schema] = {}
    check = partial(_check_pairs, task, id_kinds, schemas)
    skip = config.run.on_bad_shard == "skip"
    plan = plan_units(pairs, shards, config.rows_per_unit, run_fingerprint, skip_bad_shards=skip, check=check)
    if config.is_inline or config.top_k is not None:
        work = _work_folder(config, plan, run_fingerprint)
        task = replace(task, store=work.child("store").path) if config.is_inline else task
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
        about={
            "columns": list(config.columns) if config.columns else None,
            "threshold": config.threshold,
            ENCODER_FACT: encoder,
        },
    )
    return ScorePlan(config, encodes, task, job, schemas)


def score_inputs(config: ScoreConfig) -> list[tuple[str, Location]]:
    """What a job reads, by option."""
    inputs = [("--pairs", config.pairs), ("--records", config.records), ("--right-records", config.right_records)]
    inputs += _stores(config)
    return [(option, open_location(uri)) for option, uri in inputs if uri is not None]


def _name_of(header: Mapping[str, Any]) -> str:
    """What a store holds; one that lacks records may come to hold more under the same fingerprint."""
    is_whole = header.get("complete", True)
    return str(header["fingerprint"] if is_whole else f"{header['fingerprint']} {header['content_fingerprint']}")


def _store_headers(config: ScoreConfig) -> list[dict[str, Any]]:
    """Headers of the left and, where it differs, the right store.

    Raises:
        ConfigError: a folder holds no store, or the two have not vectors of one form.
        InputError: a store is damaged.
    """
    named = [(option, path) for option, path in _stores(config) if path is not None]
    headers = [_store_header(path) for _, path in named]
    forms = [f"{header['dim']} numbers in {header['dtype']}" for header in headers]
    if len(set(forms)) > 1:
        told = " and ".join(f"{option} {path} ({form})" for (option, path), form in zip(named, forms, strict=True))
        raise ConfigError(f"{told} have vectors of different forms; encode both with one --encoder and one --dtype")
    encoders = {header["encoder"] for header in headers if header.get("encoder") is not None}  # a store need not tell
    if len(encoders) > 1:
        told = " and ".join(f"{option} {path}" for option, path in named)
        logger.warning(
            "%s were made by different encoders, or by one in different arithmetic or with another maximum length; "
            "vectors of different encoders cannot be compared",
            told,
        )
    for (option, path), header in zip(named, headers, strict=True):
        if not header.get("complete", True):
            logger.warning("%s %s: files or rows of its records could not be read when it was made", option, path)
    return headers


def _store_header(path: str) -> dict[str, Any]:
    location = open_location(path)
    if not location.is_local or not is_sealed(location.path):
        unfinished = read_json(location, f"{PARTS}/{WORK_FOLDER}/plan.json") if location.is_local else None
        hint = "it is not finished: run encode again" if unfinished else "make one with flipkd-batch encode"
        raise ConfigError(f"{path} holds no vector store; {hint}")
    header = read_header(Path(location.path))
    check_files(Path(location.path), header)
    return header


def _stores(config: ScoreConfig) -> list[tuple[str, str | None]]:
    return [("--store", config.store), ("--right-store", config.right_store)]


def encode_config(config: ScoreConfig, side: RecordSide) -> EncodeConfig:
    """How the records of a side are encoded; the caller names the output."""
    assert config.encoder is not None
    return EncodeConfig(
        encoder=config.encoder,
        records=side.records,
        output="",
        id_column=side.id_column,
        text_column=side.text_column,
        template=side.template,
        dtype=config.dtype,
        cache=config.cache,
        cache_limit_bytes=config.cache_limit_bytes,
        run=config.run,
    )


def _store_folder(config: ScoreConfig, plan: EncodePlan) -> str:
    return _work_root(config).child(f"store-{plan.fingerprint[:16]}").path


def _work_folder(config: ScoreConfig, plan: Plan, run_fingerprint: str) -> Location:
    """Of one run over one input; see ``work_name``. In a cache also of one output: other jobs work beside it."""
    return _work_root(config).child(work_name(plan, run_fingerprint) + _end_of_work_names(config))


def remove_stale(planned: ScorePlan) -> None:
    """Deletes what killed runs of the same (locked) output with other input or options left."""
    config = planned.config
    own = [plan.config.output for plan in planned.encodes] + ([] if planned.work is None else [planned.work.path])
    keep = {posixpath.basename(path) for path in own}
    remove_stale_work(open_location(config.output).child(WORK_FOLDER), keep)
    if config.cache is not None:
        remove_stale_work(open_location(config.cache), keep, _end_of_work_names(config))


def _end_of_work_names(config: ScoreConfig) -> str:
    return "" if config.cache is None else f"-{fingerprint({'output': real_uri(open_location(config.output))})[:8]}"


def _work_root(config: ScoreConfig) -> Location:
    root = open_location(config.cache) if config.cache else open_location(config.output).child(WORK_FOLDER)
    if not root.is_local:
        raise ConfigError("a vector store is mapped into memory: name a local folder for it with --cache")
    return root


def _check_pairs(
    task: ScoreTask, id_kinds: Sequence[str], schemas: dict[str, pa.Schema], shard: Shard, reader: ShardReader
) -> None:
    """Looks at the schema of one file of pairs, so that what cannot be used fails before any work.

    Args:
        task: of the job.
        id_kinds: how the ids of the left and the right records are compared, or of both; none for texts.
        schemas: by name; this one is added.
        shard: the file.
        reader: of it.

    Raises:
        ConfigError: a column is missing, there already, or of a type that cannot be used.
    """
    check_pair_columns(reader, task.pair_columns, id_kinds)
    folders = [key for key, _ in shard.partitions]
    passed = [name for name in output_columns(task, reader.schema.names, folders) if name not in SCORE_COLUMNS]
    reader.check_columns(passed, f"--columns also knows {', '.join(SCORE_COLUMNS)}")
    schemas[shard.name] = reader.schema


def _output_bytes(config: ScoreConfig, plan: Plan) -> int:
    if config.min_score is not None or config.top_k is not None:
        return 0  # how many pairs survive is not known beforehand
    passes = config.columns is None or any(name not in SCORE_COLUMNS for name in config.columns)
    return 5 * plan.rows + (plan.bytes_in if passes else 0)
