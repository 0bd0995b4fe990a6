"""``score`` on id pairs: what goes in, what comes out, row by row."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from benchmarks.score import write_store
from flipkd.cli import main
from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig, TeachConfig, VectorDtype
from flipkd.data.find import find_shards
from flipkd.data.location import open_location
from flipkd.errors import ConfigError, FlipkdError, InputError, OutputError
from flipkd.run.encode import encode
from flipkd.run.manifest import UnitReport
from flipkd.run.score import dry_run, score
from flipkd.run.score_unit import ScoreWorker
from flipkd.run.status import status
from flipkd.run.teach import teach
from flipkd.run.units import WorkUnit, plan_units
from tests.run.conftest import RECORDS, World, record_id
from tests.run.test_kill import contents

MakePairs = Callable[..., Path]


def read_scores(folder: Path | str) -> pa.Table:
    """All output rows, files in order of their names."""
    location = open_location(folder)
    return pa.concat_tables([pq.read_table(shard.path, partitioning=None) for shard in find_shards(location)])


def config(world: World, pairs: Path, output: Path, **options: Any) -> ScoreConfig:
    return ScoreConfig(
        pairs=str(pairs), output=str(output), store=world.left_store, right_store=world.right_store, **options
    )


def pair_table(rows: list[tuple[int, int]], **columns: Any) -> pa.Table:
    left, right = ([record_id(value) for value in side] for side in zip(*rows, strict=True))
    return pa.table({"left_id": left, "right_id": right, **columns})


@contextlib.contextmanager
def not_as_root(*folders: Path, owned: Path | None = None) -> Iterator[None]:
    """Root reads everything: become somebody else, who may look into these folders, and to whom one belongs."""
    if os.geteuid() != 0:
        yield
        return
    for folder in folders:
        for one in (folder, *folder.parents):
            one.chmod(one.stat().st_mode | 0o055)
    if owned is not None:
        os.chown(owned, 65534, -1)
        for one in owned.parents:
            one.chmod(one.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_scores_are_the_cosines_in_input_order(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    manifest = score(config(world, make_pairs(), tmp_path / "out", rows_per_unit=20))
    found = read_scores(tmp_path / "out")
    assert found.schema.names == ["left_id", "right_id", "n", "score", "reason", "truncated"]
    assert found.schema.field("n").type == pa.int32()
    assert found.schema.field("score").type == pa.float32()
    assert found.column("n").to_pylist() == list(range(120))
    for row in found.to_pylist():
        expected = world.cosine(row["left_id"] - record_id(0), row["right_id"] - record_id(0))
        assert row["score"] == pytest.approx(expected, abs=2e-6)
        assert row["reason"] is None
        assert row["truncated"] is False
    assert (manifest["rows_in"], manifest["rows_out"], manifest["units"]) == (120, 120, 8)
    assert manifest["complete"]
    assert json.loads((tmp_path / "out/_manifest.json").read_text()) == manifest
    assert all(len(pq.read_metadata(path).metadata[b"flipkd.unit"]) for path in (tmp_path / "out").glob("*.parquet"))


def test_one_file_with_other_files_beside_it(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """ray#57704, duckdb#15916."""
    pairs = make_pairs(files=2)
    for name in ("_SUCCESS", "_metadata", ".part-0.parquet.crc"):
        (pairs / name).write_bytes(b"x")
    assert score(config(world, pairs, tmp_path / "all"))["rows_in"] == 60
    assert score(config(world, pairs / "part-001.parquet", tmp_path / "one"))["rows_in"] == 30
    expected = read_scores(tmp_path / "all").slice(30)
    assert read_scores(tmp_path / "one").equals(expected)


def test_columns_in_another_order_are_matched_by_name(world: World, tmp_path: Path) -> None:
    """ray PR#63582; two stores, so that a swapped pair has another score."""
    (tmp_path / "pairs").mkdir()
    pq.write_table(pair_table([(1, 2)]), tmp_path / "pairs/a.parquet")
    pq.write_table(pair_table([(1, 2)]).select(["right_id", "left_id"]), tmp_path / "pairs/b.parquet")
    score(config(world, tmp_path / "pairs", tmp_path / "out", columns=("score",)))
    first, second = read_scores(tmp_path / "out").column("score").to_pylist()
    assert first == second
    assert first != pytest.approx(world.cosine(2, 1), abs=1e-4)  # a swap would show


