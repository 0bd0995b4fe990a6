"""Readers of pairs and records against random tables, and against a corpus of broken Parquet files.

A broken file is a clean error that names it, or right rows: as many as there were, whose values are what the file now
says (a bit that turns over in a page without a checksum changes a value, and nobody can know), with scores and reasons
that follow from them. Never a dead process, never a row less without an error.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.score import write_store
from flipkd.config import EncodeConfig, EncoderOptions, ScoreConfig, TeachConfig
from flipkd.data.find import find_shards
from flipkd.data.location import open_location
from flipkd.data.record_texts import read_record_texts
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, FlipkdError, InputError
from flipkd.run.encode import encode
from flipkd.run.score import score
from flipkd.run.teach import teach
from flipkd.run.units import WorkUnit
from tests.conftest import WriteParquet
from tests.data import judges
from tests.data.broken_files import FORMS, MUTATIONS, ROWS, TABLES, BrokenFile, whole_file
from tests.data.judges import JUDGES, ScoreJudge, make_store, same
from tests.small_models import make_encoder

ROOT = Path(__file__).parents[2]
CHAOS_SEED = int(os.environ.get("FLIPKD_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
FINGERPRINT = "0" * 64
RECORD_IDS = [0, 1, 7, 2**31 - 1, 120]
VECTORS = np.eye(5, 8, dtype=np.float32) * 0.8 + np.eye(5, 8, 3, dtype=np.float32) * 0.6


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("fuzz") / "encoder", seed=0)


def judged(
    table: str, source: Path, folder: Path, seed: int, numbers: Sequence[int]
) -> Iterator[tuple[BrokenFile, str]]:
    """What came of each file. A process that dies is a finding about its last file, and the next one goes on."""
    waiting = list(numbers)
    while waiting:
        command = [sys.executable, "-m", "tests.data.judges", table, str(source), str(folder), str(seed)]
        done = subprocess.run(
            [*command, *map(str, waiting[:100])], capture_output=True, text=True, cwd=ROOT, timeout=240, check=False
        )
        started = None
        for line in map(json.loads, done.stdout.splitlines()):
            if "started" in line:
                started = waiting.pop(0)
                assert started == line["started"]
            else:
                yield BrokenFile(line["number"], seed, table), line["outcome"]
                started = None
        if started is not None:
            outcome = f"WRONG: the process ended with {done.returncode}: {done.stderr[-2000:]}"
            yield BrokenFile(started, seed, table), outcome
        elif done.returncode:
            raise AssertionError(done.stderr)


def assert_clean(found: list[tuple[BrokenFile, str]]) -> None:
    wrong = [f"{broken}: {outcome}" for broken, outcome in found if outcome.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)
    # A flipped bit that a checksum covers is seen; so is every file that ends too early.
    for broken, outcome in found:
        if broken.mutation.__name__ in ("_truncate", "_lose_middle"):
            assert outcome.startswith("error: InputError"), f"{broken}: {outcome}"


def test_broken_files_are_an_error_or_right_rows(store: Path, tmp_path: Path) -> None:
    found = list(judged("pairs", store, tmp_path, 0, range(0, 1000, 11)))
    assert_clean(found)
    outcomes = Counter(outcome.split(":")[0] for _, outcome in found)
    assert outcomes["error"] > 50
    assert outcomes["rows"] > 3
    assert {broken.mutation for broken, _ in found} == {one for one, _ in MUTATIONS}


@pytest.mark.chaos
def test_a_thousand_broken_files(store: Path, tmp_path: Path) -> None:
    print(f"FLIPKD_CHAOS_SEED={CHAOS_SEED}")
    found = list(judged("pairs", store, tmp_path, CHAOS_SEED, range(1000)))
    assert len(found) == 1000
    assert_clean(found)


@pytest.mark.chaos
@pytest.mark.parametrize("table", ["records", "texts"])
def test_broken_records_and_broken_pairs_of_texts(encoder: Path, tmp_path: Path, table: str) -> None:
    """``encode`` and ``teach``."""
    print(f"FLIPKD_CHAOS_SEED={CHAOS_SEED}")
    found = list(judged(table, encoder, tmp_path, CHAOS_SEED, range(0, 1000, 7)))
    assert_clean(found)
    outcomes = Counter(outcome.split(":")[0] for _, outcome in found)
    assert outcomes["error"] > 50
    assert outcomes["rows"] > 10
    assert {broken.mutation for broken, _ in found} == {one for one, _ in MUTATIONS}


@pytest.mark.parametrize("table", TABLES)
def test_a_whole_file_in_every_form_is_right(store: Path, encoder: Path, tmp_path: Path, table: str) -> None:
    judge = JUDGES[table](store if table == "pairs" else encoder, tmp_path)
    for form in range(len(FORMS)) if table == "pairs" else (0, 13, 31):
        assert judge.judge("whole.parquet", whole_file(form, table)) == "rows", FORMS[form]


def test_a_wrong_score_would_be_seen(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "vectors", lambda original=judges.vectors: original()[::-1])
    assert ScoreJudge(store, tmp_path).judge("whole.parquet", whole_file(0)) == "WRONG: scores"


@pytest.mark.parametrize("table", ["records", "texts"])
def test_a_wrong_vector_would_be_seen(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    judge = JUDGES[table](encoder, tmp_path)
    told = judges.texts_of
    monkeypatch.setattr(judges, "texts_of", lambda column: [text and text + "?" for text in told(column)])
    assert judge.judge("whole.parquet", whole_file(0, table)) in ("WRONG: vectors", "WRONG: scores")


def test_texts_that_are_lost_would_be_seen(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the scoring of the same file ends with an error."""
    judge, read = ScoreJudge(store, tmp_path), WorkUnit.read

    def one_less(self: WorkUnit, *arguments: Any) -> Iterator[pa.Table]:
        return (table.slice(1) for table in read(self, *arguments))

    def first_texts(table: pa.Table) -> pa.Table:
        return table.slice(0, 1)

    monkeypatch.setattr("flipkd.run.texts._first_of_each", first_texts)
    assert judge.judge("whole.parquet", whole_file(0)).startswith("WRONG: 5")  # of the ids, and a few texts
    monkeypatch.setattr(WorkUnit, "read", one_less)
    assert judge.judge("whole.parquet", whole_file(0)) == f"WRONG: texts of {ROWS - 3} rows of {ROWS}, and no error"

    def refuse() -> None:
        raise InputError("whole.parquet is refused")

    monkeypatch.setattr(judge, "run", refuse)
    assert judge.judge("whole.parquet", whole_file(0)) == f"WRONG: texts of {ROWS - 3} rows of {ROWS}, and no error"


