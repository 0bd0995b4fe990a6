"""The distinct texts of inline pairs, over all units of a job, as a record table for ``encode``.

Units list their own distinct texts; then one pass keeps the first of each. A text is known by its keyed digest. The key
is derived from the run and is no secret: the folder holds the texts themselves, is readable by its owner alone, and is
deleted at the end of the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.commit import ShardWriter, read_json, write_json
from flipkd.data.location import Location
from flipkd.data.pairs import distinct_texts
from flipkd.data.records import DIGEST_BYTES, text_digests
from flipkd.data.shards import ShardReader
from flipkd.run.manifest import MANIFEST, UnitReport, read_output, read_reports
from flipkd.run.output import remove_folder
from flipkd.run.units import WorkUnit, fingerprint
from flipkd.vectors.cache import first_of_each
from flipkd.vectors.segments import Words

logger = logging.getLogger(__name__)

# Of the record table that ``merge_texts`` writes.
TEXT_COLUMN = "text"
_SCHEMA = pa.schema([("id", pa.binary(DIGEST_BYTES)), (TEXT_COLUMN, pa.large_string())])
_OPTIONS = {"compression": "lz4", "use_dictionary": False, "write_statistics": False}
_BATCH_ROWS = 1 << 15
_ROWS_PER_FILE = 1_000_000
# Digests are compared in so many parts, one after another: what a comparison takes is small beside the digests then.
_PARTS = 16
SAMPLE_ROWS = 1 << 15


@dataclass(frozen=True)
class TextsTask:
    """What a worker needs to list a unit's distinct texts.

    Args:
        pairs: root of the pair table.
        output: folder for the lists.
        run_fingerprint: of the run.
        text_columns: names of the left and the right text column.
        digest_key: key of the digests.
    """

    pairs: Location
    output: Location
    run_fingerprint: str
    text_columns: tuple[str, str]
    digest_key: bytes


class TextsWorker:
    """Writes, for each unit, its distinct texts in order of first occurrence: columns ``id`` (digest) and ``text``."""

    def __init__(self, task: TextsTask, threads: int) -> None:
        del threads  # one unit is one thread's work
        self._task = task

    def __call__(self, unit: WorkUnit) -> UnitReport:
        """Runs one unit."""
        task, started, rows = self._task, time.perf_counter(), 0
        distinct = _SCHEMA.empty_table()
        with ShardReader(task.pairs, unit.shard, may_skip=True) as reader:
            for table in unit.read(reader, list(dict.fromkeys(task.text_columns)), _BATCH_ROWS):
                rows += table.num_rows
                found = [distinct]
                for name in task.text_columns:
                    texts = distinct_texts(table.column(name), name)[0].values.drop_null()
                    found.append(pa.table([text_digests(texts, task.digest_key), texts], schema=_SCHEMA))
                distinct = _first_of_each(pa.concat_tables(found))
        report = UnitReport(
            unit.output,
            rows,
            distinct.num_rows,
            counts={"distinct_texts": distinct.num_rows},
            seconds={"texts": time.perf_counter() - started},
        )
        metadata = report.footer("texts", task.run_fingerprint, unit.fingerprint)
        with ShardWriter(task.output, unit.output, _SCHEMA, metadata, _OPTIONS) as writer:
            writer.write(distinct)
            writer.commit()
        return report


def estimate_distinct(sample: Sequence[pa.Array], total: int) -> int:
    """How many distinct texts ``total`` texts have, from a sample: Chao's estimator d + f1 (f1 - 1) / (2 (f2 + 1)).

    d are the distinct texts of the sample, f1 those that stand in it once, f2 those that stand twice (A. Chao,
    Scandinavian Journal of Statistics 11, 1984, bias-corrected). It is a lower bound in expectation; a sample from one
    place of sorted input can mislead it.
    """
    counts = pa.chunked_array(sample).drop_null().value_counts().field("counts").to_numpy()
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return min(round(len(counts) + once * (once - 1) / (2 * (twice + 1))), total)


def is_merged(names: Sequence[str], output: Location) -> bool:
    """Whether ``merge_texts`` has made ``output`` of these lists.

    Then it stays, so that its files, and with them the fingerprint of the encode job, are the same in a resumed run.
    """
    finished = read_json(output, MANIFEST)
    return finished is not None and finished.get("lists") == fingerprint({"lists": list(names)})


def merge_texts(lists: Location, names: Sequence[str], output: Location) -> None:
    """Keeps the first of each text over all lists, in order, as Parquet files below ``output``.

    Needs about 24 bytes of memory per listed text while it runs, and the texts of one unit and of one file.

    Raises:
        InputError: a list is damaged.
    """
    remove_folder(output)
    stops = np.cumsum([report.rows_out for report in read_reports(lists, names)], dtype=np.int64)
    starts = np.concatenate([[0], stops[:-1]]) if names else stops
    keys = np.empty((stops[-1] if names else 0, 2), np.uint64)
    for name, start, stop in zip(names, starts, stops, strict=True):
        keys[start:stop] = _as_keys(read_output(lists, name, ["id"]).column("id"))
    first = _is_first(keys)
    files = 0
    waiting: list[pa.Table] = []
    for name, start, stop in zip(names, starts, stops, strict=True):
        waiting.append(read_output(lists, name, None).filter(pa.array(first[start:stop])))
        if sum(table.num_rows for table in waiting) >= _ROWS_PER_FILE or name == names[-1]:
            with ShardWriter(output, f"texts-{files:05d}.parquet", _SCHEMA, {}, _OPTIONS) as writer:
                writer.write(pa.concat_tables(waiting))
                writer.commit()
            files, waiting = files + 1, []
    write_json(output, MANIFEST, {"rows": int(first.sum()), "lists": fingerprint({"lists": list(names)})})


def _is_first(keys: Words) -> npt.NDArray[np.bool_]:
    """[N] whether a key of [N, 2] is the first of its kind."""
    first = np.zeros(len(keys), np.bool_)
    part = keys.view(np.uint8)[:, 0] % _PARTS
    for number in range(_PARTS):
        places = np.flatnonzero(part == number)
        first[places[first_of_each(keys[places])]] = True
    return first


def _as_keys(digests: pa.ChunkedArray) -> Words:
    """[N, 2] numbers that are equal where the digests are."""
    array = digests.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    data = np.frombuffer(array.buffers()[1], np.uint8)
    offset = array.offset * DIGEST_BYTES
    return data[offset : offset + len(array) * DIGEST_BYTES].view(np.uint64).reshape(-1, 2)


def _first_of_each(table: pa.Table) -> pa.Table:
    first = np.sort(first_of_each(_as_keys(table.column("id"))))
    return table if len(first) == table.num_rows else table.take(pa.array(first)).combine_chunks()