@pytest.mark.parametrize("kind", ["int32", "uint64", "int64", "dictionary"])
def test_integer_ids_of_any_width_are_compared_by_value(world: World, tmp_path: Path, kind: str) -> None:
    """Also a dictionary of ids: arrow#47177, ray#33279."""
    ids = {"int32": pa.int32(), "uint64": pa.uint64(), "int64": pa.int64()}
    narrow = pa.table({"id": pa.array([5, 6, 7], ids.get(kind, pa.int64())), "text": ["a cat", "a dog", "rain"]})
    (tmp_path / "records").mkdir()
    pq.write_table(narrow, tmp_path / "records/a.parquet")
    encode(EncodeConfig(EncoderOptions(world.encoder), str(tmp_path / "records"), str(tmp_path / "store")))
    column = pa.array([5, 6], pa.int64())
    pairs = pa.table({"left_id": column.dictionary_encode() if kind == "dictionary" else column, "right_id": [7, 5]})
    (tmp_path / "pairs").mkdir()
    pq.write_table(pairs, tmp_path / "pairs/a.parquet")
    result = ScoreConfig(pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(tmp_path / "store"))
    assert score(result)["reasons"] == {}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_string_ids_of_any_layout_and_a_nul_byte(world: World, tmp_path: Path, kind: pa.DataType) -> None:
    """ray PR#35638, duckdb PR#1942; a dictionary of ids: arrow#47177, ray#33279."""
    ids = ["a\0b", "a\0c", "a"]
    for name in ("records", "pairs"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"id": ids, "text": ["a cat", "a dog", "rain"]}), tmp_path / "records/a.parquet")
    left, right = ["a\0b", "a\0c", "a\0b"], ["a", "a", "a\0d"]
    table = pa.table({"left_id": pa.chunked_array([left]).cast(kind), "right_id": pa.chunked_array([right]).cast(kind)})
    pq.write_table(table, tmp_path / "pairs/a.parquet")
    encode(EncodeConfig(EncoderOptions(world.encoder), str(tmp_path / "records"), str(tmp_path / "store")))
    score(ScoreConfig(pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(tmp_path / "store")))
    found = read_scores(tmp_path / "out")
    assert found.schema.field("left_id").type == kind
    assert found.column("left_id").cast(pa.binary()).to_pylist() == [value.encode() for value in left]
    assert found.column("reason").to_pylist() == [None, None, "missing_record"]
    scores = found.column("score").to_pylist()
    assert scores[0] != scores[1]
    assert scores[2] is None


def test_what_cannot_be_scored_has_a_reason_and_is_never_nan(world: World, tmp_path: Path) -> None:
    """Missing texts: dedupe#460, mteb#1043; records that do not exist and null ids: mimic-code#20."""
    (tmp_path / "records").mkdir()
    (tmp_path / "pairs").mkdir()
    texts = pa.array([b"a cat", b"", None, b" ", b"he\xffllo", b"rain"], pa.binary())
    columns = {"id": pa.array([0, 1, 2, 3, 4, 5], pa.int64()), "text": texts}
    pq.write_table(pa.table(columns), tmp_path / "records/a.parquet")
    manifest = encode(EncodeConfig(EncoderOptions(world.encoder), str(tmp_path / "records"), str(tmp_path / "store")))
    assert manifest["reasons"] == {"invalid_text": 1, "missing_text": 3}
    left = pa.array([2, 1, 3, 0, 4, 99, None, 0, None], pa.int64())
    right = pa.array([0, 1, 0, 5, 0, 0, 0, None, 99], pa.int64())
    pq.write_table(pa.table({"left_id": left, "right_id": right}), tmp_path / "pairs/a.parquet")
    task = ScoreConfig(
        pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(tmp_path / "store"), threshold=0.5
    )
    manifest = score(task)
    found = read_scores(tmp_path / "out")
    assert found.column("reason").to_pylist() == [
        "missing_text", "missing_text", "missing_text", None, "invalid_text", "missing_record",
        "missing_id", "missing_id", "missing_id",
    ]  # fmt: skip
    scored = [value is not None for value in found.column("score").to_pylist()]
    assert scored == [reason is None for reason in found.column("reason").to_pylist()]
    assert [value is not None for value in found.column("match").to_pylist()] == scored
    assert manifest["reasons"] == {"invalid_text": 1, "missing_id": 3, "missing_record": 1, "missing_text": 3}
    # Only survivors are written, but all are counted.
    survivors = score(replace(task, output=str(tmp_path / "some"), min_score=-1.0))
    assert survivors["rows_out"] == 1
    assert survivors["reasons"] == manifest["reasons"]


