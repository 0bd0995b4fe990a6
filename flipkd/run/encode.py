"""Record tables to a vector store: one unit in, one part file out; then the parts are sealed into mapped files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.config import EncodeConfig, EncoderOptions
from flipkd.data.commit import ShardWriter, read_json, write_json
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import distinct_texts
from flipkd.data.records import (
    Texts,
    as_text,
    render_texts,
    template_fields,
    text_digests,
)
from flipkd.data.shards import ShardReader, find_shards
from flipkd.errors import ConfigError, OutputError
from flipkd.run.cached_encoder import CachedEncoder, text_cache
from flipkd.run.job import Job, run_job
from flipkd.run.manifest import MANIFEST, SOURCE_KEY, WORK_FOLDER, UnitReport
from flipkd.run.output import locked, refuse_overlap, remove_folder
from flipkd.run.store_folder import check_free, sealed_header
from flipkd.run.units import Plan, WorkUnit, fingerprint, plan_units
from flipkd.vectors.cache import TextCache
from flipkd.vectors.cache_tidy import tidy
from flipkd.vectors.layout import HEADER_FILE, STATUS_INVALID_TEXT, STATUS_MISSING_TEXT, STATUS_TRUNCATED

logger = logging.getLogger(__name__)

STORE_FILE = HEADER_FILE
PARTS = f"{WORK_FOLDER}/parts"
_PART_OPTIONS = {"compression": "none", "use_dictionary": False, "write_statistics": False}
_READ_ROWS = 16_384


@dataclass(frozen=True)
class EncodePlan:
    """An encode job, planned: what ``encode`` runs, and what ``score`` needs to know of it beforehand.

    Args:
        config: what was asked for.
        plan: units over the record files.
        fingerprint: of the store: encoder, template, dtype and every input file.
        run_fingerprint: the same without the input files.
        encoder_fingerprint: of the encoder alone: to hash a large model takes seconds, so it is done once.
    """

    config: EncodeConfig
    plan: Plan
    fingerprint: str
    run_fingerprint: str
    encoder_fingerprint: str


def encoder_fingerprint(options: EncoderOptions) -> str:
    """Fingerprint of an encoder folder and the options that change its vectors.

    Raises:
        ModelError: the folder cannot be loaded, or may not be.
    """
    from flipkd.models.folder import folder_fingerprint, read_folder
    from flipkd.models.trust import check_code

    check_code(read_folder(options.folder).transformer_path, options.trust_remote_code)  # before any work
    return fingerprint({"folder": folder_fingerprint(options.folder, options.max_length), "dtype": options.dtype})


def _cache(config: EncodeConfig, encoder: str) -> TextCache | None:
    return None if config.cache is None else text_cache(config.cache, encoder, config.dtype)


def plan_encode(config: EncodeConfig) -> EncodePlan:
    """Lists the record files and cuts them into units.

    Raises:
        ConfigError: a column is missing, or the template does not parse.
        InputError: the records cannot be read.
    """
    records = open_location(config.records)
    columns = [config.id_column, *template_fields(config.text_template)]
    shards = find_shards(records)
    skip = config.run.on_bad_shard == "skip"
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
        records, shards, config.rows_per_unit, run_fingerprint, split_row_groups=True, skip_bad_shards=skip
    )
    check_schema(records, plan, columns, columns[1:])
    store = fingerprint({"run": run_fingerprint, "units": [unit.fingerprint for unit in plan.units]})
    return EncodePlan(config, plan, store, run_fingerprint, encoder)


def check_schema(location: Location, plan: Plan, columns: Sequence[str], texts: Sequence[str]) -> None:
    """Looks for columns, and at the types of texts, in the first file: what is wrong fails before any work."""
    if plan.units:
        with ShardReader(location, plan.units[0].shard) as reader:
            reader.check_columns(columns)
            for name in texts:
                if name in reader.schema.names:  # else a folder's name, which is text
                    as_text(pa.array([], reader.schema.field(name).type), name)


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Builds (or finishes building) the store. Returns the manifest; see ``Job`` for the errors."""
    output = open_location(config.output)
    if not output.is_local:
        raise ConfigError(f"--output {output.uri}: a store is mapped into memory, so it must be a local folder")
    refuse_overlap(output, [("--records", open_location(config.records))])
    return encode_planned(plan_encode(config))


def encode_planned(planned: EncodePlan) -> dict[str, Any]:
    """Runs a planned encode job under the store's lock."""
    config = planned.config
    output = open_location(config.output)
    check_free(Path(output.path))
    with locked(output):
        sealed = sealed_header(Path(output.path), config.run.overwrite)
        if sealed is not None and sealed["fingerprint"] == planned.fingerprint:
            logger.info("%s is complete already", output.uri)
            return read_json(output, MANIFEST) or {}
        if sealed is not None and not config.run.overwrite:
            raise ConfigError(
                f"{output.uri} holds the store of another run, or of records that have changed since; "
                "choose another --output, or pass --overwrite to replace it"
            )
        parts = output.child(PARTS)
        cache = _cache(config, planned.encoder_fingerprint)  # before any work: its folder must be one that can be used
        records = open_location(config.records)
        worker = partial(EncodeWorker, config, records, parts, planned.run_fingerprint, planned.encoder_fingerprint)
        job = Job(
            kind="encode",
            output=parts,
            plan=planned.plan,
            fingerprint=planned.run_fingerprint,
            make_worker=worker,
            run=config.run,
            unit_name="records",
            uses_model=True,
            output_bytes=planned.plan.rows * 1600,
            about={"encoder": config.encoder.folder, "template": config.text_template},
        )
        manifest = run_job(job)
        if cache is not None:
            try:
                manifest["cache"] = tidy(cache, config.cache_limit_bytes)
            except OutputError as error:  # the vectors are there: no reason to fail
                logger.warning("the text cache was not compacted: %s", error)
        return _seal(planned, output, parts, manifest)