def test_an_error_must_name_the_file(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ScoreJudge(store, tmp_path)
    for kind in (ConfigError, InputError):

        def refuse(kind: type[FlipkdError] = kind) -> None:
            raise kind("column 'left_id' is of type double")

        monkeypatch.setattr(judge, "run", refuse)
        assert judge.judge("whole.parquet", whole_file(0)).startswith("WRONG: the error does not name the file")


def test_a_column_of_another_type_in_one_file_is_told_with_the_file(
    store: Path, encoder: Path, tmp_path: Path, write_parquet: WriteParquet
) -> None:
    """Of many files: the first one is whole."""
    for part, ids in enumerate((["record-0001"], [0.5])):
        write_parquet(f"pairs/{part}.parquet", {"left_id": ids, "right_id": ids})
        write_parquet(f"records/{part}.parquet", {"id": ids, "text": ["a"]})
        write_parquet(f"texts/{part}.parquet", {"left_text": ids, "right_text": ids})
        write_parquet(f"columns/{part}.parquet", {"id": [part], "text": ids})
    options, out = EncoderOptions(str(encoder)), str(tmp_path / "out")
    jobs: list[Callable[[], Any]] = [
        lambda: score(ScoreConfig(pairs=str(tmp_path / "pairs"), output=out, store=str(store))),
        lambda: score(ScoreConfig(pairs=str(tmp_path / "texts"), output=out, encoder=options)),
        lambda: encode(EncodeConfig(options, str(tmp_path / "records"), out)),
        lambda: encode(EncodeConfig(options, str(tmp_path / "columns"), out)),
        lambda: teach(TeachConfig(options, str(tmp_path / "texts"), out)),
        lambda: teach(TeachConfig(options, str(tmp_path / "pairs"), out, records=str(tmp_path / "records"))),
    ]
    for job in jobs:
        shutil.rmtree(out, ignore_errors=True)
        with pytest.raises(ConfigError, match=r"^1\.parquet of .*: column '(left_id|left_text|id|text)' .*type double"):
            job()


@pytest.mark.parametrize("page_version", ["1.0", "2.0"])
def test_a_bit_that_turned_over_is_seen_by_the_checksum(tmp_path: Path, page_version: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**63, 1000)
    options = {"compression": "none", "use_dictionary": False, "data_page_version": page_version}
    for checksum in (True, False):
        path = tmp_path / "pairs.parquet"
        pq.write_table(pa.table({"id": values}), path, write_page_checksum=checksum, **options)
        data = bytearray(path.read_bytes())
        place = data.index(values[500].tobytes())
        data[place] ^= 1
        path.write_bytes(data)
        with ShardReader(open_location(path), find_shards(open_location(path))[0]) as reader:
            if checksum:
                with pytest.raises(InputError, match=r"cannot read .*pairs\.parquet: .*(CRC|checksum)"):
                    list(reader.all_batches(["id"], 100))
            else:
                found = pa.concat_tables(reader.all_batches(["id"], 100)).column("id").to_numpy()
                assert np.flatnonzero(found != values).tolist() == [500]


def test_a_footer_that_tells_of_fewer_rows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"id": range(1000)}), path, row_group_size=400)
    data, refused = path.read_bytes(), 0
    # The number of rows, 1000 and 200, stands in the footer as a varint (zigzag): make it smaller.
    for rows, fewer in ((1000, 999), (200, 199)):
        old, new = (bytes([2 * count & 127 | 128, 2 * count >> 7]) for count in (rows, fewer))
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        place = data.find(old, footer)
        while place >= 0:
            path.write_bytes(data[:place] + new + data[place + 2 :])
            try:
                with ShardReader(open_location(path), find_shards(open_location(path))[0]) as reader:
                    assert sum(table.num_rows for table in reader.all_batches(["id"], 100)) == 1000
            except InputError:
                refused += 1
            place = data.find(old, place + 1)
    assert refused >= 2


