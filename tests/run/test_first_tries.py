"""What goes wrong when somebody tries flipkd for the first time ends before any work, and says the way out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.models.folder import read_folder
from flipkd.models.settings import DenseSettings, NormalizeSettings
from flipkd.models.vector_size import vector_size


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    people: dict[str, Any] = {"id": [1, 2], "name": ["Ann", "Bob"], "city": ["York", "Bath"]}
    (folder / "people.csv").write_text("id,name\n1,Ann\n")
    pq.write_table(pa.table(people), folder / "people.parquet")
    pq.write_table(pa.table(people), folder / "people.data")  # Parquet, whatever its name says
    pq.write_table(pa.table({**people, "id": [1.0, 2.0]}), folder / "floats.parquet")
    pq.write_table(pa.table({"left_id": [1], "right_id": [2]}), folder / "pairs.parquet")
    pq.write_table(pa.table({"left_id": ["1"], "right_id": ["2"]}), folder / "strings.parquet")
    return folder


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("encode --records people.csv", 1, "people.csv is not a Parquet file; of CSV make one with pyarrow.csv"),
        ("encode --records people.parquet", 2, "has no column 'text'; it has id, name, city; name .* --text-column"),
        ("encode --records people.data", 2, "people.data has no column 'text'"),
        ("encode --records people.parquet --id-column key", 2, "has no column 'key'; .*--id-column"),
        ("encode --records floats.parquet --text-column name", 2, "column 'id' is of type double, .*cast the column"),
        ("score --pairs people.csv", 1, "people.csv is not a Parquet file"),
        ("score --pairs pairs.parquet", 2, "has no column 'left_text'; .*--left-text .*--records .*--store"),
        ("score --pairs people.parquet --records people.parquet --text-column name", 2,
         "has no column 'left_id'; .*--left-column and --right-column"),
        ("score --pairs strings.parquet --records people.parquet --text-column name", 2,
         "'left_id' is of type string, but the records' ids are integers; cast one of them"),
        ("teach --pairs pairs.parquet", 2, "has no column 'left_text'; .*--left-text .*--records"),
    ],
)  # fmt: skip
def test_a_first_try_is_told_the_way_out_before_any_work(
    minilm_dir: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int, said: str
) -> None:
    monkeypatch.chdir(tables)
    model = "--teacher" if command.startswith("teach") else "--encoder"
    done = CliRunner().invoke(main, [*command.split(), model, str(minilm_dir), "--output", str(tmp_path / "out")])
    assert done.exit_code == code, done.output
    assert re.search(said, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()
    assert len(done.stderr.splitlines()) == 1
    assert " of " + str(tables) not in done.stderr  # a table of one file is named once


def test_forgotten_right_records_are_guessed_and_a_finished_job_says_so(
    minilm_dir: Path, tables: Path, tmp_path: Path
) -> None:
    """The job ends well (pairs may name records that are gone), but most pairs without a record are no such case."""
    others = pa.table({"id": [11, 12], "name": ["Cem", "Dua"]})
    pq.write_table(others, tmp_path / "others.parquet")
    pq.write_table(pa.table({"left_id": [1, 2, 1], "right_id": [11, 12, 2]}), tmp_path / "pairs.parquet")
    command = ["score", "--encoder", str(minilm_dir), "--text-column", "name"]
    command += ["--pairs", str(tmp_path / "pairs.parquet"), "--records", str(tables / "people.parquet")]
    done = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert re.search("warning: 2 of 3 pairs name a record .*--right-records", done.stderr)
    again = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "out")])
    assert "nothing was left to do" in again.stdout

    both = [*command, "--right-records", str(tmp_path / "others.parquet"), "--output", str(tmp_path / "both")]
    done = CliRunner().invoke(main, both)
    assert done.exit_code == 0, done.output
    assert "warning" not in done.stderr
    assert "rows/s" in done.stdout


def test_the_disk_that_a_store_needs_is_reckoned_from_its_vectors(minilm_dir: Path) -> None:
    """It was 1,600 bytes a record, whatever the vectors: ten times too much for a distilled encoder's."""
    folder = read_folder(minilm_dir)
    assert vector_size(folder) == 384
    assert vector_size(replace(folder, truncate_dim=64)) == 64
    dense = DenseSettings(minilm_dir, 384, 128, bias=False, activation="Identity", use_residual=False)
    assert vector_size(replace(folder, steps=[dense, NormalizeSettings()])) == 128
