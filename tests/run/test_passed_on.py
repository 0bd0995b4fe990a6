"""Columns that a job passes on: how much room they take, and what their footers tell."""

from __future__ import annotations

import ast
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import ScoreConfig
from flipkd.data.encodings import write_options
from flipkd.run.score import dry_run, score
from tests.documents import DOCS, blocks
from tests.run.conftest import RECORDS, World, record_id

ROWS = 20_000
FOOTER_BYTES = 10_000


def pairs(**columns: pa.Array) -> pa.Table:
    left, right = np.random.default_rng(0).integers(0, RECORDS, (2, len(next(iter(columns.values())))))
    return pa.table({"left_id": left + record_id(0), "right_id": right + record_id(0), **columns})


def config(world: World, folder: Path, columns: tuple[str, ...] | None = None) -> ScoreConfig:
    return ScoreConfig(
        str(folder / "pairs.parquet"),
        str(folder / "out"),
        store=world.left_store,
        right_store=world.right_store,
        columns=columns,
    )


def written(folder: Path) -> Path:
    (path,) = (folder / "out").glob("*.parquet")
    return path


def wide_columns() -> dict[str, pa.Array]:
    """Few distinct values in each column, as a dictionary makes them small."""
    places = np.random.default_rng(1).integers(0, 1000, ROWS)
    names = pa.array([f"branch number {place:09d}, {place % 7}" for place in range(1000)]).take(pa.array(places))
    return {
        "name": names,
        "amount": pa.array(places * 1.7),
        "price": pa.array([Decimal(int(place)) / 100 for place in places], pa.decimal128(12, 2)),
        "time": pa.array(places * 10**9, pa.timestamp("us")),
        "address": pa.StructArray.from_arrays([names], names=["city"]),
    }


def test_an_output_takes_no_more_room_than_was_estimated(world: World, tmp_path: Path) -> None:
    """Strings, floats and decimals came out up to ten times as large, without the dictionaries that they had."""
    pq.write_table(pairs(**wide_columns()), tmp_path / "pairs.parquet", row_group_size=5000)
    estimate = dry_run(config(world, tmp_path))["output_bytes_estimate"]
    assert estimate == pytest.approx((tmp_path / "pairs.parquet").stat().st_size + 5 * ROWS, abs=FOOTER_BYTES)
    score(config(world, tmp_path))
    path = written(tmp_path)
    assert path.stat().st_size <= estimate + FOOTER_BYTES
    group = pq.read_metadata(path).row_group(0)
    encodings = {
        group.column(place).path_in_schema: group.column(place).encodings for place in range(group.num_columns)
    }
    shrunk = {path for path, names in encodings.items() if "RLE_DICTIONARY" in names} - {"reason"}
    assert shrunk == {"name", "amount", "price", "time", "address.city"}
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert pq.ParquetFile(path).read().select(table.schema.names).equals(table)


def test_columns_that_do_not_repeat_are_written_as_ever() -> None:
    table = pa.table({"key": ["a", "bc"], "id": [1, 2], "far": [1, 1 << 50], "x": [0.5, 1.5], "reason": [None, "r"]})
    expected = {
        "compression": {"key": "lz4", "id": "lz4", "far": "lz4", "x": "none", "reason": "lz4"},
        "use_dictionary": ["reason"],
        "column_encoding": {"id": "DELTA_BINARY_PACKED"},
        "write_statistics": False,
    }
    assert write_options(table) == expected
    # Ids are chosen by measurement, whether they repeat or not.
    many = pa.concat_tables([table] * 20)
    assert write_options(many)["column_encoding"] == expected["column_encoding"]
    assert write_options(many)["use_dictionary"] == ["reason", "key", "x"]


def test_the_estimate_counts_the_input_where_any_of_it_is_written(world: World, tmp_path: Path) -> None:
    """Any column but the ids was thought to take no room; where one is passed on, the input's size is the limit."""
    noise = np.random.default_rng(0).bytes(100 * ROWS)
    blobs = pa.array([noise[start : start + 100] for start in range(0, len(noise), 100)])
    pq.write_table(pairs(blob=blobs), tmp_path / "pairs.parquet")
    for columns, least, most in ((("blob", "score"), 105, 130), (("left_id", "score"), 105, 130), (("score",), 5, 5)):
        estimate = dry_run(config(world, tmp_path, columns))["output_bytes_estimate"]
        assert least * ROWS <= estimate <= most * ROWS, columns


def test_a_column_whose_name_is_that_of_one_inside_another(world: World, tmp_path: Path) -> None:
    """``a.b`` of integers beside a ``b`` of strings in ``a``: no file could be written."""
    inner = pa.array([{"b": "x"}, {"b": "y"}])
    table = pairs(**{"a.b": pa.array([1, 2]), "a": inner})
    pq.write_table(table, tmp_path / "pairs.parquet")
    score(config(world, tmp_path))
    assert pq.ParquetFile(written(tmp_path)).read().select(table.schema.names).equals(table)


def test_pandas_finds_its_types_and_its_index_again(world: World, tmp_path: Path) -> None:
    table = pairs(n=pa.array([0, 1, 2])).to_pandas()
    table["count"] = pd.array([1, None, 3], dtype="Int64")
    table["flag"] = pd.array([True, None, False], dtype="boolean")
    table = table.set_index(pd.Index(["p", "q", "r"], name="key"))
    table.to_parquet(tmp_path / "pairs.parquet")
    score(config(world, tmp_path))
    found = pd.read_parquet(written(tmp_path))
    pd.testing.assert_frame_equal(found[table.columns], table)
    assert found["score"].notna().all()
    part = config(world, tmp_path, ("left_id", "score"))
    score(ScoreConfig(**{**vars(part), "output": str(tmp_path / "part")}))
    assert "key" not in pd.read_parquet(next((tmp_path / "part").glob("*.parquet")))


def test_of_other_footers_only_what_stays_true_goes_along(world: World, tmp_path: Path) -> None:
    """Spark would look for the columns that its key names, and for no others."""
    spark = "org.apache.spark.sql.parquet.row.metadata"
    table = pairs(n=pa.array([0, 1]))
    pq.write_table(table.replace_schema_metadata({"geo": "{}", spark: "{}"}), tmp_path / "pairs.parquet")
    score(config(world, tmp_path))
    footer = pq.read_metadata(written(tmp_path)).metadata
    assert footer[b"geo"] == b"{}"
    assert spark.encode() not in footer


@pytest.mark.parametrize("in_folders", [False, True])
def test_outputs_are_read_as_the_document_says(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_folders: bool
) -> None:
    pytest.importorskip("duckdb")
    pytest.importorskip("polars")
    for number in range(2):
        path = tmp_path / "pairs" / (f"branch={number}" if in_folders else "") / f"{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pairs(n=pa.array([number] * 3)), path)
    stores = {"store": world.left_store, "right_store": world.right_store}
    score(ScoreConfig(str(tmp_path / "pairs"), str(tmp_path / "scores"), **stores))
    left = tmp_path / "scores/.flipkd/work-0123456789abcdef"
    left.mkdir(parents=True)
    pq.write_table(pa.table({"flipkd_score": [0.5]}), left / "0.parquet")

    monkeypatch.chdir(tmp_path)
    first, second = blocks(DOCS / "columns-and-reasons.md")
    imports, reads = ast.parse(first.text).body[:4], ast.parse((second if in_folders else first).text).body[-4:]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for line in reads:
        assert isinstance(line, ast.Expr)
        assert eval(ast.unparse(line), names).shape == (6, 7 if in_folders else 6), ast.unparse(line)
