"""What flipkd itself has written, damaged between two runs: made again, or an error that names it; never believed."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.score import write_store
from flipkd.config import EncodeConfig, EncoderOptions, ScoreConfig
from flipkd.data.location import open_location
from flipkd.errors import ConfigError, FlipkdError, InputError
from flipkd.run.encode import encode
from flipkd.run.manifest import read_output
from flipkd.run.output import list_outputs
from flipkd.run.score import score
from flipkd.run.status import status
from flipkd.run.store_folder import sealed_header
from flipkd.vectors.cache import open_cache
from flipkd.vectors.mapped import map_file
from flipkd.vectors.rows import VectorRows
from flipkd.vectors.segment_files import segment_paths
from tests.run.conftest import World
from tests.run.test_kill import contents

RECORDS, UNITS, ROWS = 200, 12, 40


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's flushes are not what is tested."""
    monkeypatch.setattr("flipkd.data.commit.sync", lambda _: None)


@pytest.fixture
def job(tmp_path: Path) -> ScoreConfig:
    """A finished job of 12 units."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((RECORDS, 32), dtype=np.float32)
    write_store(tmp_path / "store", pa.array(range(RECORDS), pa.int64()), vectors)
    (tmp_path / "pairs").mkdir()
    for number in range(UNITS):
        left, right = generator.integers(0, RECORDS + 3, (2, ROWS))
        table = pa.table({"left_id": left, "right_id": right, "name": [f"row {row}" for row in range(ROWS)]})
        pq.write_table(table, tmp_path / f"pairs/{number:02d}.parquet")
    paths = {name: str(tmp_path / name) for name in ("pairs", "store")}
    config = ScoreConfig(output=str(tmp_path / "out"), **paths)
    score(config)
    return config


def cut_end(data: bytes) -> bytes:
    return data[:-1]


def cut_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_middle(data: bytes) -> bytes:
    return data[:100] + data[200:]


def empty(data: bytes) -> bytes:
    return b""


def zero(data: bytes) -> bytes:
    return bytes(len(data))


def no_end(data: bytes) -> bytes:
    """As a file whose last block never reached the disk."""
    return data[:-512] + bytes(512)


@pytest.mark.parametrize("damage", [cut_end, cut_half, cut_middle, empty, zero, no_end])
def test_an_output_that_is_not_whole_is_made_again(
    job: ScoreConfig, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    output = Path(job.output)
    expected = contents(output)
    victim = sorted(output.glob("*.parquet"))[5]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(InputError, match=victim.name):
        status(job.output)
    manifest = score(job)
    assert f"{victim.name} of {output} is damaged; it is made again" in caplog.text
    assert (manifest["units"], manifest["units_resumed"], manifest["rows_in"]) == (UNITS, UNITS - 1, UNITS * ROWS)
    assert contents(output) == expected


def test_the_output_of_another_unit_is_made_again(job: ScoreConfig) -> None:
    expected = contents(Path(job.output))
    one, other, *_ = sorted(Path(job.output).glob("*.parquet"))
    shutil.copy(one, other)
    assert score(job)["units_resumed"] == UNITS - 1
    assert contents(Path(job.output)) == expected


def test_a_flipped_bit_is_seen_by_who_resumes_or_who_reads(job: ScoreConfig) -> None:
    """A resumed run reads the footers of finished units, no pages; these have checksums. No bit of a page goes unseen.

    The footer itself has no checksum in the format: of its bits this counts those that nobody sees.
    """
    output = Path(job.output)
    expected = contents(output)
    path = sorted(output.glob("*.parquet"))[3]
    whole, table = path.read_bytes(), pq.read_table(path)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    generator, seen = random.Random(0), Counter[str]()
    for _ in range(100):
        place = generator.randrange(len(whole))
        data = bytearray(whole)
        data[place] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        manifest = score(job)
        if manifest["units_resumed"] < UNITS:
            seen["made again"] += 1
            assert contents(output) == expected
            continue
        where = "footer" if place >= footer else "pages"
        try:
            found = read_output(open_location(output), path.name, None)
            found.validate(full=True)
            seen[f"{where}: {'the same rows' if found.equals(table) else 'other rows'}"] += 1
        except (InputError, pa.ArrowException, UnicodeDecodeError):
            seen[f"{where}: an error for who reads"] += 1
    path.write_bytes(whole)
    print(seen)
    assert seen["made again"] > 20
    assert seen["pages: an error for who reads"] > 5
    assert seen["pages: other rows"] == 0


def test_nobody_is_told_to_remove_what_cannot_be_read_now(job: ScoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = sorted(path.name for path in Path(job.output).glob("*.parquet"))[0]

    def failing(error: OSError) -> Callable[..., Any]:
        def open_file(*_: object, **__: object) -> None:
            raise error

        return open_file

    for error, way_out in (
        (OSError(errno.EMFILE, ""), "files; run again"),
        (OSError("bad"), "remove it and run again"),
    ):
        monkeypatch.setattr("flipkd.run.manifest.pq.ParquetFile", failing(error))
        with pytest.raises(InputError, match=f"{way_out}$"):
            read_output(open_location(job.output), name, None)
        monkeypatch.setattr("flipkd.vectors.mapped.mmap.mmap", failing(error))
        with pytest.raises(InputError, match="; run again$" if error.errno else "encode the records again$"):
            map_file(Path(job.output) / name, np.uint8)


@pytest.mark.parametrize("name", ["_manifest.json", ".flipkd/plan.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"])
def test_damaged_facts_are_named_and_written_again(job: ScoreConfig, name: str, content: bytes) -> None:
    path = Path(job.output) / name
    right = json.loads(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(path.name)):
        status(job.output)
    assert score(job)["units_resumed"] == UNITS
    assert set(json.loads(path.read_bytes())) == set(right)
    assert status(job.output)["state"] == "finished"


def test_temporary_files_of_killed_writers_go(job: ScoreConfig) -> None:
    output = Path(job.output)
    left = [f".x.parquet.{'0' * 32}.tmp", f"._manifest.json.{'1' * 32}.tmp", f".flipkd/.plan.json.{'2' * 32}.tmp"]
    for name in left:
        (output / name).write_bytes(b"half")
    foreign = output / ".flipkd/.notes.tmp"  # not a name of ours
    foreign.write_bytes(b"")
    assert len(list_outputs(open_location(output))[1]) == 3
    score(job)
    assert not [name for name in left if (output / name).exists()]
    assert foreign.exists()


def flips(path: Path, count: int, seed: int) -> Iterator[None]:
    """The file with one, two or three bits turned over, ``count`` times; then as it was."""
    whole, generator = path.read_bytes(), random.Random(seed)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        yield
    path.write_bytes(whole)


def test_a_store_that_cannot_be_read_now_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", pa.array(range(9), pa.int64()), np.ones((9, 8), np.float32))
    read = Path.read_bytes

    def unreadable(path: Path) -> bytes:
        if path.name == "store.json":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", unreadable)
        with pytest.raises(InputError, match=r"store\.json cannot be read"):
            sealed_header(tmp_path / "store", overwrite=False)
    assert sealed_header(tmp_path / "store", overwrite=False) is not None
    path = tmp_path / "store" / "vectors.bin"
    path.unlink()
    path.symlink_to(path)  # an error of the operating system that is none of a file that is missing
    with pytest.raises(InputError, match=r"vectors\.bin is missing or unreadable"):
        sealed_header(tmp_path / "store", overwrite=False)
    path.unlink()
    assert sealed_header(tmp_path / "store", overwrite=False) is None


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_a_damaged_store_is_an_error_or_finite_scores(tmp_path: Path, kind: str) -> None:
    """Files of a store are mapped, not read, so a flipped bit in them is not looked for; it must do no other harm."""
    generator = np.random.default_rng(1)
    numbers = generator.permutation(RECORDS)
    ids = pa.array(numbers, pa.int64()) if kind == "int64" else pa.array([f"record {number}" for number in numbers])
    vectors = generator.standard_normal((RECORDS, 16), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_store(tmp_path / "store", ids, vectors, "float32")
    (tmp_path / "pairs").mkdir()
    chosen = [ids.take(pa.array(generator.integers(0, RECORDS, 500))) for _ in range(2)]
    pq.write_table(pa.table(chosen, ["left_id", "right_id"]), tmp_path / "pairs/part.parquet")
    job = ScoreConfig(pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), store=str(tmp_path / "store"))
    outcomes = Counter[str]()
    files = sorted((tmp_path / "store").iterdir())
    assert len(files) == {"int64": 5, "string": 6}[kind]
    for number, path in enumerate(files):
        for _ in flips(path, 25, number):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            try:
                manifest = score(job)
            except FlipkdError as error:
                outcomes[f"{path.name}: error" if str(tmp_path / "store") in str(error) else str(error)] += 1
                continue
            assert manifest["rows_out"] == 500
            scores = pq.read_table(tmp_path / "out").column("score").drop_null().to_numpy()
            assert np.isfinite(scores).all()
            outcomes[f"{path.name}: rows"] += 1
    assert all(outcome.endswith(("error", "rows")) for outcome in outcomes), outcomes
    assert outcomes["store.json: error"] > 5
    assert outcomes["slots.bin: error"] > 0


def test_a_row_that_is_not_there_is_an_error_of_the_index(job: ScoreConfig, tmp_path: Path) -> None:
    path = tmp_path / "store/slots.bin"
    table = np.frombuffer(path.read_bytes(), np.uint32).reshape(-1, 16).copy()
    rows = table[:, 10:15]
    rows[rows != 0] = 2**31 + 5  # as an int32: negative, which must not pass for a record that is not there
    path.write_bytes(table.tobytes())
    shutil.rmtree(job.output)
    with pytest.raises(InputError, match=r"the id index of the store .*/store is damaged"):
        score(job)


def test_a_store_that_has_lost_a_file_is_made_again(world: World, tmp_path: Path) -> None:
    config = EncodeConfig(EncoderOptions(world.encoder), world.left, str(tmp_path / "store"))
    encode(config)
    store = tmp_path / "store"
    right = contents(store)
    for name in ("vectors.bin", "slots.bin", "store.json", "_manifest.json"):
        (store / name).write_bytes(b"")
        if name == "_manifest.json":  # as when the run is killed between its last two steps
            (store / name).unlink()
        with_damage = ScoreConfig(pairs=world.left, output=str(tmp_path / "out"), store=str(store))
        if name == "store.json":
            with pytest.raises(InputError, match=r"store\.json"):
                score(with_damage)
        manifest = encode(config)
        assert (manifest["kind"], manifest["complete"], manifest["rows_in"]) == ("encode", True, 60)
        assert contents(store) == right, name
    with pytest.raises(ConfigError, match="holds the store of another run"):
        encode(replace(config, dtype="float32"))
    newer = json.loads((store / "store.json").read_bytes()) | {"format_version": 2}
    (store / "store.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match="is of format 2"):
        encode(config)


def test_flipped_bits_of_a_cache_segment_never_give_a_wrong_vector(tmp_path: Path) -> None:
    rows = VectorRows(np.random.default_rng(0).integers(-128, 128, (50, 24)).astype(np.int8), "int8")
    texts = pa.array([f"text {number}" for number in range(50)], pa.large_string())
    cache = open_cache(tmp_path / "texts", "encoder", "int8")
    cache.put(cache.keys(texts), rows, np.zeros(50, np.uint8))
    (path,) = segment_paths(cache.folder)
    found_in_all = 0
    for _ in flips(path, 200, 3):
        fresh = open_cache(tmp_path / "texts", "encoder", "int8")
        hits = fresh.look_up(fresh.keys(texts))
        if hits.rows is not None:
            assert np.array_equal(hits.rows.values[hits.found], rows.values[hits.found])
            assert not hits.status[hits.found].any()
            found_in_all += int(hits.found.sum())
    assert found_in_all < 200 * 50
