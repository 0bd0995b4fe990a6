"""Record tables to a vector store: one unit in, one part file out; then the parts are sealed into mapped files."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flipkd.config import EncodeConfig, EncoderOptions
from flipkd.data.commit import read_json, write_json
from flipkd.data.find import find_shards
from flipkd.data.location import Location, open_location
from flipkd.errors import ConfigError, OutputError
from flipkd.run.cached_encoder import cache_root, text_cache_of
from flipkd.run.encode_unit import EncodeWorker
from flipkd.run.job import Job, begin, check_device, run_job
from flipkd.run.lock import locked
from flipkd.run.manifest import MANIFEST, WORK_FOLDER
from flipkd.run.observe import observed
from flipkd.run.output import remove_folder, remove_manifest
from flipkd.run.overlap import refuse_other_kind, refuse_overlap
from flipkd.run.ray_session import ray_session
from flipkd.run.record_schema import RecordSchema
from flipkd.run.record_template import with_recorded_template
from flipkd.run.store_folder import check_free, sealed_header
from flipkd.run.units import Plan, fingerprint, plan_units
from flipkd.vectors.cache import TextCache
from flipkd.vectors.cache_tidy import tidy
from flipkd.vectors.layout import HEADER_FILE

logger = logging.getLogger(__name__)

STORE_FILE = HEADER_FILE
PARTS = f"{WORK_FOLDER}/parts"
# Part of an encoder's fingerprint: to be changed where an encoder comes to give other vectors of the same text, for
# caches, stores and calibrations must not mix them.
_ARITHMETIC = {"float32": "float32", "bf16": "bf16", "int8": "int8, smoothed"}


@dataclass(frozen=True)
class EncodePlan:
    """An encode job, planned: what ``encode`` runs, and what ``score`` needs to know of it beforehand.

    Args:
        config: what was asked for, with the template that is used.
        plan: units over the record files.
        fingerprint: of the store: encoder, template, dtype and every input file.
        run_fingerprint: the same without the input files.
        encoder_fingerprint: of the encoder alone: to hash a large model takes seconds, so it is done once.
        id_kind: how the records' ids are compared; see ``flipkd.vectors.id_types``.
    """

    config: EncodeConfig
    plan: Plan
    fingerprint: str
    run_fingerprint: str
    encoder_fingerprint: str
    id_kind: str


def _row_bytes(config: EncodeConfig) -> int:
    from flipkd.models.folder import read_folder
    from flipkd.models.vector_size import vector_size

    return row_bytes(vector_size(read_folder(config.encoder.folder)) or 1024, config.dtype)


def row_bytes(dimension: int, dtype: str) -> int:
    """Bytes of a record in the store, estimated: its vector, and id, scale, status and place in the index."""
    return dimension * {"float32": 4, "bf16": 2, "int8": 1}[dtype] + 64


def encoder_fingerprint(options: EncoderOptions) -> str:
    """Fingerprint of an encoder folder and the options that change its vectors.

    Raises:
        ModelError: the folder cannot be loaded, or may not be.
        ConfigError: the maximum length is more than the model can take.
    """
    from flipkd.models.folder import folder_fingerprint, read_folder
    from flipkd.models.longest_text import check_max_length
    from flipkd.models.trust import check_code

    transformer_path = read_folder(options.folder).transformer_path
    check_code(transformer_path, options.trust_remote_code)  # before any work
    check_max_length(transformer_path, options.max_length)
    folder = folder_fingerprint(options.folder, options.max_length)
    return fingerprint({"folder": folder, "dtype": _ARITHMETIC[options.dtype]})


def plan_encode(config: EncodeConfig, is_right: bool = False, encoder: str | None = None) -> EncodePlan:
    """Lists the record files, looks at their schemas, and cuts them into units.

    Args:
        config: what was asked for.
        is_right: whether these are the right side's records: then messages name ``--right-...``.
        encoder: ``encoder_fingerprint`` of the encoder, where the caller knows it already.

    Raises:
        ConfigError: a column is missing, the template does not parse, or the cache or the device cannot be used.
        InputError: the records cannot be read.
    """
    if config.cache is not None:
        cache_root(config.cache)
    check_device(config.encoder.device, config.run)
    records = open_location(config.records)
    config, told_by = with_recorded_template(config)
    schema = RecordSchema(config.id_column, config.text_template, is_right, told_by)
    shards = find_shards(records)
    skip = config.run.on_bad_shard == "skip"
    if encoder is None:
        encoder = encoder_fingerprint(config.encoder)
    run_fingerprint = fingerprint(
        {
            "kind": "encode",
            "format": 1,
            "encoder": encoder,
            "template": config.text_template,
            "id_column": config.id_column,
            "dtype": config.dtype,
            "rows_per_unit": config.rows_per_unit,
        }
    )
    plan = plan_units(
        records,
        shards,
        config.rows_per_unit,
        run_fingerprint,
        split_row_groups=True,
        skip_bad_shards=skip,
        check=schema.look,
    )
    schema.refuse_negative(records, shards, skip)
    store = fingerprint({"run": run_fingerprint, "units": [unit.fingerprint for unit in plan.units]})
    return EncodePlan(config, plan, store, run_fingerprint, encoder, schema.id_kind)


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Builds (or finishes building) the store. Returns the manifest; see ``Job`` for the errors."""
    output = open_location(config.output)
    if not output.is_local:
        raise ConfigError(f"--output {output.uri}: a store is mapped into memory, so it must be a local folder")
    refuse_overlap(output, [("--records", open_location(config.records))], config.cache)
    return encode_planned(plan_encode(config))