@pytest.mark.parametrize("change", ["cut off", "replaced", "deleted"])
def test_a_file_that_changes_under_its_reader_is_an_error(tmp_path: Path, change: str) -> None:
    path = tmp_path / "pairs.parquet"
    table = pa.table({"id": np.random.default_rng(0).integers(0, 2**60, 400_000)})
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=100_000)
    with ShardReader(open_location(path), find_shards(open_location(path))[0]) as reader:
        batches = reader.all_batches(["id"], 1000)
        next(batches)
        if change == "cut off":
            os.truncate(path, 1000)
        elif change == "replaced":
            path.rename(tmp_path / "old")
            shutil.copy(tmp_path / "old", path)
        else:
            path.unlink()
        with pytest.raises(InputError, match=r"pairs\.parquet"):
            list(batches)


ID_TYPES = st.sampled_from(
    [pa.int64(), pa.int32(), pa.uint64(), pa.uint32(), pa.dictionary(pa.int32(), pa.int64()), pa.null()]
)
PASSED = {
    "string": (pa.string(), st.text(max_size=5)),
    "large": (pa.large_string(), st.text(max_size=5)),
    "view": (pa.string_view(), st.text(max_size=20)),
    "binary": (pa.binary(), st.binary(max_size=5)),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), st.sampled_from(["a", "b", ""])),
    "int": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "float": (pa.float64(), st.floats(allow_nan=False)),
    "bool": (pa.bool_(), st.booleans()),
    "moment": (pa.timestamp("us", tz="UTC"), st.datetimes(datetime.datetime(1900, 1, 1))),
    "nano": (pa.timestamp("ns"), st.integers(-(2**62), 2**62)),
    "date": (pa.date32(), st.dates()),
    "decimal": (pa.decimal128(20, 3), st.decimals(-(10**9), 10**9, places=3)),
    "list": (pa.list_(pa.int64()), st.lists(st.none() | st.integers(-9, 9), max_size=3)),
    "large_list": (pa.large_list(pa.string()), st.lists(st.text(max_size=2), max_size=2)),
    "struct": (
        pa.struct({"a": pa.int8(), "b": pa.list_(pa.string())}),
        st.fixed_dictionaries({"a": st.integers(-9, 9), "b": st.lists(st.text(max_size=2), max_size=2)}),
    ),
    "map": (pa.map_(pa.string(), pa.float32()), st.lists(st.tuples(st.text(max_size=2), st.just(0.5)), max_size=2)),
}  # fmt: skip