@pytest.mark.parametrize("options", [{}, {"min_score": 0.5}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_damaged_store_is_named_and_drops_no_pair(
    tmp_path: Path, dtype: VectorDtype, options: dict[str, Any]
) -> None:
    vectors = np.eye(4, 64, dtype=np.float32)
    write_store(tmp_path / "store", pa.array(range(4), pa.int64()), vectors, dtype)
    (tmp_path / "pairs").mkdir()
    ids = pa.table({"left_id": pa.array([0, 1, 9], pa.int64()), "right_id": pa.array([0, 2, 3], pa.int64())})
    pq.write_table(ids, tmp_path / "pairs/a.parquet")
    task = ScoreConfig(str(tmp_path / "pairs"), str(tmp_path / "out"), store=str(tmp_path / "store"), **options)
    assert score(task)["rows_in"] == 3
    expected = {"{}": [1.0, 0.0, None], "{'min_score': 0.5}": [1.0], "{'top_k': 1}": [1.0, 0.0]}[str(options)]
    assert read_scores(tmp_path / "out").column("score").to_pylist() == expected
    with open(tmp_path / "store/vectors.bin", "r+b") as file:
        file.seek(2 * 64 * (4 if dtype == "float32" else 2))
        file.write(b"\xff" * 4)  # NaN
    with pytest.raises(InputError, match=f"{tmp_path}/store is not a number; encode the records again"):
        score(replace(task, output=str(tmp_path / "again")))


def test_exact_ids_and_pass_through_types(world: World, tmp_path: Path) -> None:
    """No number goes through a float: ray#50255, pandas#56678; lists and maps are kept: arrow#32723."""
    (tmp_path / "records").mkdir()
    (tmp_path / "pairs").mkdir()
    big = 9007199254740993  # 2**53 + 1: no float64 holds it
    pq.write_table(pa.table({"id": [big, big - 1], "text": ["a cat", "rain"]}), tmp_path / "records/a.parquet")
    passed = {
        "amount": pa.array([big, None], pa.int64()),
        "when": pa.array([1, None], pa.timestamp("us", tz="UTC")),
        "money": pa.array([None, 5], pa.decimal128(20, 3)),
        "word": pa.array(["x", None]).dictionary_encode(),
        "tags": pa.array([["a", None], None], pa.list_(pa.string())),
        "attributes": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
    }
    table = pa.table({"left_id": [big, big - 1], "right_id": [big - 1, big - 1], **passed})
    pq.write_table(table, tmp_path / "pairs/a.parquet")
    encode(EncodeConfig(EncoderOptions(world.encoder), str(tmp_path / "records"), str(tmp_path / "store")))
    task = ScoreConfig(pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(tmp_path / "store"))
    score(task)
    found = read_scores(tmp_path / "out")
    assert found.select(table.schema.names).equals(table)
    assert found.column("score").to_pylist()[0] < 0.9
    assert found.column("score").to_pylist()[1] == pytest.approx(1.0, abs=1e-5)
    some = replace(task, output=str(tmp_path / "some"), columns=("score", "amount"))
    score(some)
    assert read_scores(tmp_path / "some").schema.names == ["score", "amount"]


def test_a_column_that_is_not_asked_for_is_not_decoded(world: World, tmp_path: Path) -> None:
    """arrow#32723: its pages are broken, and only who asks for it learns of that."""
    (tmp_path / "pairs").mkdir()
    path = tmp_path / "pairs/a.parquet"
    nested = {
        "tags": pa.array([["a", "b"] * 20] * 50, pa.list_(pa.string())),
        "attributes": pa.array([[("k", 1), ("l", 2)]] * 50, pa.map_(pa.string(), pa.int32())),
    }
    pq.write_table(pair_table([(1, 2)] * 50, **nested, amount=list(range(50))), path)
    columns = [pq.read_metadata(path).row_group(0).column(number) for number in range(6)]
    data = bytearray(path.read_bytes())
    for column in columns:
        if column.path_in_schema.startswith(tuple(nested)):
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    score(config(world, tmp_path / "pairs", tmp_path / "out", columns=("score", "amount")))
    assert read_scores(tmp_path / "out").column("amount").to_pylist() == list(range(50))
    assert read_scores(tmp_path / "out").column("score").null_count == 0
    for name in nested:
        with pytest.raises(InputError, match=r"a\.parquet"):
            score(config(world, tmp_path / "pairs", tmp_path / name, columns=("score", name)))


def test_units_of_uneven_time_keep_their_rows_in_order(
    world: World, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray#50890, ray#57734: what is done last stands where it stood in the input."""
    task = config(world, make_pairs(), tmp_path / "out", rows_per_unit=10, run=RunOptions(workers=4, threads=4))
    score(replace(task, output=str(tmp_path / "undisturbed")))
    call, ended = ScoreWorker.__call__, []

    def uneven(self: ScoreWorker, unit: WorkUnit) -> UnitReport:
        time.sleep(0.3 if unit.first_row == 0 else 0.0)
        report = call(self, unit)
        ended.append(unit.output)
        return report

    monkeypatch.setattr(ScoreWorker, "__call__", uneven)
    manifest = score(task)
    assert manifest["units"] == len(ended) == 12
    assert ended != sorted(ended)
    assert read_scores(tmp_path / "out").column("n").to_pylist() == list(range(120))
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_zero_row_shard_among_others_and_alone(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """ray#28505."""
    pairs = make_pairs(files=4)
    empty = pq.read_table(pairs / "part-000.parquet").slice(0, 0)
    pq.write_table(empty, pairs / "part-0005.parquet")
    assert score(config(world, pairs, tmp_path / "out"))["rows_in"] == 120
    outputs = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(outputs) == 5
    schemas = {path.name.partition(".")[0]: pq.read_schema(path) for path in outputs}
    assert all(schema.equals(schemas["part-0005"]) for schema in schemas.values())  # names and types
    for path in pairs.glob("*.parquet"):
        pq.write_table(empty, path)
    assert score(config(world, pairs, tmp_path / "none"))["rows_out"] == 0
    found = read_scores(tmp_path / "none")
    assert found.num_rows == 0
    assert found.schema.equals(schemas["part-000"])
    assert found.schema.names == ["left_id", "right_id", "n", "score", "reason", "truncated"]


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"top_k": 2}, {"min_score": 0.1}], ids=str)
def test_an_empty_output_has_the_types_of_any(
    world: World, make_pairs: MakePairs, tmp_path: Path, options: dict[str, Any]
) -> None:
    """ray#28505: with columns that only some options add, and others passed through as dictionary and list."""
    pairs = make_pairs(files=1)
    table = pq.read_table(pairs / "part-000.parquet")
    table = table.append_column("word", pa.array(["x"] * len(table)).dictionary_encode())
    table = table.append_column("tags", pa.array([["x"]] * len(table)))
    for rows in (len(table), 0):
        pq.write_table(table.slice(0, rows), pairs / "part-000.parquet")
        score(config(world, pairs, tmp_path / f"out-{rows}", **options))
    whole, empty = (read_scores(tmp_path / f"out-{rows}") for rows in (len(table), 0))
    assert whole.num_rows > 0
    assert empty.num_rows == 0
    assert empty.schema.equals(whole.schema)


def test_hive_folders_are_mirrored(world: World, tmp_path: Path) -> None:
    """prestodb#2233."""
    for branch in ("007", "008"):
        folder = tmp_path / f"pairs/branch={branch}"
        folder.mkdir(parents=True)
        pq.write_table(pair_table([(1, 2), (3, 4)]), folder / "part.parquet")
    assert score(config(world, tmp_path / "pairs", tmp_path / "out"))["rows_out"] == 4
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("*.parquet")) == ["branch=007", "branch=008"]
    columns = ("branch", "score")
    score(config(world, tmp_path / "pairs", tmp_path / "named", columns=columns))
    assert read_scores(tmp_path / "named").column("branch").to_pylist() == ["007", "007", "008", "008"]


