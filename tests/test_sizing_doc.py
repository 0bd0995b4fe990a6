"""docs/sizing.md: what follows from formats and defaults is computed again; what was measured stands where it says."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flipkd.cli import main
from flipkd.config import EncodeConfig, ScoreConfig, TeachConfig
from flipkd.data.commit import ShardWriter
from flipkd.data.location import Location, open_location
from flipkd.run.encode import row_bytes
from flipkd.run.manifest import UnitReport
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.texts import merge_texts
from flipkd.run.top_k import LEFT_ROW, SCORE, compare_candidates
from flipkd.vectors.index import MAX_ROWS
from flipkd.vectors.layout import store_files
from flipkd.vectors.segments import segment_bytes
from tests.documents import DOCS, sections, table

DOC = DOCS / "sizing.md"
TEXT = " ".join(DOC.read_text().split())
ROWS = 10**8


def files(kind: str, dim: int = 128, dtype: str = "int8", id_bytes: int = 0) -> dict[str, int]:
    return store_files({"rows": ROWS, "dim": dim, "dtype": dtype, "id_kind": kind, "id_bytes": id_bytes})


def test_bytes_of_a_record() -> None:
    sizes = files("int64")
    rows = table(sections(DOC)["One record in a store (format)"])
    assert {name.strip("`"): float(size) for _, name, size in rows if name} == {
        name: pytest.approx(size / ROWS, abs=0.05) for name, size in sizes.items()
    }
    assert float(rows[-1][2]) == pytest.approx(sum(sizes.values()) / ROWS, abs=0.05)
    strings = files("bytes", id_bytes=10 * ROWS)
    assert strings["ids.bin"] == 10 * ROWS
    assert f"{strings['offsets.bin'] / ROWS:.0f} bytes in `offsets.bin`, and {strings['slots.bin'] / ROWS:.1f}" in TEXT
    widths = [files("int64", dtype=dtype)["vectors.bin"] // ROWS // 128 for dtype in ("int8", "bf16", "float32")]
    assert widths == [1, 2, 4]
    assert MAX_ROWS == 2**32 - 2


def test_bytes_of_a_cached_text() -> None:
    times_bytes = 4  # beside the segment
    at_128, at_384 = (round(segment_bytes(ROWS, dim) / ROWS + times_bytes) for dim in (128, 384))
    assert f"{at_128} bytes for each distinct text, encoder and dtype at d = 128 in int8; {at_384} at d = 384" in TEXT
    assert f"text cache, one encoder, all texts distinct | {at_128 * ROWS / 1e9:.1f} GB" in TEXT


def test_free_disk_that_encode_asks_for() -> None:
    assert f"{row_bytes(384, 'int8')} bytes for MiniLM in int8" in TEXT
    assert f"free disk that `encode` asks for | {row_bytes(128, 'int8') * ROWS / 1e9:.1f} GB" in TEXT


def _lists(folder: Location, tables: list[pa.Table]) -> list[str]:
    names = [f"{number}.parquet" for number in range(len(tables))]
    for name, one in zip(names, tables, strict=True):
        footer = UnitReport(name, one.num_rows, one.num_rows).footer("texts", "run", name)
        with ShardWriter(folder, name, one.schema, footer, {}) as writer:
            writer.write(one)
            writer.commit()
    return names


def _peak_bytes(work: Callable[[], object]) -> int:
    """Of NumPy and of Arrow, each at its own highest."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] + int(pool.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def test_memory_of_the_driver(tmp_path: Path) -> None:
    """One run over all texts, and one over all candidates: 64 units each, so that one alone weighs little."""
    units, rows = 64, 1 << 14
    root, random = open_location(tmp_path), np.random.default_rng(0)
    ids = pa.array([bytes(one) for one in random.integers(0, 256, (rows, 16), np.uint8)], pa.binary(16))
    names = _lists(
        root.child("lists"), [pa.table({"id": ids, "text": pa.array(["t"] * rows, pa.large_string())})] * units
    )
    told = re.search(r"pairs with inline texts \| ([0-9]+) bytes for each text in the lists", TEXT)
    assert told is not None
    peak = _peak_bytes(lambda: merge_texts(root.child("lists"), names, root.child("texts")))
    assert 0.7 * int(told[1]) < peak / (units * rows) <= int(told[1])

    scored = [
        pa.table({LEFT_ROW: random.integers(0, 1 << 17, rows), SCORE: random.random(rows, np.float32)})
        for _ in range(units)
    ]
    names = _lists(root.child("candidates"), scored)
    told = re.search(r"`--top-k` \| ([0-9]+) bytes for each candidate", TEXT)
    assert told is not None
    peak = _peak_bytes(lambda: compare_candidates(root.child("candidates"), names, 3, root.child("kept")))
    assert 0.7 * int(told[1]) < peak / (units * rows) <= int(told[1])


def _has_flag(command: str, flag: str) -> bool:
    return any(flag in parameter.opts for parameter in main.commands[command].params)


def test_rows_per_unit_are_the_defaults() -> None:
    score, encode, teach, rescore = (
        next(field.default for field in fields(config) if field.name == "rows_per_unit")
        for config in (ScoreConfig, EncodeConfig, TeachConfig, RescoreConfig)
    )
    assert isinstance(score, int)
    assert teach == rescore
    assert f"`score` takes {score:,} pairs" in TEXT
    assert f"`encode` {encode:,} records, `teach` and `rescore` {teach:,} pairs" in TEXT
    # Which commands have the flag: the text said nothing of encode, which has none.
    flags = {name for name in ("score", "encode", "teach", "rescore") if _has_flag(name, "--rows-per-unit")}
    assert flags == {"score", "teach", "rescore"}
    assert "With `--rows-per-unit` `score`, `teach` and `rescore` take more rows" in TEXT
    assert "`encode` has no such flag" in TEXT
    assert f"units of `score` | {10**10 // score:,} |" in TEXT


def test_the_example_is_arithmetic_of_measured_figures() -> None:
    assert f"store | {sum(files('int64').values()) / 1e9:.1f} GB" in TEXT
    measured = (DOCS / "benchmarks.md").read_text()
    scale = (DOCS / "scale.md").read_text()
    rate = float(re.search(r"\| 10\^9 \| 10\^8 \| [0-9.]+ \| ([0-9.]+) M", scale)[1])  # type: ignore[index]
    assert f"{10**10 / (rate * 1e6) / 60:.0f} minutes, at the {rate} M pairs/s" in TEXT
    row = re.search(r"MiniLM, bf16 \(int8\), no AMX \| [0-9,]+ \(([0-9,]+)\)", measured)
    assert row is not None
    texts = int(row[1].replace(",", ""))
    assert f"{ROWS / texts / 3600:.0f} h with a model of MiniLM's size in int8, at {texts:,} texts/s" in TEXT
    assert f"2 % changed | {0.02 * ROWS / texts / 60:.0f} minutes" in TEXT
    assert "229 MB" in scale
    assert "541 MB" in measured
