"""Does memory grow with the number of pairs? 200 million pairs in 20 files against 20 million in 2.

    python -m benchmarks.memory [--quick]

Each run is a fresh process that calls ``flipkd.score`` (id pairs, int8 vectors of one million records, all columns) and
then reads the high-water mark of its resident memory from the kernel; mapped pages of the vector store count in both.
``--quick`` has 25 million pairs in 100 files against 2.5 million in 10. Two small files would not do: pools of the
allocator, and what threads hold at one moment, level off after some five files of one batch each (500,000 pairs a file:
353 MB with 2 files, 384 to 396 MB with 5, 382 to 400 MB with 10, 20, 60 and 120). Ratio:

    peak_200m_over_20m    peak memory of the large run / of the small one; to stay within 1.10
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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

from benchmarks.common import peak_bytes, report
from benchmarks.score import write_store

_RECORDS, _DIM = 1_000_000, 128
# Files of the two runs, and pairs in a file.
_SHARDS, _PAIRS_PER_SHARD = {"small": 2, "large": 20}, 10_000_000
_QUICK_SHARDS, _QUICK_PAIRS_PER_SHARD = {"small": 10, "large": 100}, 250_000
_ROUNDS = 2
_LIMIT = 1.10


def make_inputs(root: Path, shards_of_run: dict[str, int], pairs_per_shard: int) -> None:
    """A store, and two folders of pairs. Odd and even shards are the same two files under other names."""
    random = np.random.default_rng(23)
    vectors = random.standard_normal((_RECORDS, _DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_store(root / "store", pa.array(np.arange(_RECORDS)), vectors)
    for name, shards in shards_of_run.items():
        (root / name).mkdir()
        for shard in range(shards):
            path = root / name / f"part-{shard:03d}.parquet"
            source = root / "small" / f"part-{shard % 2:03d}.parquet"
            if source != path:
                os.link(source, path)
                continue
            ids = random.integers(0, _RECORDS, (2, pairs_per_shard))
            pq.write_table(pa.table({"left_id": ids[0], "right_id": ids[1]}), path)


def run_child(root: Path, name: str) -> dict[str, Any]:
    """Scores one folder in a fresh process; returns rows, seconds and peak bytes."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", str(root), "--pairs", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"the scoring process ended with {result.returncode}:\n{result.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


def child(root: Path, name: str) -> None:
    """What the fresh process does."""
    from flipkd import RunOptions, ScoreConfig, score

    output = root / f"out-{name}"
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    # Not one unit for each of many cores: the small run has ten units, and is to have as many in flight as the other.
    run = RunOptions(workers=2)
    manifest = score(ScoreConfig(pairs=str(root / name), output=str(output), store=str(root / "store"), run=run))
    seconds = time.perf_counter() - started
    print(json.dumps({"rows": manifest["rows_out"], "seconds": seconds, "peak_bytes": peak_bytes()}))


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="peak memory of 200 M pairs against 20 M pairs")
    parser.add_argument("--quick", action="store_true", help="an eighth of the pairs")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.pairs)
        return 0
    shards = _QUICK_SHARDS if options.quick else _SHARDS
    pairs_per_shard = _QUICK_PAIRS_PER_SHARD if options.quick else _PAIRS_PER_SHARD
    with tempfile.TemporaryDirectory(prefix="flipkd-memory-") as folder:
        root = Path(folder)
        make_inputs(root, shards, pairs_per_shard)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in shards}
        for _ in range(_ROUNDS):
            for name in shards:
                runs[name].append(run_child(root, name))
                shutil.rmtree(root / f"out-{name}")
    correct = all(run["rows"] == shards[name] * pairs_per_shard for name, outcomes in runs.items() for run in outcomes)
    peaks = {name: statistics.median(run["peak_bytes"] for run in outcomes) for name, outcomes in runs.items()}
    rows = [
        {
            "pairs": shards[name] * pairs_per_shard,
            "files": shards[name],
            "peak_mb": round(peaks[name] / 1e6, 1),
            "seconds": round(statistics.median(run["seconds"] for run in outcomes), 2),
        }
        for name, outcomes in runs.items()
    ]
    ratio = round(peaks["large"] / peaks["small"], 3)
    report("memory", rows if correct else [], {"peak_200m_over_20m": ratio} if correct else {}, correct)
    return 0 if correct and ratio <= _LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
