"""docs/sizing.md: what follows from formats and defaults is computed again; what was measured stands where it says."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from flipkd.cli import main
from flipkd.config import EncodeConfig, ScoreConfig, TeachConfig
from flipkd.run.encode import row_bytes
from flipkd.run.rescore_config import RescoreConfig
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