def test_a_doubled_pair_is_scored_twice_and_a_doubled_record_once(world: World, tmp_path: Path) -> None:
    """No fan-out: splink#70, matchbox#370."""
    for name in ("records", "pairs"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"id": [1, 2, 1], "text": ["a cat", "rain", "a cat "]}), tmp_path / "records/a.parquet")
    pq.write_table(pa.table({"left_id": [1, 1], "right_id": [2, 2]}), tmp_path / "pairs/a.parquet")
    encode(EncodeConfig(EncoderOptions(world.encoder), str(tmp_path / "records"), str(tmp_path / "store")))
    task = ScoreConfig(pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(tmp_path / "store"))
    assert score(task)["rows_out"] == 2
    first, second = read_scores(tmp_path / "out").column("score").to_pylist()
    assert first == second


def test_conflicting_records_are_refused_by_place(world: World, tmp_path: Path) -> None:
    """splink#70, matchbox#370."""
    (tmp_path / "records").mkdir()
    pq.write_table(pa.table({"id": ["secret", "b"], "text": ["a cat", "rain"]}), tmp_path / "records/a.parquet")
    pq.write_table(pa.table({"id": ["c", "secret"], "text": ["snow", "a dog"]}), tmp_path / "records/b.parquet")
    task = EncodeConfig(EncoderOptions(world.encoder), str(tmp_path / "records"), str(tmp_path / "store"))
    with pytest.raises(InputError, match=r"a\.parquet.*row 0.*b\.parquet.*row 1") as caught:
        encode(task)
    assert "secret" not in str(caught.value)
    assert "dog" not in str(caught.value)


