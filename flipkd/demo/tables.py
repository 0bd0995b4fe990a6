"""The demo's input: what somebody has of an own matching task, as Parquet.

::

    labelled/train/*.parquet         left_text, right_text, label int8, group: pairs that somebody has judged
    labelled/validation/*.parquet    the same, for early stopping and the threshold
    records/left, records/right      id string, text string: the records of a night
    pairs/*.parquet                  left_id, right_id, label int8: that night's candidate pairs (their labels are for
                                     the evaluation; a real night has none)
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.demo.pair_sets import PairSet, PairSplits, pair_table, write_table
from flipkd.errors import OutputError

_RECORD_SHARDS = 2
_PAIR_SHARDS = 4


def demo_tables(pairs: PairSet) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Left records, right records (each id once, in order of first use), and pairs of ids with labels."""
    left = dict(zip(pairs.left_id, pairs.left_text, strict=True))
    right = dict(zip(pairs.right_id, pairs.right_text, strict=True))
    tables = [pa.table({"id": list(each), "text": list(each.values())}) for each in (left, right)]
    ids = {"left_id": pairs.left_id, "right_id": pairs.right_id, "label": pa.array(pairs.label)}
    return tables[0], tables[1], pa.table(ids)


def write_tables(output: Path, splits: PairSplits) -> None:
    """Writes all tables below ``output``. What is there already stays; other data, such as somebody's own, too.

    Raises:
        OutputError: there is other data in a folder, or it cannot be written.
    """
    left, right, pairs_of_ids = demo_tables(splits.test)
    tables = {
        "labelled/train": (pair_table(splits.train), _PAIR_SHARDS),
        "labelled/validation": (pair_table(splits.validation), _PAIR_SHARDS),
        "records/left": (left, _RECORD_SHARDS),
        "records/right": (right, _RECORD_SHARDS),
        "pairs": (pairs_of_ids, _PAIR_SHARDS),
    }
    files = {output / name / file: part for name, each in tables.items() for file, part in _shards(*each)}
    for name in tables:
        for path in sorted((output / name).glob("*")):
            if path not in files or not _holds(path, files[path]):
                raise OutputError(
                    f"{path.parent} holds other data than this demo's; choose another --output (the other size of the "
                    "demo needs one too), or run commands.sh there if the data is yours"
                )
    for path, part in files.items():
        if not path.exists():
            write_table(part, path)


def _shards(table: pa.Table, count: int) -> list[tuple[str, pa.Table]]:
    edges = [table.num_rows * shard // count for shard in range(count + 1)]
    parts = enumerate(itertools.pairwise(edges))
    return [(f"part-{shard}.parquet", table.slice(first, last - first)) for shard, (first, last) in parts]


def _holds(path: Path, table: pa.Table) -> bool:
    try:
        return bool(pq.read_table(path).equals(table))
    except (OSError, pa.ArrowException):
        return False
