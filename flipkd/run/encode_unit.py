"""Encode one unit of records: read, make texts, encode the distinct ones, commit one part file."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.config import EncodeConfig
from flipkd.data.commit import ShardWriter
from flipkd.data.location import Location
from flipkd.data.pairs import distinct_texts
from flipkd.data.records import DIGEST_BYTES, Texts, render_texts, text_digests
from flipkd.data.shards import ShardReader
from flipkd.data.template import template_fields
from flipkd.run.cached_encoder import CachedEncoder, text_cache_of
from flipkd.run.manifest import SOURCE_KEY, UnitReport
from flipkd.run.units import WorkUnit
from flipkd.vectors.id_types import check_id_type
from flipkd.vectors.layout import STATUS_INVALID_TEXT, STATUS_MISSING_TEXT, STATUS_TRUNCATED

_INVALID_DIGEST = b"\xff" * DIGEST_BYTES  # the missing text has no digest
_PART_OPTIONS = {"compression": "none", "use_dictionary": False, "write_statistics": False}
_READ_ROWS = 16_384


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
        self._encoder = CachedEncoder(config.encoder, config.dtype, text_cache_of(config, encoder_fingerprint), threads)

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        seconds = {"read": 0.0, "load": 0.0, "encode": 0.0, "write": 0.0}
        config = self._config
        started = time.perf_counter()
        columns = list(dict.fromkeys([config.id_column, *template_fields(config.text_template)]))
        with ShardReader(self._records, unit.shard, may_skip=True) as reader:
            reader.check_columns(columns)
            check_id_type(reader.column_type(config.id_column), config.id_column)  # not only when the store is sealed
            table = pa.concat_tables(unit.read(reader, columns, _READ_ROWS))
            rendered = render_texts(table, config.text_template)
        texts, indices = self._distinct(rendered)
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
        # The last place is of invalid texts: not the same as none, where one id has both.
        digests = pa.concat_arrays([digests.slice(0, len(digests) - 1), pa.array([_INVALID_DIGEST], digests.type)])
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
