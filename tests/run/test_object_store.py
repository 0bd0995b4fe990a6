"""Pairs, records and scores on a filesystem that is not a disk; the store stays local, since it is mapped."""

from __future__ import annotations

import errno
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tenacity import wait_none

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig
from flipkd.data import commit, fsspec_files
from flipkd.data.find import find_shards
from flipkd.data.fsspec_files import Handler
from flipkd.data.location import Location, open_location
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, FlipkdError, InputError, OutputError
from flipkd.run import local
from flipkd.run.encode import encode
from flipkd.run.manifest import MANIFEST
from flipkd.run.output import remove_manifest
from flipkd.run.score import score
from flipkd.run.status import status
from tests.run.conftest import World
from tests.run.test_score import read_scores

MakePairs = Callable[..., Path]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def bucket() -> Iterator[str]:
    yield "memory://flipkd-bucket"
    remote = fsspec.filesystem("memory")
    if remote.exists("/flipkd-bucket"):
        remote.rm("/flipkd-bucket", recursive=True)


@pytest.fixture(params=["memory", "local"])
def place(request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> str:
    """An object store, where folders are but names, and a filesystem of fsspec where they must be made (as on sftp)."""
    return bucket if request.param == "memory" else f"local://{tmp_path}/disk"


def remote_scores(uri: str) -> pa.Table:
    root = open_location(uri)
    tables = []
    for shard in find_shards(root):
        with root.filesystem.open_input_file(shard.path) as source:
            tables.append(pq.read_table(source))
    return pa.concat_tables(tables)


def test_the_whole_job_on_an_object_store(world: World, make_pairs: MakePairs, tmp_path: Path, place: str) -> None:
    pairs = make_pairs()
    remote, root = fsspec.core.url_to_fs(place)
    remote.put(str(pairs), f"{root}/pairs", recursive=True)
    remote.put(world.left, f"{root}/records", recursive=True)
    task = ScoreConfig(
        pairs=f"{place}/pairs",
        output=f"{place}/out",
        encoder=EncoderOptions(world.encoder),
        records=f"{place}/records",
    )
    with pytest.raises(ConfigError, match="--cache"):
        score(task)
    task = replace(task, cache=str(tmp_path / "cache"))
    assert score(task)["rows_out"] == 120
    here = replace(task, pairs=str(pairs), records=world.left, output=str(tmp_path / "out"))
    score(here)
    assert remote_scores(f"{place}/out").equals(read_scores(tmp_path / "out"))
    assert status(f"{place}/out")["state"] == "finished"
    victim = next(shard for shard in find_shards(open_location(f"{place}/out")))
    remote.rm(victim.path)
    manifest = score(task)
    assert manifest["units_resumed"] == 3
    with pytest.raises(OutputError, match="another run"):
        score(replace(task, min_score=0.5))
    assert score(replace(task, min_score=0.5, run=RunOptions(overwrite=True)))["rows_out"] < 120
    with pytest.raises(ConfigError, match="must be a local folder"):
        encode(EncodeConfig(EncoderOptions(world.encoder), world.left, f"{place}/store"))


def test_a_folder_that_lacks_outputs_has_no_manifest_there_either(place: str) -> None:
    output = open_location(f"{place}/out")
    remove_manifest(output)  # of a first run there is none, nor a folder
    commit.write_json(output, MANIFEST, {"complete": True})
    remove_manifest(output)
    assert commit.read_json(output, MANIFEST) is None


def test_an_upload_that_breaks_off_publishes_nothing(
    world: World, make_pairs: MakePairs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ScoreConfig(pairs=str(make_pairs()), output=f"{bucket}/out", store=world.left_store)

    class Broken(pa.OSFile):  # type: ignore[misc]
        def read(self, count: int | None = None) -> bytes:
            if count == 8 << 20 and self.tell():
                raise OSError("the network went away")
            return super().read(100 if count == 8 << 20 else count)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr("flipkd.data.commit.pa.OSFile", Broken)
        with pytest.raises(OutputError, match="the network went away"):
            score(task)
    assert not fsspec.filesystem("memory").glob("/flipkd-bucket/out/*.parquet")
    assert score(task)["rows_out"] == 120


def test_nothing_of_an_output_has_a_name_on_the_local_disk(
    world: World, make_pairs: MakePairs, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed job left its records in the folder for temporary files."""
    scratch, seen, upload = tmp_path / "scratch", [], commit._upload
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def look(path: str, target: Location) -> None:
        seen.append(list(scratch.iterdir()))
        upload(path, target)

    monkeypatch.setattr(commit, "_upload", look)
    assert score(ScoreConfig(str(make_pairs()), f"{bucket}/out", store=world.left_store))["complete"]
    assert seen
    assert not any(seen)


def test_input_of_the_same_size_that_has_changed_is_noticed(
    world: World, make_pairs: MakePairs, tmp_path: Path, bucket: str
) -> None:
    """Most filesystems of fsspec call the time of the last change otherwise than pyarrow's."""
    pairs = next(make_pairs(files=1).glob("*.parquet"))
    remote = fsspec.filesystem("memory")
    remote.put(str(pairs), "/flipkd-bucket/pairs/a.parquet")
    (shard,) = find_shards(open_location(f"{bucket}/pairs"))
    assert abs(shard.modified_ns / 1e9 - time.time()) < 60
    task = ScoreConfig(f"{bucket}/pairs", str(tmp_path / "out"), store=world.left_store, right_store=world.right_store)
    assert score(task)["complete"]
    assert score(task)["units_resumed"] == 1
    with ShardReader(open_location(f"{bucket}/pairs"), shard) as reader:
        remote.put(str(pairs), "/flipkd-bucket/pairs/a.parquet")
        modified = remote.store["/flipkd-bucket/pairs/a.parquet"].created + timedelta(seconds=2)
        remote.store["/flipkd-bucket/pairs/a.parquet"].created = modified
        with pytest.raises(InputError, match="has changed since it was listed"):
            list(reader.all_batches(["left_id"], 1000))
    with pytest.raises(OutputError, match="or of input that has changed since"):
        score(task)


@pytest.mark.parametrize(
    "told",
    [{"LastModified": NOW}, {"last_modified": NOW}, {"updated": NOW.isoformat()}, {"mtime": NOW.timestamp()}],
    ids=lambda told: next(iter(told)),
)
def test_when_a_file_has_changed(told: dict[str, object]) -> None:
    info = Handler._create_file_info("a", {"size": 1, "type": "file", **told})
    assert info.mtime == NOW


def test_a_filesystem_that_tells_no_times_is_warned_of(
    make_pairs: MakePairs, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec.filesystem("memory").put(str(make_pairs()), "/flipkd-bucket/pairs", recursive=True)
    find_shards(open_location(f"{bucket}/pairs"))
    assert not caplog.records
    monkeypatch.setattr(fsspec_files, "changed_at", lambda info: None)
    find_shards(open_location(f"{bucket}/pairs"))
    assert f"{bucket}/pairs: this filesystem does not tell when files have changed" in caplog.text


@pytest.mark.parametrize(
    ("method", "part", "error", "message"),
    [
        ("info", "pairs", InputError, "cannot look at memory://flipkd-bucket/pairs: Permission denied"),
        ("find", "pairs", InputError, "cannot list memory://flipkd-bucket/pairs: Permission denied"),
        ("_open", "lock", OutputError, "cannot read memory://flipkd-bucket/out/.flipkd/lock: Permission denied"),
        ("find", "out", OutputError, "cannot list memory://flipkd-bucket/out: Permission denied"),
        ("_open", "_manifest.json", InputError, "cannot read memory://flipkd-bucket/out/_manifest.json: Perm[a-z ]*$"),
    ],
)
def test_what_may_not_be_read_is_named(
    world: World, make_pairs: MakePairs, bucket: str, monkeypatch: pytest.MonkeyPatch,
    method: str, part: str, error: type[FlipkdError], message: str,
) -> None:  # fmt: skip
    remote = fsspec.filesystem("memory")
    remote.put(str(make_pairs()), "/flipkd-bucket/pairs", recursive=True)
    task = ScoreConfig(
        f"{bucket}/pairs", f"{bucket}/out", store=world.left_store, right_store=world.right_store,
        run=RunOptions(overwrite=True),
    )  # fmt: skip
    score(task)
    remote.touch("/flipkd-bucket/out/.flipkd/lock")
    monkeypatch.setattr("flipkd.run.lock._UNCHANGED_S", 0.1)  # it is a dead job's
    allowed = getattr(type(remote), method)

    def refusing(self: object, path: str, *arguments: object, **options: object) -> object:
        if part in path and options.get("mode", "rb") == "rb":
            raise PermissionError(13, "no key for you")
        return allowed(self, path, *arguments, **options)

    monkeypatch.setattr(type(remote), method, refusing)
    with pytest.raises(error, match=message):
        status(f"{bucket}/out") if "manifest" in part else score(task)


@pytest.mark.parametrize("when", ["opened", "read"])
@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many"), OSError("AWS Error SLOW_DOWN: 503")])
def test_an_output_that_cannot_be_read_now_stays(
    world: World, make_pairs: MakePairs, bucket: str, monkeypatch: pytest.MonkeyPatch, when: str, error: OSError
) -> None:
    """A store that was too busy to answer lost the finished outputs that it was asked for."""
    task = ScoreConfig(str(make_pairs()), f"{bucket}/out", store=world.left_store, right_store=world.right_store)
    score(task)
    remote = fsspec.filesystem("memory")
    before = {path: remote.cat(path) for path in remote.glob("/flipkd-bucket/out/*.parquet")}
    victim, opened = min(before), type(remote)._open

    class Busy(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise error

    def refusing(self: object, path: str, *arguments: object, **options: object) -> object:
        if path != victim:
            return opened(self, path, *arguments, **options)
        if when == "opened":
            raise error
        return Busy(before[path])

    with monkeypatch.context() as patch:
        patch.setattr(type(remote), "_open", refusing)
        with pytest.raises(InputError, match=rf"^cannot read {bucket}/out/{Path(victim).name}: .*; run again$"):
            score(task)
    assert {path: remote.cat(path) for path in remote.glob("/flipkd-bucket/out/*.parquet")} == before
    assert score(task)["units_resumed"] == len(before)


def test_a_read_that_broke_off_is_tried_again(
    world: World, make_pairs: MakePairs, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fsspec.filesystem("memory")
    remote.put(str(make_pairs()), "/flipkd-bucket/pairs", recursive=True)
    opened, failed = type(remote)._open, []

    def breaking_off(self: object, path: str, *arguments: object, **options: object) -> object:
        if threading.current_thread().name.startswith("unit") and path not in failed:
            failed.append(path)
            raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
        return opened(self, path, *arguments, **options)

    monkeypatch.setattr(type(remote), "_open", breaking_off)
    monkeypatch.setattr(local, "_WAIT", wait_none())
    task = ScoreConfig(f"{bucket}/pairs", str(tmp_path / "out"), store=world.left_store, right_store=world.right_store)
    with pytest.raises(InputError, match=r"cannot read .* Connection reset by peer"):
        score(replace(task, run=RunOptions(max_retries=0)))
    failed.clear()
    assert score(task)["complete"]
    assert len(failed) == 4
