"""Finding, reading and committing shards: what a folder of Parquet may hold, and what a reader may ever see."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flipkd.data.columns import take_rows
from flipkd.data.commit import ShardWriter, writing
from flipkd.data.find import Shard, find_shards
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import distinct_texts
from flipkd.data.records import as_text
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, InputError, OutputError
from flipkd.run.units import plan_units


def read_all(location: Location, shard: Shard, columns: list[str] | None = None) -> pa.Table:
    (unit,) = plan_units(location, [shard], 1 << 40, "run").units
    with ShardReader(location, shard) as reader:
        return pa.concat_tables(unit.read(reader, reader.schema.names if columns is None else columns, 1000))


def test_only_parquet_files_are_the_table(tmp_path: Path) -> None:
    """What other tools leave beside the shards is not read: ray#57704, duckdb#15916."""
    table = pa.table({"id": [1, 2, 3]})
    pq.write_table(table, tmp_path / "part-0.parquet")
    (tmp_path / "sub").mkdir()
    pq.write_table(table, tmp_path / "sub" / "part-1.parquet")
    for name in ("_SUCCESS", "_metadata", ".part-0.parquet.crc", ".part-9.parquet", "_common_metadata", "notes.txt"):
        (tmp_path / name).write_bytes(b"not parquet")
    (tmp_path / "_temporary").mkdir()
    pq.write_table(table, tmp_path / "_temporary" / "part-2.parquet")
    location = open_location(tmp_path)
    shards = find_shards(location)
    assert [shard.name for shard in shards] == ["part-0.parquet", "sub/part-1.parquet"]
    assert sum(read_all(location, shard).num_rows for shard in shards) == 6


def test_a_path_without_parquet_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        find_shards(open_location(tmp_path))
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        find_shards(open_location(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("_delta_log/00000000000000000000.json", "Delta"),
        (".hoodie/hoodie.properties", "Hudi"),
        ("metadata/00001-5f.metadata.json", "Iceberg"),
        ("metadata/v1.metadata.json", "Iceberg"),
    ],
)
@pytest.mark.parametrize("is_local", [True, False])
def test_a_table_that_tells_elsewhere_which_files_count_is_refused(
    tmp_path: Path, name: str, told: str, is_local: bool
) -> None:
    """Its deleted and overwritten rows were read too."""
    root = open_location(tmp_path if is_local else f"memory://flipkd-table/{told}{name.replace('/', '')}")
    for file in ("data/part-0.parquet", name):
        target = root.child(file)
        root.filesystem.create_dir(target.path.rpartition("/")[0])
        with root.filesystem.open_output_stream(target.path) as sink:
            sink.write(b"{}")
    with pytest.raises(InputError, match=rf"is a table of {told} .*plain Parquet"):
        find_shards(root)
    root.filesystem.delete_dir(root.child(name.partition("/")[0]).path)
    assert [shard.name for shard in find_shards(root)] == ["data/part-0.parquet"]


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot open the location 'nosuch://bucket/x'"):
        open_location("nosuch://bucket/x")