def test_a_bad_shard_fails_by_name_or_is_skipped_and_counted(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """Spark PR#16474."""
    pairs = make_pairs(files=3)
    path = pairs / "part-001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"part-001\.parquet"):
        score(config(world, pairs, tmp_path / "out"))
    skipping = config(world, pairs, tmp_path / "out", run=RunOptions(on_bad_shard="skip"))
    manifest = score(skipping)
    assert not manifest["complete"]
    assert manifest["rows_out"] == 60
    assert [entry["name"] for entry in manifest["skipped_shards"]] == ["part-001.parquet"]
    assert status(str(tmp_path / "out"))["state"] == "partial"
    path.write_bytes(whole)
    manifest = score(skipping)
    assert manifest["complete"]
    assert (manifest["rows_out"], manifest["units_resumed"]) == (90, 2)


@pytest.mark.parametrize("cached", [False, True])
def test_a_partial_run_stays_partial_when_it_is_called_again(world: World, tmp_path: Path, cached: bool) -> None:
    """Records that cannot be read are still missing from the scores: a scheduler's second try must not end as done."""
    (tmp_path / "records").mkdir()
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "records/a.parquet")
    (tmp_path / "records/b.parquet").write_bytes(b"PAR1 and no more PAR1")
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.table({"left_id": [1, 3], "right_id": [2, 1]}), tmp_path / "pairs/a.parquet")
    task = ScoreConfig(
        pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), encoder=EncoderOptions(world.encoder),
        records=str(tmp_path / "records"), cache=str(tmp_path / "cache") if cached else None,
        run=RunOptions(on_bad_shard="skip"),
    )  # fmt: skip
    first = score(task)
    second = score(task)
    for manifest in (first, second):
        assert not manifest["complete"]
        assert [bad["name"] for bad in manifest["stages"]["encode_left"]["skipped_shards"]] == ["b.parquet"]
    assert second["units_resumed"] == 1
    os.unlink(tmp_path / "out/_manifest.json")  # as if it had been killed just before it was written
    assert not score(task)["complete"]


def test_a_page_that_is_broken_inside_is_found(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs(files=2, rows=3000)
    path = pairs / "part-001.parquet"
    data = bytearray(path.read_bytes())
    data[100:2000] = b"\xff" * 1900
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"part-001\.parquet"):
        score(config(world, pairs, tmp_path / "out"))
    manifest = score(config(world, pairs, tmp_path / "out", run=RunOptions(on_bad_shard="skip")))
    assert manifest["rows_out"] == 3000
    assert len(manifest["skipped_units"]) == 1
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


