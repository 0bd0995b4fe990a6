"""Id pairs to row numbers: flipkd's mapped index against maintained libraries that do the same join.

1 M records, 20 M pairs, so 40 M look-ups; int64 ids, then strings. All get the ids as Arrow holds them (what a Parquet
reader gives) and two threads, and give two arrays of row numbers in the order of the pairs. Peers get the job whole, so
that they build their hash table once, not once per work unit; pandas' table is built before the clock starts, as
flipkd's lies in the store. None of the peers can share its table between processes.

    python -m benchmarks.index_join [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

THREADS = 2
os.environ["POLARS_MAX_THREADS"] = str(THREADS)  # read when polars is imported

import duckdb  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import polars as pl  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from benchmarks.common import interleave, report  # noqa: E402
from flipkd.vectors.seal import seal_store  # noqa: E402
from flipkd.vectors.store import VectorStore  # noqa: E402

Rows = tuple[NDArray[Any], NDArray[Any]]
Join = Callable[[], Rows]


def make_store(folder: Path, ids: pa.Array) -> VectorStore:
    """A store of one-dimensional vectors: the index is what is looked at."""
    count = len(ids)
    vector = pa.Array.from_buffers(pa.binary(1), count, [None, pa.py_buffer(bytes(count))])
    digest = pa.Array.from_buffers(pa.binary(16), count, [None, pa.py_buffer(bytes(16 * count))])
    status = pa.array(np.zeros(count, np.uint8))
    pq.write_table(
        pa.table({"id": ids, "vector": vector, "status": status, "text_digest": digest}), folder / "part.parquet"
    )
    seal_store(folder / "store", [folder / "part.parquet"], {"dtype": "int8"})
    return VectorStore.open(folder / "store")


def joins(store: VectorStore, records: pa.Array, left: pa.Array, right: pa.Array) -> dict[str, Join]:
    """The same job, by name."""
    pool = ThreadPoolExecutor(THREADS)

    def both(side: Callable[[pa.Array], NDArray[Any]]) -> Rows:
        """One side per thread, for libraries that use one thread a call."""
        one, other = pool.map(side, (left, right))
        return one, other

    def flipkd() -> Rows:
        return store.index.look_up(left, threads=THREADS), store.index.look_up(right, threads=THREADS)

    def pyarrow() -> Rows:
        return both(lambda ids: pc.index_in(ids, value_set=records).fill_null(-1).to_numpy())

    polars_records = pl.DataFrame({"id": pl.from_arrow(records), "row": pl.arange(len(records), eager=True)})

    def polars() -> Rows:
        def side(ids: pa.Array) -> NDArray[Any]:
            pairs = pl.DataFrame({"id": pl.from_arrow(ids)})
            joined = pairs.join(polars_records, on="id", how="left", maintain_order="left")
            rows: NDArray[Any] = joined["row"].fill_null(-1).to_numpy()
            return rows

        return side(left), side(right)

    connection = duckdb.connect(config={"threads": THREADS})
    connection.register("records", pa.table({"id": records, "row": np.arange(len(records))}))
    connection.register("pairs", pa.table({"left_id": left, "right_id": right, "place": np.arange(len(left))}))

    def duckdb_() -> Rows:
        # A DuckDB join gives rows in any order, so the pair's place comes along and puts them back.
        table = connection.execute(
            "SELECT place, coalesce(a.row, -1) AS a, coalesce(b.row, -1) AS b FROM pairs "
            "LEFT JOIN records a ON a.id = left_id LEFT JOIN records b ON b.id = right_id"
        ).fetchnumpy()
        one, other = np.empty(len(left), np.int64), np.empty(len(left), np.int64)
        one[table["place"]], other[table["place"]] = table["a"], table["b"]
        return one, other

    found: dict[str, Join] = {
        "flipkd": flipkd,
        "pyarrow.index_in": pyarrow,
        "polars.join": polars,
        "duckdb.join": duckdb_,
    }
    # Of integers only: pandas makes Python objects of strings (0.8 M ids/s).
    if pa.types.is_integer(records.type):
        pandas_index = pd.Index(records.to_pandas())
        pandas_index.get_indexer(pandas_index[:1])  # builds its table
        found["pandas.get_indexer"] = lambda: both(lambda ids: pandas_index.get_indexer(pd.Index(ids.to_pandas())))
    return found


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs and records")
    quick = parser.parse_args().quick
    record_count, pair_count, rounds = (100_000, 2_000_000, 3) if quick else (1_000_000, 20_000_000, 3)

    rng = np.random.default_rng(7)
    numbers = rng.choice(1_000_000_000, record_count, replace=False)
    picks = [rng.integers(0, record_count, pair_count) for _ in range(2)]
    correct, table, ratios = True, [], {}
    for kind in ("int64", "string"):
        if kind == "int64":
            records = pa.array(numbers)
        else:
            records = pa.array(np.char.add("cust-", np.char.zfill(numbers.astype("U9"), 9)))
        left, right = (records.take(pa.array(pick)) for pick in picks)
        with tempfile.TemporaryDirectory() as folder:
            runs = joins(make_store(Path(folder), records), records, left, right)
            for name, run in runs.items():
                same = all(np.array_equal(rows, pick) for rows, pick in zip(run(), picks, strict=True))
                correct = correct and same
                if not same:
                    print(f"{name} of {kind} ids is wrong")
            if not correct:
                break
            seconds = {name: statistics.median(times) for name, times in interleave(runs, rounds).items()}
        rates = {name: 2 * pair_count / second / 1e6 for name, second in seconds.items()}
        for name, rate in rates.items():
            table.append({"ids": kind, "join": name, "M ids/s": round(rate, 1)})
            if name != "flipkd":
                ratios[f"{kind}_over_{name}"] = round(rates["flipkd"] / rate, 2)
        ratios[f"{kind}_over_best_peer"] = round(rates["flipkd"] / max(r for n, r in rates.items() if n != "flipkd"), 2)
    report("index_join", table, ratios, correct)


if __name__ == "__main__":
    main()
