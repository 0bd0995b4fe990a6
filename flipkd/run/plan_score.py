"""Plan a ``score``: read footers and headers, decide everything, start nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flipkd.config import SCORE_COLUMNS, EncodeConfig, ScoreConfig
from flipkd.data.calibration import as_json, read_calibration
from flipkd.data.commit import read_json
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import IDS_MISSING, TEXTS_MISSING
from flipkd.data.record_texts import check_ids_fit
from flipkd.data.shards import ShardReader, find_shards
from flipkd.errors import ConfigError
from flipkd.run.encode import (
    PARTS,
    EncodePlan,
    check_schema,
    encoder_fingerprint,
    plan_encode,
)
from flipkd.run.job import Job
from flipkd.run.manifest import WORK_FOLDER
from flipkd.run.output import refuse_overlap
from flipkd.run.score import ScoreTask, ScoreWorker, output_columns
from flipkd.run.units import Plan, fingerprint, plan_units, work_name
from flipkd.vectors.id_types import check_id_type
from flipkd.vectors.layout import is_sealed, read_header

# Key of the manifest: fingerprint of the encoder whose scores these are.
ENCODER_FACT = "encoder_fingerprint"


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
    refuse_overlap(output, score_inputs(config))
    calibrated = None if config.calibration is None else read_calibration(config.calibration)
    calibration = None if calibrated is None else calibrated.calibration
    shards = find_shards(pairs)

    encodes: list[EncodePlan] = []
    source: Mapping[str, Any]
    store, right_store = config.store, config.right_store
    if config.store is not None:
        source = {"stores": [store_fingerprint(path) for path in (store, right_store) if path is not None]}
        encoder = read_header(Path(open_location(config.store).path)).get("encoder")  # None where a store does not tell
    elif config.records is not None:
        encodes = [plan_encode(_encode_config(config, path)) for path in _record_tables(config)]
        encodes = [replace(plan, config=replace(plan.config, output=_store_folder(config, plan))) for plan in encodes]
        source = {"stores": [plan.fingerprint for plan in encodes]}
        encoder = encodes[0].encoder_fingerprint
        store = encodes[0].config.output
        right_store = encodes[1].config.output if len(encodes) > 1 else None
    else:
        assert config.encoder is not None
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
    skip = config.run.on_bad_shard == "skip"
    plan = plan_units(pairs, shards, config.rows_per_unit, run_fingerprint, skip_bad_shards=skip)
    texts, way_out = (config.pair_columns, TEXTS_MISSING) if config.is_inline else ((), IDS_MISSING)
    check_schema(pairs, plan, config.pair_columns, texts, way_out)
    _check_ids(pairs, plan, config.pair_columns, encodes)
    if config.is_inline:
        store = work_folder(config, plan, run_fingerprint).child("store").path
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
        about={
            "columns": list(config.columns) if config.columns else None,
            "threshold": config.threshold,
            ENCODER_FACT: encoder,
        },
    )
    return ScorePlan(config, encodes, task, job)


def score_inputs(config: ScoreConfig) -> list[tuple[str, Location]]:
    """What a job reads, by option."""
    inputs = [("--pairs", config.pairs), ("--records", config.records), ("--right-records", config.right_records)]
    inputs += [("--store", config.store), ("--right-store", config.right_store)]
    return [(option, open_location(uri)) for option, uri in inputs if uri is not None]


def store_fingerprint(path: str) -> str:
    """Fingerprint of a finished store.

    Raises:
        ConfigError: the folder holds none.
        InputError: its header is damaged.
    """
    location = open_location(path)
    if not location.is_local or not is_sealed(location.path):
        unfinished = read_json(location, f"{PARTS}/{WORK_FOLDER}/plan.json") if location.is_local else None
        hint = "it is not finished: run encode again" if unfinished else "make one with flipkd-batch encode"
        raise ConfigError(f"{path} holds no vector store; {hint}")
    return str(read_header(Path(location.path))["fingerprint"])


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
        cache=config.cache,
        cache_limit_bytes=config.cache_limit_bytes,
        run=config.run,
    )


def _store_folder(config: ScoreConfig, plan: EncodePlan) -> str:
    root = open_location(config.cache) if config.cache else open_location(config.output).child(WORK_FOLDER)
    if not root.is_local:
        raise ConfigError("a vector store is mapped into memory: name a local folder for it with --cache")
    return root.child(f"store-{plan.fingerprint[:16]}").path


def work_folder(config: ScoreConfig, plan: Plan, run_fingerprint: str) -> Location:
    """Of one run over one input; see ``work_name``."""
    root = open_location(config.cache) if config.cache else open_location(config.output).child(WORK_FOLDER)
    if not root.is_local:
        raise ConfigError("a vector store is mapped into memory: name a local folder for it with --cache")
    return root.child(work_name(plan, run_fingerprint))


def _check_ids(pairs: Location, plan: Plan, columns: Sequence[str], encodes: Sequence[EncodePlan]) -> None:
    """Pairs whose ids cannot be those of the records are refused before the records are encoded."""
    if not encodes or not all(each.units for each in (plan, *(encode.plan for encode in encodes))):
        return
    kinds = []
    for encode in encodes:
        with ShardReader(open_location(encode.config.records), encode.plan.units[0].shard) as reader:
            kinds.append(check_id_type(reader.column_type(encode.config.id_column), encode.config.id_column))
    with ShardReader(pairs, plan.units[0].shard) as reader:
        for column, kind in zip(columns, (kinds[0], kinds[-1]), strict=True):
            check_ids_fit(reader.column_type(column), column, kind)


def _check_output_columns(task: ScoreTask, pairs: Location, plan: Plan) -> None:
    """Columns that cannot be written are refused before any work, and before --overwrite deletes any file."""
    shards = list({unit.shard.name: unit.shard for unit in plan.units}.values())
    # All of them where names were given: a file that lacks one would stop the job half-way.
    for shard in shards if task.columns is not None else shards[:1]:
        with ShardReader(pairs, shard) as reader:
            made = output_columns(task, reader.schema.names)
            passed = [name for name in made if name not in SCORE_COLUMNS]
            reader.check_columns(passed, f"--columns also knows {', '.join(SCORE_COLUMNS)}")


def _output_bytes(config: ScoreConfig, plan: Plan) -> int:
    if config.min_score is not None or config.top_k is not None:
        return 0  # how many pairs survive is not known beforehand
    passes = config.columns is None or any(name in config.pair_columns for name in config.columns)
    return 5 * plan.rows + (plan.bytes_in if passes else 0)