def encode_planned(planned: EncodePlan, waits: bool = False) -> dict[str, Any]:
    """Runs a planned encode job under the store's lock; ``waits`` for another job that makes the same store."""
    config = planned.config
    output = open_location(config.output)
    check_free(Path(output.path), config.run.overwrite)
    refuse_other_kind(output, "encode")
    with locked(output, waits), ray_session(), observed("encode", config.run, output):
        sealed = sealed_header(Path(output.path), config.run.overwrite)
        if sealed is not None and sealed["fingerprint"] == planned.fingerprint:
            manifest = read_json(output, MANIFEST)
            # Else the run before was killed between its last two steps, or could not read some records.
            if manifest is not None and manifest["complete"]:
                logger.info("%s is complete already", output.uri)
                remove_folder(output.child(PARTS))  # of a run that was killed just before it did
                if config.cache_limit_bytes is not None:  # it may be another than that run's
                    manifest.update(_tidied(config, text_cache_of(config, planned.encoder_fingerprint)))
                return {**manifest, "units_resumed": manifest["units"], "rows_per_second": 0.0}
            sealed = None
        # One that lacks records may be finished; if its parts are of other records, run_job says so.
        if sealed is not None and sealed.get("complete", True) and not config.run.overwrite:
            raise ConfigError(
                f"{output.uri} holds the store of another run, or of records that have changed since; "
                "choose another --output, or pass --overwrite to replace it"
            )
        parts = output.child(PARTS)
        # Before any work: its folder must be one that can be used.
        cache = text_cache_of(config, planned.encoder_fingerprint)
        records = open_location(config.records)
        worker = partial(
            EncodeWorker, _for_workers(config), records, parts, planned.run_fingerprint, planned.encoder_fingerprint
        )
        job = Job(
            kind="encode",
            output=parts,
            plan=planned.plan,
            fingerprint=planned.run_fingerprint,
            make_worker=worker,
            run=config.run,
            unit_name="records",
            uses_model=True,
            output_bytes=planned.plan.rows * _row_bytes(config),
            about={"encoder": config.encoder.folder, "template": config.text_template},
            device=config.encoder.device,
        )
        done = begin(job)
        remove_manifest(output)  # of a store that lacks records, or is replaced
        manifest = run_job(job, done)
        manifest.update(_tidied(config, cache))
        return _seal(planned, output, parts, manifest)


def _tidied(config: EncodeConfig, cache: TextCache | None) -> dict[str, Any]:
    """Compacts the cache, if there is one; what the manifest says of it."""
    if cache is None:
        return {}
    try:
        return {"cache": tidy(cache, config.cache_limit_bytes)}
    except OutputError as error:  # the vectors are there: no reason to fail
        logger.warning("the text cache was not compacted: %s", error)
        return {}


def _for_workers(config: EncodeConfig) -> EncodeConfig:
    """With paths that a worker with another working directory understands."""
    from flipkd.models.folder import absolute_model

    cache = None if config.cache is None else open_location(config.cache).path
    encoder = replace(config.encoder, folder=absolute_model(config.encoder.folder))
    return replace(config, cache=cache, encoder=encoder)


def _seal(planned: EncodePlan, output: Location, parts: Location, manifest: dict[str, Any]) -> dict[str, Any]:
    from flipkd.vectors.seal import seal_store

    started = time.perf_counter()
    done = [
        unit.output
        for unit in planned.plan.units
        if parts.filesystem.get_file_info(parts.child(unit.output).path).is_file
    ]
    header = {
        "fingerprint": planned.fingerprint,
        "template": planned.config.text_template,
        "dtype": planned.config.dtype,
        "encoder": planned.encoder_fingerprint,
        "complete": manifest["complete"],
    }
    sealed = seal_store(output.path, [parts.child(name).path for name in done], header)
    manifest = {
        **manifest,
        "store": {key: value for key, value in sealed.items() if key not in header},
        "seal_seconds": round(time.perf_counter() - started, 3),
    }
    write_json(output, MANIFEST, manifest)
    if manifest["complete"]:  # else the next run goes on from them with what it can read
        remove_folder(parts)
    return manifest
