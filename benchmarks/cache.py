"""Only what changed: a second night with 2 % changed records, and look-ups of a million cached texts.

    python -m benchmarks.cache [--quick]

Nights: ``flipkd-batch encode`` of 20,000 records (see ``benchmarks.encode``; all-MiniLM-L6-v2, bf16 arithmetic, int8
rows), each in a fresh process with an own output: a first night that fills the cache, a second one after 400 of the
records have changed, and the same without a cache. The stores of the last two must be equal byte by byte.

Look-ups: a million texts under random int8 vectors of 384, put in as 20 segments and then compacted, as at the end of a
night. A cache that is freshly opened hashes and finds all of them in units of 50,000; every vector is compared.

Ratios:

    second_night_share    seconds of the stage ``encode``, second night / first night; to stay within 0.05. Loading
                          PyTorch and the model is not in it: that takes the same on both nights, and has a column
    lookups_per_second    texts hashed and found per second; at least 500,000
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import report
from benchmarks.encode import record_texts
from flipkd.assets import minilm_folder
from flipkd.vectors.cache import open_cache
from flipkd.vectors.cache_tidy import tidy
from flipkd.vectors.rows import VectorRows

_CHANGED_SHARE = 0.02
_UNIT_ROWS = 50_000
_DIM = 384
_ROUNDS = 3


def night(root: Path, texts: list[str], output: str, *, cached: bool) -> dict[str, Any]:
    """Encodes a record table in a fresh process; returns the manifest and the seconds of the whole process."""
    pq.write_table(pa.table({"id": np.arange(len(texts)), "text": texts}), root / "records.parquet")
    command = [
        sys.executable, "-m", "flipkd.cli", "encode", "--encoder", str(minilm_folder()), "--encoder-dtype", "bf16",
        "--records", str(root / "records.parquet"), "--output", str(root / output), "--no-progress", "--json",
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *(["--cache", str(root / "cache")] if cached else [])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"encode ended with {done.returncode}:\n{done.stderr[-2000:]}")
    manifest: dict[str, Any] = json.loads(done.stdout)
    return {**manifest, "process_seconds": time.perf_counter() - started}


def same_vectors(root: Path, one: str, other: str) -> bool:
    """Whether two stores hold the same bytes."""
    names = ("vectors.bin", "status.bin", "ids.bin", "slots.bin")
    return all((root / one / name).read_bytes() == (root / other / name).read_bytes() for name in names)


def nights(count: int) -> tuple[list[dict[str, Any]], float, bool]:
    """Rows of the table, the second night's share, and whether all was right."""
    texts = record_texts(count + round(count * _CHANGED_SHARE))
    changed, texts = texts[count:], texts[:count]
    places = random.Random(1).sample(range(count), len(changed))
    with tempfile.TemporaryDirectory(prefix="flipkd-cache-") as folder:
        root = Path(folder)
        runs = {"first night": night(root, texts, "first", cached=True)}
        for place, text in zip(places, changed, strict=True):
            texts[place] = text
        runs["second night"] = night(root, texts, "second", cached=True)
        runs["second night without a cache"] = night(root, texts, "plain", cached=False)
        correct = same_vectors(root, "second", "plain") and not same_vectors(root, "first", "plain")
    correct &= [run["counts"]["encoded_texts"] for run in runs.values()] == [count, len(changed), count]
    rows = [
        {
            "what": name,
            "texts": count,
            "encoded": run["counts"]["encoded_texts"],
            "encode stage s": round(run["seconds"]["encode"], 2),
            "load s": round(run["seconds"]["load"], 2) or "",
            "process s": round(run["process_seconds"], 2),
        }
        for name, run in runs.items()
    ]
    share = runs["second night"]["seconds"]["encode"] / runs["first night"]["seconds"]["encode"]
    return rows, share, correct


def look_ups(count: int) -> tuple[list[dict[str, Any]], float, bool]:
    """Rows of the table, texts found per second, and whether all vectors were right."""
    texts = pa.array([f"record {number}, {number * 7919 % 9973} Elm Street" for number in range(count)])
    texts = texts.cast(pa.large_string())
    values = np.random.default_rng(5).integers(-127, 128, (count, _DIM), np.int8)
    status = np.zeros(count, np.uint8)
    with tempfile.TemporaryDirectory(prefix="flipkd-cache-") as folder:
        cache = open_cache(folder, "encoder", "int8")
        started = time.perf_counter()
        for start in range(0, count, count // 20):
            part = slice(start, start + count // 20)
            cache.put(cache.keys(texts[part]), VectorRows(values[part], "int8"), status[part])
        put_seconds = time.perf_counter() - started
        started = time.perf_counter()
        segments = tidy(cache)["segments"]
        tidy_seconds = time.perf_counter() - started
        seconds, correct = [], True
        for _ in range(_ROUNDS):
            cache = open_cache(folder, "encoder", "int8")
            total = 0.0
            for start in range(0, count, _UNIT_ROWS):
                unit = texts.slice(start, _UNIT_ROWS)
                started = time.perf_counter()
                hits = cache.look_up(cache.keys(unit))
                total += time.perf_counter() - started
                expected = values[start : start + _UNIT_ROWS]
                correct &= hits.rows is not None and bool(hits.found.all())
                correct &= hits.rows is not None and np.array_equal(hits.rows.values, expected)
            seconds.append(total)
    rows = [
        {"what": "put, 20 segments", "texts": count, "seconds": round(put_seconds, 2)},
        {"what": f"compaction to {segments} segment", "texts": count, "seconds": round(tidy_seconds, 2)},
        {"what": "hash and look up, units of 50,000", "texts": count, "seconds": round(statistics.median(seconds), 2)},
    ]
    return rows, count / statistics.median(seconds), correct


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="a second night, and look-ups of cached texts")
    parser.add_argument("--quick", action="store_true", help="2,000 records and 200,000 look-ups")
    quick = parser.parse_args().quick
    look_up_rows, rate, found = look_ups(200_000 if quick else 1_000_000)
    night_rows, share, same = nights(2_000 if quick else 20_000)
    ratios = {"second_night_share": round(share, 4), "lookups_per_second": round(rate)}
    report("cache", [*night_rows, *look_up_rows], ratios, found and same)
    return 0 if found and same else 1


if __name__ == "__main__":
    sys.exit(main())
