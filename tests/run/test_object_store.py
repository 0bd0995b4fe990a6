"""Pairs, records and scores on a filesystem that is not a disk; the store stays local, since it is mapped."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig
from flipkd.data import commit
from flipkd.data.find import find_shards
from flipkd.data.location import Location, open_location
from flipkd.errors import ConfigError, OutputError
from flipkd.run.encode import encode
from flipkd.run.pipeline import score
from flipkd.run.status import status
from tests.run.conftest import World
from tests.run.test_score import read_scores

MakePairs = Callable[..., Path]


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