def test_columns_are_matched_by_name(tmp_path: Path) -> None:
    """A shard may have its columns in another order: ray PR#63582."""
    pq.write_table(pa.table({"left_id": [1], "right_id": [2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"right_id": [4], "left_id": [3]}), tmp_path / "b.parquet")
    location = open_location(tmp_path)
    tables = [read_all(location, shard, ["left_id", "right_id"]) for shard in find_shards(location)]
    assert pa.concat_tables(tables).to_pydict() == {"left_id": [1, 3], "right_id": [2, 4]}


def test_a_missing_and_a_doubled_column_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    location = open_location(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.parquet .* has no column 'left_id'; it has a"):
        read_all(location, find_shards(location)[0], ["left_id"])
    doubled = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(doubled, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="2 columns named 'a'"):
        read_all(location, find_shards(location)[0], ["a"])


def test_hive_partition_values_stay_text(tmp_path: Path) -> None:
    """007 is not 7: prestodb#2233."""
    for branch in ("branch=007", "branch=a%20b", "branch=__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / branch).mkdir()
        pq.write_table(pa.table({"id": [1, 2]}), tmp_path / branch / "part.parquet")
    location = open_location(tmp_path)
    found = {
        shard.name.split("/")[0]: read_all(location, shard, ["branch", "id"]).column("branch").to_pylist()
        for shard in find_shards(location)
    }
    assert found == {
        "branch=007": ["007", "007"],
        "branch=a%20b": ["a b", "a b"],
        "branch=__HIVE_DEFAULT_PARTITION__": [None, None],
    }


def test_columns_of_folder_names_alone(tmp_path: Path) -> None:
    """`label=0/part.parquet`, read for its label: no column of the file is decoded."""
    for label in ("label=0", "label=1"):
        (tmp_path / label).mkdir()
        pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / label / "part.parquet")
    location = open_location(tmp_path)
    found = [read_all(location, shard, ["label"]) for shard in find_shards(location)]
    assert pa.concat_tables(found).to_pydict() == {"label": ["0"] * 3 + ["1"] * 3}


def test_years_that_nanoseconds_do_not_reach(tmp_path: Path) -> None:
    """Timestamps of Spark, Hive and Impala (INT96), with the first and last day that stand for none."""
    when = pa.array([datetime(1, 1, 1), datetime(2026, 1, 1, 0, 0, 0, 7), datetime(9999, 12, 31)], pa.timestamp("us"))
    pq.write_table(pa.table({"when": when}), tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    location = open_location(tmp_path)
    assert read_all(location, find_shards(location)[0]).column("when").combine_chunks().equals(when)


@pytest.mark.parametrize("index", [pa.int8(), pa.uint8(), pa.int16()], ids=str)
def test_categories_of_many_row_groups(tmp_path: Path, index: pa.DataType) -> None:
    """pandas writes chunks of `category` with int8: a row group has few of them, and the file more than int8 counts."""
    groups = [
        pa.DictionaryArray.from_arrays(pa.array([*range(100), None], index), [f"{group} {i}" for i in range(100)])
        for group in range(3)
    ]
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("city", groups[0].type)])) as writer:
        for group in groups:
            writer.write_table(pa.table({"city": group}))
    location = open_location(tmp_path)
    with ShardReader(location, find_shards(location)[0]) as reader:
        kind = reader.schema.field("city").type
    table = read_all(location, find_shards(location)[0])
    assert table.column("city").type == kind == pa.dictionary(pa.int32(), pa.string())
    expected = [value for group in groups for value in group.to_pylist()]
    assert take_rows(table, pa.array(range(303))).column("city").to_pylist() == expected
    assert as_text(table.column("city"), "city")[0].to_pylist() == expected
    texts, places = distinct_texts(table.column("city"), "city")
    assert texts.values.take(pa.array(places)).to_pylist() == expected


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.list_(pa.dictionary(pa.int32(), pa.string())), lambda i: [f"x{i % 3}"]),
        (pa.struct([("q", pa.dictionary(pa.int32(), pa.string()))]), lambda i: {"q": f"x{i % 3}"}),
    ],
    ids=["list", "struct"],
)
def test_dictionaries_inside_lists_over_many_row_groups(
    tmp_path: Path, kind: pa.DataType, value: Callable[[int], object]
) -> None:
    values = pa.array([value(i) for i in range(60)], kind)
    pq.write_table(pa.table({"v": values, "n": range(60)}), tmp_path / "a.parquet", row_group_size=17)
    location = open_location(tmp_path)
    found = read_all(location, find_shards(location)[0])
    assert found.column("v").to_pylist() == values.to_pylist()
    assert found.column("n").to_pylist() == list(range(60))
    (unit,) = plan_units(location, find_shards(location), 1 << 40, "run").units
    with ShardReader(location, unit.shard) as reader:
        some = pa.concat_tables(reader.batches(["n", "v"], 7, row_groups=(0, 4), skip_rows=15, rows=30))
    assert some.column("n").to_pylist() == list(range(15, 45))
    assert some.column("v").to_pylist() == values.to_pylist()[15:45]


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    """A file that lost its last bytes: Spark PR#16474."""
    path = tmp_path / "part-0.parquet"
    pq.write_table(pa.table({"id": list(range(1000))}), path)
    path.write_bytes(path.read_bytes()[:-100])
    location = open_location(tmp_path)
    with pytest.raises(InputError, match=r"cannot read part-0\.parquet .*--on-bad-shard skip"):
        plan_units(location, find_shards(location), 100, "run")
    plan = plan_units(location, find_shards(location), 100, "run", skip_bad_shards=True)
    assert plan.units == []
    assert [name for name, _ in plan.bad_shards] == ["part-0.parquet"]
    with pytest.raises(InputError, match=r"; mend or remove the file$"):  # of a command that has no such option
        ShardReader(location, find_shards(location)[0])


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_file_too_short_to_be_parquet_is_named(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1PAR1"[:size])
    location = open_location(tmp_path)
    with pytest.raises(InputError, match=r"cannot read x\.parquet"):
        plan_units(location, find_shards(location), 100, "run")


@settings(max_examples=40)
@given(
    groups=st.lists(st.integers(0, 30), max_size=6),
    rows_per_unit=st.integers(1, 40),
    split=st.booleans(),
    batch_rows=st.integers(1, 25),
)
def test_units_cover_every_row_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], rows_per_unit: int, split: bool, batch_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("units")
    schema = pa.schema([("id", pa.int64())])
    start = 0
    with pq.ParquetWriter(folder / "x.parquet", schema) as writer:
        for count in groups:
            writer.write_table(pa.table({"id": pa.array(range(start, start + count), pa.int64())}), row_group_size=1000)
            start += count
    location = open_location(folder)
    plan = plan_units(location, find_shards(location), rows_per_unit, "run", split_row_groups=split)
    seen: list[int] = []
    for unit in plan.units:
        with ShardReader(location, unit.shard) as reader:
            tables = list(unit.read(reader, ["id"], batch_rows))
        assert tables, "a unit without rows still tells its schema"
        assert all(table.schema == schema for table in tables)
        rows = [value for table in tables for value in table.column("id").to_pylist()]
        assert len(rows) == unit.rows
        assert unit.first_row == len(seen)
        seen += rows
    assert seen == list(range(start))
    assert len({unit.output for unit in plan.units}) == len(plan.units) >= 1
    if split:
        assert all(unit.rows <= rows_per_unit for unit in plan.units)