def test_a_file_without_read_permission_is_named(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """Spark PR#16474."""
    pairs = make_pairs(files=2)
    (pairs / "part-001.parquet").chmod(0)
    root = open_location(pairs)
    with not_as_root(pairs):
        with pytest.raises(InputError, match=r"part-001\.parquet.*Permission denied"):
            plan_units(root, find_shards(root), 100, "run")
        plan = plan_units(root, find_shards(root), 100, "run", skip_bad_shards=True)
        assert [unit.shard.name for unit in plan.units] == ["part-000.parquet"]
        assert [name for name, _ in plan.bad_shards] == ["part-001.parquet"]


def test_a_file_without_read_permission_ends_in_the_exit_code_of_a_skipped_one(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """Spark PR#16474."""
    pairs = make_pairs(files=2)
    (pairs / "part-001.parquet").chmod(0)
    output = tmp_path / "out"
    output.mkdir()
    for store in (world.left_store, world.right_store):
        for path in Path(store).iterdir():
            path.chmod(path.stat().st_mode | 0o044 | (0o011 if path.is_dir() else 0))
    options = ["--pairs", pairs, "--store", world.left_store, "--right-store", world.right_store, "--output", output]
    words = ["score", *map(str, options), "--no-progress"]
    with not_as_root(pairs, Path(world.left_store), Path(world.right_store), owned=output):
        failed = CliRunner().invoke(main, words)
        skipped = CliRunner().invoke(main, [*words, "--on-bad-shard", "skip"])
    assert failed.exit_code == 1, failed.output
    assert "part-001.parquet" in failed.output
    assert "Permission denied" in failed.output
    assert skipped.exit_code == 3, skipped.output
    assert "partial: 1 files or units were skipped" in skipped.output
    assert read_scores(output).num_rows == 30


def test_another_runs_output_is_refused_and_can_be_overwritten(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    pairs = make_pairs()
    first = config(world, pairs, tmp_path / "out")
    score(first)
    with pytest.raises(OutputError, match=r"4 files of another run.*--overwrite"):
        score(replace(first, min_score=0.5))
    assert read_scores(tmp_path / "out").num_rows == 120
    manifest = score(replace(first, columns=("score",), run=RunOptions(overwrite=True)))
    assert manifest["rows_out"] == 120
    assert read_scores(tmp_path / "out").schema.names == ["score"]


@pytest.mark.parametrize(
    "wrong",
    [{"columns": ("n", "scor")}, {"calibration": "nofile.json"}, {"right_column": "reff"}, {"right_store": "nostore"}],
)
def test_a_mistake_beside_overwrite_costs_no_output(
    world: World, make_pairs: MakePairs, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    whole = config(world, make_pairs(), tmp_path / "out")
    score(whole)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(FlipkdError):
        score(replace(whole, **wrong, run=RunOptions(overwrite=True)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_a_folder_with_other_peoples_parquet_is_never_deleted(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "out/theirs.parquet")
    task = config(world, make_pairs(), tmp_path / "out", run=RunOptions(overwrite=True))
    with pytest.raises(OutputError, match=r"did not write \(such as theirs\.parquet\)"):
        score(task)
    assert pq.read_table(tmp_path / "out/theirs.parquet").num_rows == 1


def test_output_and_input_may_not_lie_in_one_another(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs()
    for output in (pairs, pairs / "out", pairs.parent):
        with pytest.raises(ConfigError, match="lie in one another"):
            score(config(world, pairs, output))


def test_a_second_run_has_nothing_to_do_and_changes_nothing(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    task = config(world, make_pairs(), tmp_path / "out")
    score(task)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    manifest = score(task)
    assert manifest["units_resumed"] == len(before) == 4
    assert manifest["rows_out"] == 120
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")} == before


def test_threshold_calibration_and_min_score(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs()
    (tmp_path / "calibration.json").write_text('{"slope": 8.0, "intercept": -4.0}')
    options = {"calibration": str(tmp_path / "calibration.json"), "threshold": 0.5}
    score(config(world, pairs, tmp_path / "all", **options))
    every = read_scores(tmp_path / "all")
    scores = every.column("score").to_numpy()
    np.testing.assert_allclose(every.column("probability").to_numpy(), 1 / (1 + np.exp(4 - 8 * scores)), atol=1e-5)
    assert every.column("match").to_pylist() == (every.column("probability").to_numpy() >= 0.5).tolist()
    score(config(world, pairs, tmp_path / "some", min_score=0.25, **options))
    assert read_scores(tmp_path / "some").equals(every.filter(pa.array(scores >= 0.25)))
    assert 0 < read_scores(tmp_path / "some").num_rows < 120


def test_a_calibration_of_knots_is_applied_after_the_kernel(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    pairs = make_pairs()
    pq.write_table(pair_table([(0, 1), (0, RECORDS + 5)], n=pa.array([0, 0], pa.int32())), pairs / "z.parquet")
    path = tmp_path / "calibration.json"
    path.write_text('{"scores": [0.1, 0.3, 0.6], "probabilities": [0.0, 0.5, 1.0]}')
    options = {"calibration": str(path), "threshold": 0.4}
    score(config(world, pairs, tmp_path / "all", **options))
    every = read_scores(tmp_path / "all")
    assert every.column("probability").null_count == every.column("match").null_count == 1  # the missing record
    scored = every.filter(pc.is_valid(every.column("score")))
    scores = scored.column("score").to_numpy()
    expected = np.interp(scores, [0.1, 0.3, 0.6], [0, 0.5, 1])
    np.testing.assert_array_equal(scored.column("probability").to_numpy(), expected.astype(np.float32))
    assert scored.column("match").to_pylist() == (expected >= 0.4).tolist()
    assert 0 < np.count_nonzero(expected >= 0.4) < 120
    for extra in ({"min_score": 0.25}, {"top_k": 1}):
        score(config(world, pairs, tmp_path / "some", **options, **extra, run=RunOptions(overwrite=True)))
        some = read_scores(tmp_path / "some")
        assert 0 < some.num_rows < 120
        again = np.interp(some.column("score").to_numpy(), [0.1, 0.3, 0.6], [0, 0.5, 1]).astype(np.float32)
        np.testing.assert_array_equal(some.column("probability").to_numpy(), again)
    path.write_text('{"scores": [0.1, 0.3, 0.6], "probabilities": [0.0, 0.5, 0.9]}')
    with pytest.raises(OutputError, match="another run"):
        score(config(world, pairs, tmp_path / "all", **options))


def test_a_calibration_of_another_encoder_is_refused(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs, path = make_pairs(files=1), tmp_path / "calibration.json"
    manifest = score(config(world, pairs, tmp_path / "plain"))
    assert len(manifest["encoder_fingerprint"]) == 64
    facts = {"slope": 8.0, "intercept": -4.0, "encoder_fingerprint": manifest["encoder_fingerprint"]}
    path.write_text(json.dumps(facts))
    score(config(world, pairs, tmp_path / "same", calibration=str(path)))
    path.write_text(json.dumps({**facts, "encoder_fingerprint": "0" * 64}))
    with pytest.raises(ConfigError, match="another encoder"):
        score(config(world, pairs, tmp_path / "other", calibration=str(path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("probability",)}, "needs --calibration"),
        ({"columns": ("match",)}, "needs --threshold"),
        ({"columns": ("nothing",)}, "no column 'nothing'"),
        ({"left_column": "nothing"}, "no column 'nothing'"),
        ({"calibration": "nowhere.json"}, "nowhere.json"),
        ({"threshold": float("nan")}, "NaN"),
        ({"columns": ()}, "--columns is empty"),
        ({"rows_per_unit": 0}, "--rows-per-unit"),
        ({"top_k": 0}, "--top-k"),
    ],
)
def test_bad_options_are_named_before_any_work(
    world: World, make_pairs: MakePairs, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    pairs = make_pairs()
    with pytest.raises(ConfigError, match=message):
        score(config(world, pairs, tmp_path / "out", **options))
    assert not list(tmp_path.glob("out/*.parquet"))


def test_an_input_column_named_score_is_not_overwritten(world: World, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    pq.write_table(pair_table([(1, 2)], score=[0.5]), tmp_path / "pairs/a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet of .*: the pairs have a column 'score' already"):
        score(config(world, tmp_path / "pairs", tmp_path / "out"))
    score(config(world, tmp_path / "pairs", tmp_path / "named", columns=("left_id", "score")))
    assert read_scores(tmp_path / "named").column("score").to_pylist() != [0.5]


def test_nor_is_one_written_beside_it_whose_name_differs_in_case_alone(world: World, tmp_path: Path) -> None:
    """DuckDB and Spark read the input's ``Score`` where ``score`` is asked for."""
    (tmp_path / "pairs/REASON=1").mkdir(parents=True)
    pq.write_table(pair_table([(1, 2)], Score=[0.5], Match=[True]), tmp_path / "pairs/REASON=1/a.parquet")
    pairs = tmp_path / "pairs/REASON=1/a.parquet"
    with pytest.raises(ConfigError, match="the pairs have a column 'Score' already"):
        score(config(world, pairs, tmp_path / "out"))
    with pytest.raises(ConfigError, match="--columns names 'Score' and 'score'"):
        score(config(world, pairs, tmp_path / "out", columns=("Score", "score")))
    with pytest.raises(ConfigError, match=r"a folder of the pairs, REASON=\.\.\., has the name"):
        score(config(world, tmp_path / "pairs", tmp_path / "out", columns=("score", "reason")))
    # What stands beside no other column is the caller's own.
    score(config(world, pairs, tmp_path / "named", columns=("Score", "Match", "reason")))
    assert read_scores(tmp_path / "named").column("Score").to_pylist() == [0.5]


def test_ids_of_another_kind_and_a_missing_store_are_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.table({"left_id": ["a"], "right_id": ["b"]}), tmp_path / "pairs/a.parquet")
    with pytest.raises(ConfigError, match="left_id"):
        score(config(world, tmp_path / "pairs", tmp_path / "out"))
    nowhere = ScoreConfig(pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(tmp_path / "no"))
    with pytest.raises(ConfigError, match="holds no vector store"):
        score(nowhere)


def test_records_are_encoded_first(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    task = ScoreConfig(
        pairs=str(make_pairs()),
        output=str(tmp_path / "out"),
        encoder=EncoderOptions(world.encoder),
        records=world.left,
        right_records=world.right,
        dtype="float32",
    )
    manifest = score(task)
    found = read_scores(tmp_path / "out")
    expected = [
        world.cosine(left - record_id(0), right - record_id(0))
        for left, right in zip(found.column("left_id").to_pylist(), found.column("right_id").to_pylist(), strict=True)
    ]
    np.testing.assert_allclose(found.column("score").to_numpy(), expected, atol=1e-5)
    assert manifest["stages"]["encode_left"]["rows_in"] == RECORDS
    assert sorted(os.listdir(tmp_path / "out/.flipkd")) == ["lock", "plan.json"]  # the stores are gone
    kept = replace(task, output=str(tmp_path / "again"), cache=str(tmp_path / "cache"))
    score(kept)
    assert sorted(name[:6] for name in os.listdir(tmp_path / "cache")) == ["store-", "store-", "texts"]
    again = score(replace(kept, output=str(tmp_path / "third")))
    assert read_scores(tmp_path / "third").equals(found)
    assert again["complete"]


def test_dry_run_and_status(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    task = config(world, make_pairs(), tmp_path / "out", rows_per_unit=20)
    plan = dry_run(task)
    assert (plan["files"], plan["units"], plan["rows"]) == (4, 8, 120)
    assert not (tmp_path / "out").exists()
    score(task)
    done = status(str(tmp_path / "out"))
    assert (done["state"], done["units_done"], done["units"], done["rows_done"]) == ("finished", 8, 8, 120)
    victim = sorted((tmp_path / "out").glob("*.parquet"))[0]
    victim.unlink()
    (tmp_path / "out/_manifest.json").unlink()
    half = status(str(tmp_path / "out"))
    assert (half["state"], half["units_done"], half["rows_done"]) == ("unfinished", 7, 100)
    with pytest.raises(InputError, match="not an output of flipkd"):
        status(str(tmp_path / "pairs"))


def test_a_full_disk_is_noticed_before_work_starts(
    world: World, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray#25372."""
    from flipkd.run import output

    usage = output.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OutputError, match="and the disk has 10 bytes free"):
        score(config(world, make_pairs(), tmp_path / "out"))


def test_a_folder_of_another_kind_of_job_is_refused_even_with_overwrite(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """Each would replace the other's manifest, and delete or leave parts of it."""
    over = RunOptions(overwrite=True)
    store = EncodeConfig(EncoderOptions(world.encoder), world.left, str(tmp_path / "store"))
    encode(store)
    pairs = make_pairs()
    score(config(world, pairs, tmp_path / "scores"))
    with pytest.raises(OutputError, match="store holds a vector store, not scores; choose another folder"):
        score(config(world, pairs, tmp_path / "store", run=over))
    with pytest.raises(OutputError, match="scores holds scores, not a vector store"):
        encode(replace(store, output=str(tmp_path / "scores"), run=over))
    lesson = TeachConfig(
        EncoderOptions(world.encoder), str(pairs), str(tmp_path / "scores"), records=world.left, run=over
    )
    with pytest.raises(OutputError, match="scores holds scores, not pairs with a teacher's scores"):
        teach(replace(lesson, right_records=world.right))
    again = score(config(world, pairs, tmp_path / "scores"))
    assert again["units_resumed"] == again["units"] > 0
    assert encode(store)["complete"]


@pytest.mark.parametrize("first", [None, b"\xff not UTF-8"])
def test_an_id_with_an_invalid_text_and_with_none_is_two_records(world: World, tmp_path: Path, first: Any) -> None:
    """As in teach; an id that stands twice with one text is one record."""
    (tmp_path / "records").mkdir()
    other = b"\xff not UTF-8" if first is None else None
    texts = pa.array([first, other, b"fever", b"fever"], pa.binary())
    pq.write_table(pa.table({"id": [1, 1, 2, 2], "text": texts}), tmp_path / "records/a.parquet")
    task = EncodeConfig(EncoderOptions(world.encoder), str(tmp_path / "records"), str(tmp_path / "store"))
    with pytest.raises(InputError, match="the same record id stands twice with different texts"):
        encode(task)


def test_texts_of_a_column_whose_name_is_no_word(world: World, tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "customer.name": ["a cat", "rain"], "a{b}": ["x", "y"]})
    pq.write_table(table, tmp_path / "records.parquet")
    pq.write_table(pa.table({"left_id": [1], "right_id": [2]}), tmp_path / "pairs.parquet")
    task = ScoreConfig(
        str(tmp_path / "pairs.parquet"), str(tmp_path / "out"), encoder=EncoderOptions(world.encoder),
        records=str(tmp_path / "records.parquet"), text_column="customer.name",
    )  # fmt: skip
    assert score(task)["reasons"] == {}
    with pytest.raises(ConfigError, match=r"--text-column 'a\{b\}': a name with braces cannot be used"):
        score(replace(task, text_column="a{b}"))


def test_a_folder_with_the_name_of_a_score_column_is_refused(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """The output keeps the folders of its input: no reader could tell which `score` is meant."""
    pairs = make_pairs(files=1)
    (pairs / "score=1").mkdir()
    (pairs / "part-000.parquet").rename(pairs / "score=1/a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet of .*: a folder of the pairs, score=\.\.\., has the name"):
        score(config(world, pairs, tmp_path / "out"))
    (pairs / "score=1").rename(pairs / "match=1")
    assert score(config(world, pairs, tmp_path / "out"))["complete"]
    with pytest.raises(ConfigError, match=r"match=.*has the name of a column"):
        score(config(world, pairs, tmp_path / "other", threshold=0.5))
