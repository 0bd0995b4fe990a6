"""Forget records: their vectors leave the text cache, and stores that hold them are deleted.

A vector is found by its text, so the records must still be in the table. The texts that a record had on earlier nights
are not known from its table of today: run this with the older table too, or delete the cache, which costs no more than
encoding anew. Run it while no job uses the cache or the store.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.config import EncodeConfig
from flipkd.data.columns import take_rows
from flipkd.data.find import PARQUET_SUFFIXES, Shard, find_shards
from flipkd.data.location import Location, open_location, reason
from flipkd.data.records import render_texts
from flipkd.data.shards import ShardReader
from flipkd.data.template import template_fields
from flipkd.errors import ConfigError, InputError
from flipkd.run.cached_encoder import cache_root
from flipkd.run.encode import PARTS
from flipkd.run.kept_stores import remove_store
from flipkd.run.lock import locked
from flipkd.run.output import STORE_NAME, WORK_NAME, remove_folder
from flipkd.run.record_schema import RecordSchema
from flipkd.run.record_template import with_recorded_template
from flipkd.run.store_folder import has_rest
from flipkd.vectors.cache_tidy import forget_texts
from flipkd.vectors.id_types import check_id_type, decoded
from flipkd.vectors.layout import SEALING_FOLDER
from flipkd.vectors.store import VectorStore, is_sealed

_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,20}\s*")
_NUMBERS = ("int64", "uint64")  # kinds of ids, see flipkd.vectors.id_types
_BATCH_ROWS = 1 << 16


def forget(config: EncodeConfig, ids: str) -> dict[str, Any]:
    """Deletes what was made of some records.

    From the text cache the vectors of their texts go, for every encoder that has seen them; another record of the same
    text is encoded anew when it is next met. A store, ``output`` or one that ``score`` keeps in the cache folder, is
    deleted whole if it holds one of the records (our choice: ids and their index go too, and with the cache it is made
    again in a fraction of the time), and so are unfinished stores and the work of broken-off runs in the cache folder.

    Args:
        config: of ``encode``: ``records``, ``id_column``, text or template, ``output`` and ``cache`` say where to look.
        ids: a Parquet file with the ids in ``id_column`` (or in its only column), or a text file with one id a line.

    Returns:
        ``ids``, ``ids_not_found`` (not in the records, so nothing of them was looked for in the cache), ``texts``
        (distinct ones of the ids that were found), ``deleted_vectors`` (of these, from the cache) and
        ``deleted_stores``.

    Raises:
        ConfigError: an option cannot be used, such as a cache that is not there.
        InputError: the ids or the records cannot be read, or there is no id.
        OutputError: something cannot be deleted.
        OutputInUseError: a job is working on one of the stores.
    """
    config, told_by = with_recorded_template(config)
    if config.cache is not None and not cache_root(config.cache).parent.is_dir():
        raise ConfigError(f"--cache {config.cache} does not exist, so nothing was forgotten; name the jobs' cache")
    wanted = _read_ids(ids, config.id_column)
    records = open_location(config.records)
    schema = RecordSchema(config.id_column, config.text_template, told_by=told_by)
    shards = find_shards(records)
    for shard in shards:
        with ShardReader(records, shard) as reader:
            schema.look(shard, reader)
    if schema.id_kind in _NUMBERS:  # 01 is 1 then, as in a store
        wanted = pc.unique(pa.array([_decimal(value) or value for value in wanted.to_pylist()], wanted.type))
    texts, known = _texts_of(records, shards, config, wanted)
    stores, deleted = [open_location(config.output)], 0
    if config.cache is not None:
        root = cache_root(config.cache)
        kept = sorted(path for path in root.parent.glob("*-*") if path.is_dir())
        stores += [open_location(path) for path in kept if STORE_NAME.fullmatch(path.name)]
        for path in kept:
            if WORK_NAME.fullmatch(path.name):
                remove_folder(open_location(path))
        deleted = forget_texts(root, texts)
    return {
        "ids": len(wanted),
        "ids_not_found": len(wanted) - known,
        "texts": len(texts),
        "deleted_vectors": deleted,
        "deleted_stores": sum(_forget_store(store, wanted) for store in stores),
    }


def _read_ids(path: str, column: str) -> pa.Array:
    """The distinct ids of a file, in the form of ``_comparable``."""
    location = open_location(path)
    if path.lower().endswith(PARQUET_SUFFIXES):
        found = []
        for shard in find_shards(location):  # it may be a folder: Spark names them so
            with ShardReader(location, shard) as reader:
                name = reader.schema.names[0] if len(reader.schema.names) == 1 else column
                found += [_comparable(table.column(0), name) for table in reader.all_batches([name], _BATCH_ROWS)]
        ids = pa.concat_arrays(found)
    else:
        try:
            with location.filesystem.open_input_stream(location.path) as source:
                lines = source.read().removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            raise InputError(f"--forget {path} cannot be read: {reason(error)}") from error
        ids = pa.array([line for line in lines if line.strip()], pa.large_binary())
    ids = pc.unique(ids).drop_null()
    if not len(ids):
        raise InputError(f"--forget {path} holds no id")
    return ids


def _comparable(ids: pa.ChunkedArray, column: str) -> pa.Array:
    """[N] large_binary: strings and binaries as they are, integers in decimal digits."""
    check_id_type(ids.type, column)
    array = decoded(pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.nulls(0, ids.type))
    if pa.types.is_integer(array.type):
        array = array.cast(pa.large_string())
    return array.cast(pa.large_binary())


def _decimal(value: bytes) -> bytes | None:
    """An integer as ``_comparable`` writes it, without blanks, plus or leading zeros; None for what is none."""
    return b"%d" % int(value) if _INTEGER.fullmatch(value) else None


def _texts_of(
    records: Location, shards: Sequence[Shard], config: EncodeConfig, wanted: pa.Array
) -> tuple[pa.Array, int]:
    """The distinct texts of the wanted records, and how many of the ids were found."""
    columns = list(dict.fromkeys([config.id_column, *template_fields(config.text_template)]))
    texts, known = [pa.array([], pa.large_string())], [pa.array([], pa.large_binary())]
    for shard in shards:
        with ShardReader(records, shard) as reader:
            for table in reader.all_batches(columns, _BATCH_ROWS):
                ids = _comparable(table.column(config.id_column), config.id_column)
                chosen = pc.is_in(ids, value_set=wanted)
                known.append(ids.filter(chosen))
                own = take_rows(table, np.flatnonzero(chosen))
                texts.append(render_texts(own, config.text_template).values.drop_null())
    return pc.unique(pa.concat_arrays(texts)), len(pc.unique(pa.concat_arrays(known)))


def _forget_store(store: Location, wanted: pa.Array) -> bool:
    """Deletes a store that holds one of the ids, or is not finished; whether there was one."""
    folder = Path(store.path)
    is_unfinished = folder.joinpath(PARTS).is_dir() or folder.joinpath(SEALING_FOLDER).is_dir()
    if not (is_sealed(folder) or is_unfinished or has_rest(folder)):
        return False
    with locked(store):
        if is_sealed(folder) and not is_unfinished:
            index = VectorStore.open(folder).index
            if (index.look_up(_as_stored(wanted, index.kind)) < 0).all():
                return False
        remove_store(store)
    return True


def _as_stored(wanted: pa.Array, kind: str) -> pa.Array:
    """The ids that a store of this kind can hold, in its type."""
    if kind not in _NUMBERS:
        return wanted
    bounds = np.iinfo(kind)
    numbers = [int(value) for value in map(_decimal, wanted.to_pylist()) if value is not None]
    return pa.array([number for number in numbers if bounds.min <= number <= bounds.max], pa.type_for_alias(kind))