def test_unit_names_change_with_the_input_and_the_run(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": [1, 2]}), path)
    location = open_location(tmp_path)

    def name(run: str) -> str:
        return plan_units(location, find_shards(location), 10, run).units[0].output

    first = name("run")
    assert name("run") == first
    assert name("another run") != first
    os.utime(path, ns=(1, 1))
    assert name("run") != first


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    root = open_location(tmp_path / "out")
    table = pa.table({"id": [1, 2, 3]})
    with ShardWriter(root, "sub/a.parquet", table.schema, {"key": "value"}, {}) as writer:
        writer.write(table)
        assert not (tmp_path / "out/sub/a.parquet").exists()
        names = os.listdir(tmp_path / "out/sub")
        assert len(names) == 1
        assert names[0].startswith(".")
        writer.commit()
    assert os.listdir(tmp_path / "out/sub") == ["a.parquet"]
    assert stat.S_IMODE((tmp_path / "out/sub/a.parquet").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "out/sub").stat().st_mode) == 0o700
    assert pq.read_metadata(tmp_path / "out/sub/a.parquet").metadata[b"key"] == b"value"

    with ShardWriter(root, "sub/b.parquet", table.schema, {}, {}) as writer:
        writer.write(table)  # and no commit: something went wrong
    assert os.listdir(tmp_path / "out/sub") == ["a.parquet"]


