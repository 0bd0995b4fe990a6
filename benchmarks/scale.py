"""How the cost of ``score`` grows: 10^6 to 10^9 pairs over 10^6 to 10^8 records, ids in, scores out.

    python -m benchmarks.scale [--quick] [--largest 8] [--picture FILE]

``--largest E`` stops at 10^E pairs (9 needs 45 GB of disk). There are as many records as pairs up to 10^6, then a tenth
of the pairs; int8 rows of 128 random numbers, sequential int64 ids, random pairs. Pairs lie in files of at most 10
million; from 100 million pairs on, files repeat under other names (hard links), so that the disk holds few of them.
Output: ``--columns score``. Each size runs in a fresh process; a sample of its scores is compared with numpy's first.

Rows: seconds of ``flipkd.score``, pairs/s, peak resident memory less the mapped store's pages, bytes that went through
read and write calls (pages of the mapped store are no such calls). Ratios: ``time_exponent``, the
slope of log seconds over log pairs from 10^7 pairs on (1 is linear; below, starting up still counts), and
``memory_growth``, peak anonymous memory of the largest run over that of 10^7 pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import report, save_svg, svg_figure

DIM = 128
FILE_PAIRS = 10_000_000
DISTINCT_FILES = 4
PART_ROWS = 1_000_000
TOLERANCE = 1e-5


def rows_of(part: int, count: int) -> npt.NDArray[np.int8]:
    """Vectors of a part of the records, the same at every call."""
    random = np.random.Generator(np.random.SFC64(part))
    values = np.frombuffer(random.bytes(count * DIM), np.int8).reshape(count, DIM).copy()
    values[values == -128] = -127
    values[:, 0] = 127  # as quantise leaves them: the largest component is 127
    return values


def make_store(folder: Path, records: int) -> None:
    """A sealed store, its parts written and removed one by one."""
    from flipkd.vectors.seal import seal_store

    parts = []
    for part, first in enumerate(range(0, records, PART_ROWS)):
        count = min(PART_ROWS, records - first)
        columns = {
            "id": pa.array(np.arange(first, first + count)),
            "vector": _fixed(rows_of(part, count), DIM),
            "status": pa.array(np.zeros(count, np.uint8)),
            "text_digest": _fixed(np.zeros((count, 16), np.int8), 16),
        }
        parts.append(folder.with_name(f"{folder.name}-{part:04d}.parquet"))
        pq.write_table(pa.table(columns), parts[-1], compression="none", use_dictionary=False)
    header = {"fingerprint": "scale", "template": "{text}", "dtype": "int8", "encoder": "random", "complete": True}
    seal_store(folder, parts, header)
    for path in parts:
        path.unlink()


def _fixed(values: npt.NDArray[np.int8], width: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])


def make_pairs(folder: Path, pairs: int, records: int) -> None:
    """Pairs in files of at most ``FILE_PAIRS``; after the first few, links to them."""
    folder.mkdir()
    for file, first in enumerate(range(0, pairs, FILE_PAIRS)):
        path = folder / f"part-{file:04d}.parquet"
        if file >= DISTINCT_FILES:
            os.link(folder / f"part-{file % DISTINCT_FILES:04d}.parquet", path)
            continue
        random = np.random.Generator(np.random.SFC64(file))
        ids = random.integers(0, records, (2, min(FILE_PAIRS, pairs - first)))
        table = pa.table({"left_id": ids[0], "right_id": ids[1]})
        pq.write_table(table, path, compression="none", use_dictionary=False)


def is_right(root: Path, records: int) -> bool:
    """Compares scores of the first file's first row group with numpy's, as far as two parts of the records reach."""
    pairs = pq.ParquetFile(root / "pairs" / "part-0000.parquet").read_row_group(0)
    first = min((root / "scores").glob("*.parquet"))
    found = pq.ParquetFile(first).read_row_group(0).column("score").to_numpy()
    left, right = (pairs.column(name).to_numpy()[: len(found)] for name in ("left_id", "right_id"))
    places = np.flatnonzero((left < 2 * PART_ROWS) & (right < 2 * PART_ROWS))[:2000]
    parts = range(0, min(records, 2 * PART_ROWS), PART_ROWS)
    vectors = np.concatenate([rows_of(first // PART_ROWS, min(PART_ROWS, records - first)) for first in parts])
    one, other = (vectors[side[places]].astype(np.float64) for side in (left, right))
    expected = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return len(places) > 50 and float(np.abs(found[places] - expected).max()) < TOLERANCE


class PeakAnonymous(threading.Thread):
    """Watches this process's anonymous memory: what it holds itself, without mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._ended = threading.Event()

    def run(self) -> None:
        """Reads twenty times a second."""
        while not self._ended.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)

    def end(self) -> int:
        """Stops; returns the peak."""
        self._ended.set()
        self.join()
        return self.peak_bytes