def _seal(planned: EncodePlan, output: Location, parts: Location, manifest: dict[str, Any]) -> dict[str, Any]:
    from flipkd.vectors.store import seal_store

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
    remove_folder(parts)
    return manifest


class EncodeWorker:
    """Encodes the records of a unit and commits one part file.

    Part columns: ``id``, ``vector`` (fixed_size_binary of one row, unit length so that a dot product is a cosine),
    ``status`` (uint8 bits of ``flipkd.vectors.layout``), ``text_digest`` (tells duplicates from conflicts).
    """

    def __init__(
        self,
        config: EncodeConfig,
        records: Location,
        output: Location,
        run_fingerprint: str,
        encoder_fingerprint: str,
        threads: int,
    ) -> None:
        self._config, self._records, self._output, self._run = config, records, output, run_fingerprint
        self._encoder = CachedEncoder(config.encoder, config.dtype, _cache(config, encoder_fingerprint), threads)

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        seconds = {"read": 0.0, "load": 0.0, "encode": 0.0, "write": 0.0}
        config = self._config
        started = time.perf_counter()
        columns = list(dict.fromkeys([config.id_column, *template_fields(config.text_template)]))
        with ShardReader(self._records, unit.shard) as reader:
            table = pa.concat_tables(unit.read(reader, columns, _READ_ROWS))
        texts, indices = self._distinct(render_texts(table, config.text_template))
        seconds["read"] = time.perf_counter() - started

        started = time.perf_counter()
        present = np.flatnonzero(np.asarray(texts.values.is_valid()))
        encoded = self._encoder.rows(texts.values.take(pa.array(present)))
        values = np.zeros((len(texts.values), encoded.rows.dim), encoded.rows.values.dtype)
        values[present] = encoded.rows.values
        status = np.full(len(texts.values), STATUS_MISSING_TEXT, np.uint8)
        status[present] = encoded.status
        status[texts.invalid] = STATUS_INVALID_TEXT
        seconds["load"] = encoded.load_seconds
        seconds["encode"] = time.perf_counter() - started - encoded.load_seconds

        started = time.perf_counter()
        digests = text_digests(texts.values, bytes.fromhex(self._run))
        arrays = {
            "id": table.column(config.id_column),
            "vector": fixed_rows(values, indices),
            "status": pa.array(status[indices]),
            "text_digest": digests.take(pa.array(indices)),
        }
        report = UnitReport(
            unit.output,
            table.num_rows,
            table.num_rows,
            {
                "missing_text": int(np.count_nonzero(status[indices] & STATUS_MISSING_TEXT)),
                "invalid_text": int(np.count_nonzero(status[indices] & STATUS_INVALID_TEXT)),
            },
            {
                "truncated": int(np.count_nonzero(status[indices] & STATUS_TRUNCATED)),
                "distinct_texts": len(present),
                "encoded_texts": encoded.encoded,
                "cached_texts": encoded.cached,
                "tokens": encoded.tokens,
            },
            seconds,
        )
        self._commit(unit, pa.table(arrays), report)
        seconds["write"] = time.perf_counter() - started
        return report

    def _distinct(self, texts: Texts) -> tuple[Texts, npt.NDArray[np.int32]]:
        """Distinct texts of the unit; invalid ones share the last place, apart from the missing ones."""
        distinct, indices = distinct_texts(pa.chunked_array([texts.values]), "text")
        values = pa.concat_arrays([distinct.values, pa.nulls(1, pa.large_string())])
        invalid = np.zeros(len(values), np.bool_)
        invalid[-1] = True
        return Texts(values, invalid), np.where(texts.invalid, np.int32(len(values) - 1), indices)

    def _commit(self, unit: WorkUnit, table: pa.Table, report: UnitReport) -> None:
        metadata = report.footer("encode", self._run, unit.fingerprint)
        metadata[SOURCE_KEY] = json.dumps({"path": unit.shard.name, "first_row": unit.first_row})
        with ShardWriter(self._output, unit.output, table.schema, metadata, _PART_OPTIONS) as writer:
            writer.write(table)
            writer.commit()


def fixed_rows(values: npt.NDArray[Any], indices: npt.NDArray[np.int32]) -> pa.FixedSizeBinaryArray:
    """[N] fixed_size_binary: the bytes of ``values[indices]``, one row each."""
    taken = np.ascontiguousarray(values[indices])
    width = taken.shape[1] * taken.dtype.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(taken), [None, pa.py_buffer(taken.view(np.uint8).reshape(-1))])