@st.composite
def chunked(draw: st.DrawFn, kind: pa.DataType, values: st.SearchStrategy[Any], rows: int) -> pa.ChunkedArray:
    """A column of this type in chunks of random sizes, some of them empty."""
    found = draw(st.lists(st.none() | values, min_size=rows, max_size=rows))
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=2)))
    edges = [0, *cuts, rows]
    plain_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    chunks = [pa.array(found[start:stop], plain_kind) for start, stop in pairwise(edges)]
    if pa.types.is_dictionary(kind):
        return pa.chunked_array([chunk.dictionary_encode() for chunk in chunks], kind)
    return pa.chunked_array(chunks, kind)


@st.composite
def pair_tables(draw: st.DrawFn) -> list[pa.Table]:
    """One to three tables of one schema, of ids (some unknown, some null) and two columns to pass through."""
    names = draw(st.lists(st.sampled_from(sorted(PASSED)), unique=True, min_size=1, max_size=2))
    kinds = [draw(ID_TYPES), draw(ID_TYPES)]
    tables = []
    for rows in draw(st.lists(st.integers(0, 12), min_size=1, max_size=3)):
        columns = {
            name: draw(
                chunked(kind, st.nothing() if pa.types.is_null(kind) else st.sampled_from([*RECORD_IDS, 99]), rows)
            )
            for name, kind in zip(("left_id", "right_id"), kinds, strict=True)
        }
        columns |= {name: draw(chunked(*PASSED[name], rows)) for name in names}
        tables.append(pa.table(columns))
    return tables


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_store(folder / "store", pa.array(RECORD_IDS, pa.int64()), VECTORS, "float32")
    return folder / "store"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tables=pair_tables(),
    group=st.integers(1, 13),
    unit=st.integers(1, 13),
    compression=st.sampled_from(["none", "zstd"]),
)
def test_any_pairs_are_scored_and_passed_through(
    small_store: Path, tmp_path: Path, tables: list[pa.Table], group: int, unit: int, compression: str
) -> None:
    pairs, output = tmp_path / "pairs", tmp_path / "out"
    for folder in (pairs, output):
        shutil.rmtree(folder, ignore_errors=True)
    pairs.mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, pairs / f"{number}.parquet", row_group_size=group, compression=compression)
    with pytest.MonkeyPatch.context() as patch:  # the disk's flushes are not what is tested
        patch.setattr("flipkd.data.commit.sync", lambda _: None)
        manifest = score(ScoreConfig(pairs=str(pairs), output=str(output), store=str(small_store), rows_per_unit=unit))
    given = [pq.read_table(pairs / f"{number}.parquet") for number in range(len(tables))]
    assert manifest["rows_in"] == manifest["rows_out"] == sum(table.num_rows for table in given)
    for number, table in enumerate(given):
        outputs = [pq.read_table(path) for path in sorted(output.glob(f"{number}.rows*.parquet"))]
        found = pa.concat_tables(outputs)
        assert found.schema.names[: len(table.schema.names)] == table.schema.names
        for name in table.schema.names:
            assert same(found.column(name), table.column(name)), name
        for row, (left, right) in enumerate(zip(*table.select([0, 1]).to_pydict().values(), strict=True)):
            reason, wanted = None, None
            if left is None or right is None:
                reason = "missing_id"
            elif left not in RECORD_IDS or right not in RECORD_IDS:
                reason = "missing_record"
            else:
                wanted = float(VECTORS[RECORD_IDS.index(left)] @ VECTORS[RECORD_IDS.index(right)])
            assert found.column("reason")[row].as_py() == reason
            assert found.column("score")[row].as_py() == (None if wanted is None else pytest.approx(wanted, abs=1e-6))