def test_writing_where_a_file_stands_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, not a folder")
    schema = pa.schema([("id", pa.int64())])
    with pytest.raises(OutputError, match=r"cannot write .*out/a\.parquet"):
        ShardWriter(open_location(tmp_path / "out"), "a.parquet", schema, {}, {})


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENAMETOOLONG, "shorter names"),
        (errno.ENOSPC, "free some space and run again"),
        (errno.EFBIG, r"raise the limit \(ulimit -f\)"),
        (errno.ENOTDIR, "a file stands where a folder should be"),
        (errno.EIO, "run again"),
    ],
)
def test_the_way_out_is_one_that_helps(number: int, told: str) -> None:
    with pytest.raises(OutputError, match=rf"cannot write there: .*; .*{told}"), writing("there"):
        raise OSError(number, os.strerror(number))


def test_other_filesystems_are_read_and_written() -> None:
    root = open_location("memory://flipkd-shards/out")
    table = pa.table({"id": [1, 2, 3]})
    with ShardWriter(root, "a.parquet", table.schema, {}, {}) as writer:
        writer.write(table)
        writer.commit()
    (shard,) = find_shards(root)
    assert read_all(root, shard).equals(table)
    fsspec.filesystem("memory").rm("/flipkd-shards", recursive=True)


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    """An unmounted disk must not look like fewer rows."""
    (tmp_path / "sub").mkdir()
    pq.write_table(pa.table({"id": [1]}), tmp_path / "a.parquet")
    (tmp_path / "sub/gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "_gone.parquet").symlink_to(tmp_path / "nowhere")
    assert len(find_shards(open_location(tmp_path))) == 1
    (tmp_path / "sub/gone.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"sub/gone\.parquet is a link to a file that is not there"):
        find_shards(open_location(tmp_path))


def test_a_link_to_a_folder_above_is_refused_and_one_to_another_is_followed(tmp_path: Path) -> None:
    """Else each file would be read as often as a path may be long."""
    table = tmp_path / "table" / "sub"
    table.mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for folder in (table, tmp_path / "other"):
        pq.write_table(pa.table({"id": [1]}), folder / "a.parquet")
    (tmp_path / "table" / "linked").symlink_to(tmp_path / "other")
    location = open_location(tmp_path / "table")
    assert [shard.name for shard in find_shards(location)] == ["linked/a.parquet", "sub/a.parquet"]
    (table / "loop").symlink_to(tmp_path / "table")
    with pytest.raises(InputError, match=r"sub/loop is a link to a folder that it lies in; remove it"):
        find_shards(location)
    (table / "loop").unlink()
    (tmp_path / "other/back").symlink_to(tmp_path / "table")  # round by the linked folder
    with pytest.raises(InputError, match=r"linked/back is a link to a folder that it lies in"):
        find_shards(location)


def test_what_is_no_file_or_has_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(InputError, match=r"pipe\.parquet is not a file"):
        find_shards(open_location(tmp_path))
    (tmp_path / "pipe.parquet").unlink()
    with open(os.fsencode(tmp_path) + b"/bad\xff.parquet", "wb"):
        pass
    with pytest.raises(InputError, match=r"bad\\xff\.parquet has a name that is not UTF-8; rename it"):
        find_shards(open_location(tmp_path))


def test_a_file_whose_name_says_that_it_is_no_data_makes_no_outputs(tmp_path: Path) -> None:
    """They would have such names too, and neither a rerun nor ``evaluate`` would see them."""
    pq.write_table(pa.table({"id": [1]}), tmp_path / "_x.parquet")
    location = open_location(tmp_path / "_x.parquet")
    shards = find_shards(location)  # to read it is no harm
    with pytest.raises(InputError, match=r"_x\.parquet: names that begin with _ or \. .*; rename it"):
        plan_units(location, shards, 10, "run")