def child(root: Path) -> None:
    """What the fresh process does."""
    from flipkd import ScoreConfig, score

    watch = PeakAnonymous()
    watch.start()
    before = _io()
    started = time.perf_counter()
    manifest = score(
        ScoreConfig(
            pairs=str(root / "pairs"), output=str(root / "scores"), store=str(root / "store"), columns=("score",)
        )
    )
    seconds = time.perf_counter() - started
    after = _io()
    facts = {
        "rows": manifest["rows_out"],
        "seconds": seconds,
        "peak_bytes": watch.end(),
        "read": after["rchar"] - before["rchar"],
        "written": after["wchar"] - before["wchar"],
    }
    print(json.dumps(facts))


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def measure(root: Path, pairs: int, records: int) -> tuple[dict[str, Any], bool]:
    """Facts of one size, and whether its scores are right."""
    make_store(root / "store", records)
    make_pairs(root / "pairs", pairs, records)
    command = [sys.executable, "-m", "benchmarks.scale", "--child", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the scoring process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts, facts["rows"] == pairs and is_right(root, records)


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds over pairs, both logarithmic, with a line of slope one."""
    figure = svg_figure(6, 3.6)
    axes = figure.subplots()
    pairs, seconds = ([row[name] for row in rows] for name in ("pairs", "seconds"))
    axes.loglog(pairs, seconds, "o-", color="#1f6f8b", label="flipkd-batch score")
    axes.loglog(pairs, [seconds[-1] * count / pairs[-1] for count in pairs], "--", color="#999999", label="linear")
    axes.set(xlabel="pairs", ylabel="seconds", title="Ids in, scores out")
    axes.legend()
    save_svg(figure, path)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10^5 to 10^7 pairs")
    parser.add_argument("--largest", type=int, default=8, help="exponent of the largest number of pairs")
    parser.add_argument("--picture", type=Path, help="SVG file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    sizes = [10**exponent for exponent in (range(5, 8) if arguments.quick else range(6, arguments.largest + 1))]
    rows, correct = [], True
    for pairs in sizes:
        records = max(min(pairs, 10**6), pairs // 10)
        with tempfile.TemporaryDirectory(prefix="flipkd-scale-") as folder:
            facts, right = measure(Path(folder), pairs, records)
        correct &= right
        rows.append(
            {
                "pairs": pairs,
                "records": records,
                "seconds": round(facts["seconds"], 2),
                "Mpairs/s": round(pairs / facts["seconds"] / 1e6, 2),
                "peak_mb": round(facts["peak_bytes"] / 1e6),
                "read_mb": round(facts["read"] / 1e6),
                "written_mb": round(facts["written"] / 1e6),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    large = [row for row in rows if row["pairs"] >= 10**7] if len(rows) > 2 else rows
    slope = np.polyfit(np.log([row["pairs"] for row in large]), np.log([row["seconds"] for row in large]), 1)[0]
    ratios = {
        "time_exponent": round(float(slope), 3) if len(large) > 1 else float("nan"),
        "memory_growth": round(rows[-1]["peak_mb"] / large[0]["peak_mb"], 3),
    }
    if arguments.picture is not None and correct:
        picture(rows, arguments.picture)
    report("scale", rows, ratios, correct)


if __name__ == "__main__":
    main()