TEXTS = st.none() | st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(["", " ", "e\u0301", "\u00e9 "])
TEXT_TYPES = st.sampled_from(
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int16(), pa.string())]
)


@st.composite
def record_tables(draw: st.DrawFn) -> list[tuple[list[int], list[str | None], pa.Table]]:
    """One to three tables of ids, each id once over all of them, and texts."""
    tables, first = [], 0
    kind = draw(TEXT_TYPES)
    for texts in draw(st.lists(st.lists(TEXTS, max_size=8), min_size=1, max_size=3)):
        ids = list(range(first, first + len(texts)))
        first += len(texts)
        column = pa.array(texts, pa.string())
        tables.append((ids, texts, pa.table({"id": pa.array(ids, pa.int64()), "text": column.cast(kind)})))
    return tables


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=record_tables(), group=st.integers(1, 9))
def test_any_records_give_their_normal_texts(
    tmp_path: Path, tables: list[tuple[list[int], list[str | None], pa.Table]], group: int
) -> None:
    shutil.rmtree(tmp_path / "records", ignore_errors=True)
    (tmp_path / "records").mkdir()
    for number, (_, _, table) in enumerate(tables):
        pq.write_table(table, tmp_path / f"records/{number}.parquet", row_group_size=group)
    root = open_location(tmp_path / "records")
    found = read_record_texts(root, find_shards(root), "id", "{text}")
    ids = [one for ids, _, _ in tables for one in ids]
    given_texts = [text for _, texts, _ in tables for text in texts]
    wanted = [None if text is None else unicodedata.normalize("NFC", text).strip() or None for text in given_texts]
    assert found.ids.to_pylist() == ids
    assert found.texts.to_pylist() == wanted
    assert not found.invalid.any()
    places = found.look_up(pa.chunked_array([pa.array([*ids[::-1], -1])]), "id")
    assert places.tolist() == [*range(len(ids))[::-1], -1]


@pytest.mark.parametrize(
    "kind", [pa.float32(), pa.float64(), pa.list_(pa.int64()), pa.timestamp("us"), pa.bool_()], ids=str
)
def test_a_type_that_cannot_be_an_id_is_named(small_store: Path, tmp_path: Path, kind: pa.DataType) -> None:
    (tmp_path / "pairs").mkdir()
    table = pa.table({"left_id": pa.nulls(3, kind), "right_id": [0, 1, 7]})
    pq.write_table(table, tmp_path / "pairs/part.parquet")
    with pytest.raises(ConfigError, match="column 'left_id' is of type"):
        score(ScoreConfig(pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(small_store)))
