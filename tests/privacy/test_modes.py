"""Files and folders are private at the end, and from their first moment, whatever the umask and the folder."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig, TeachConfig
from flipkd.data.commit import ShardWriter, write_private_file
from flipkd.data.folders import publish_folder
from flipkd.data.location import open_location
from flipkd.distill.config import TrainConfig
from flipkd.distill.train import train
from flipkd.errors import ConfigError
from flipkd.models.export import export
from flipkd.models.llm_options import LlmOptions
from flipkd.models.options import StudentOptions
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.run.encode import encode
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score import score
from flipkd.run.teach import teach
from flipkd.vectors.cache import KEY_FILE, open_cache
from tests.privacy.canary import TEXT, World


@pytest.fixture(params=[0o000, 0o022], ids=["umask 000", "umask 022"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


@pytest.fixture
def no_chmod(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that others could read for a moment, until its mode is changed, stays readable."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, nothing)
    monkeypatch.setattr(Path, "chmod", nothing)


def everything(world: World, encoder: Path, base: Path, out: Path) -> None:
    """All jobs that write, through the library: the command line sets an umask of its own."""
    options, run = EncoderOptions(str(encoder)), RunOptions(threads=1)
    cache = str(out / "cache")
    encode(EncodeConfig(options, str(world.records), str(out / "store"), cache=cache, run=run))
    score(ScoreConfig(str(world.pairs), str(out / "by-id"), store=str(out / "store"), top_k=1, run=run))
    score(ScoreConfig(str(world.inline), str(out / "scores"), encoder=options, cache=cache, run=run))
    teach(TeachConfig(options, str(world.inline), str(out / "taught"), run=run))
    student = StudentOptions(str(base), layer=2, dimension=8, rank=4)
    steps: dict[str, Any] = {"steps": 2, "batch_pairs": 8, "evaluate_every": 1, "checkpoint_every": 1, "device": "cpu"}
    train(TrainConfig(student=student, pairs=str(out / "taught"), output=str(out / "run"), run=run, **steps))
    export(out / "run", out / "encoder")
    llm = LlmOptions(str(base), device="cpu")
    rescore(RescoreConfig(llm, str(out / "scores"), str(out / "rescored"), band=(-1, 1), run=run))
    keys = ("left_text", "right_text")
    evaluate(EvaluateConfig(str(out / "scores"), str(out / "report"), key=keys, bootstrap=5))
    evaluate(EvaluateConfig(str(out / "rescored"), str(out / "sample.parquet"), label_column="asked", sample=4))


def open_to_others(folder: Path, parents_count: bool) -> list[str]:
    """What others may read or write below a folder; with ``parents_count`` without what a closed folder hides."""
    found = []
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root) / name
            if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink():
                found.append(path.relative_to(folder).as_posix())
        if parents_count:
            folders[:] = [name for name in folders if stat.S_IMODE((Path(root) / name).stat().st_mode) & 0o077]
    return sorted(found)


OUTPUTS = ("cache", "store", "by-id", "scores", "taught", "run", "rescored")


@pytest.mark.slow  # tests of each command look at its own modes too
def test_all_that_is_written(world: World, minilm_dir: Path, base_dir: Path, tmp_path: Path, umask: int) -> None:
    out = tmp_path / "out"
    everything(world, minilm_dir, base_dir, out)
    assert sorted(path.name for path in out.iterdir()) == sorted([*OUTPUTS, "encoder", "report", "sample.parquet"])
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in [out, *out.rglob("*")]}
    wrong = {path.relative_to(tmp_path).as_posix(): oct(mode) for path, mode in modes.items()
             if mode != (0o700 if path.is_dir() else 0o600)}  # fmt: skip
    assert wrong == {}


def test_no_moment_in_which_others_can_read(
    world: World, minilm_dir: Path, base_dir: Path, tmp_path: Path, no_chmod: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With folders that are there already and open to all: then the modes of the files alone protect them."""
    out, watched = tmp_path / "out", tmp_path / "tmp"
    previous = os.umask(0)
    try:
        for folder in (out, watched, *(out / name for name in OUTPUTS)):
            folder.mkdir(mode=0o777)
        monkeypatch.setattr(tempfile, "tempdir", str(watched))
        everything(world, minilm_dir, base_dir, out)
    finally:
        os.umask(previous)
    assert open_to_others(out, parents_count=True) == sorted(OUTPUTS)
    assert open_to_others(watched, parents_count=True) == []


def test_files_for_an_object_store_wait_in_a_file_without_a_name(
    tmp_path: Path, no_chmod: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    previous = os.umask(0)
    try:
        table = pa.table({"text": [TEXT]})
        with ShardWriter(open_location("memory://privacy/out"), "a.parquet", table.schema, {}, {}) as writer:
            writer.write(table)
            assert list(tmp_path.iterdir()) == []
            assert writer._unnamed is not None
            assert stat.S_IMODE(os.fstat(writer._unnamed.fileno()).st_mode) == 0o600
            writer.commit()
    finally:
        os.umask(previous)
    assert list(tmp_path.iterdir()) == []


def test_what_a_library_writes_into_a_published_folder(tmp_path: Path, umask: int) -> None:
    def write(folder: Path) -> None:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "a/b").mkdir(parents=True)
        (folder / "a/b/c").write_text("x")

    publish_folder(tmp_path / "target", write)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {0o600}


def test_the_command_line_is_private_for_libraries_too_and_leaves_the_umask(tmp_path: Path, umask: int) -> None:
    seen: list[int] = []

    def look(*_: object, **__: object) -> Callable[[], None]:
        seen.append(os.umask(0o077))
        raise ConfigError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flipkd.run.status.status", look)
        assert CliRunner().invoke(main, ["status", str(tmp_path)]).exit_code == 2
    assert seen == [0o077]
    assert os.umask(umask) == umask


def test_a_private_file_is_private_before_it_has_its_name(tmp_path: Path, no_chmod: None) -> None:
    previous = os.umask(0)
    try:
        write_private_file(str(tmp_path / "a"), b"x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


class TestKey:
    def test_it_is_private_and_random(self, tmp_path: Path, umask: int) -> None:
        for name in ("one", "two"):
            open_cache(tmp_path / name, "encoder", "int8")
            assert stat.S_IMODE((tmp_path / name / KEY_FILE).stat().st_mode) == 0o600
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
        assert (tmp_path / "one" / KEY_FILE).read_bytes() != (tmp_path / "two" / KEY_FILE).read_bytes()

    def test_two_keys_give_one_text_two_names(self, tmp_path: Path) -> None:
        text = pa.array([TEXT], pa.large_string())
        one, two = (open_cache(tmp_path / name, "encoder", "int8") for name in ("one", "two"))
        assert one.kind.namespace == two.kind.namespace
        assert (one.keys(text) != two.keys(text)).all()
        (tmp_path / "two" / KEY_FILE).write_bytes((tmp_path / "one" / KEY_FILE).read_bytes())
        assert (one.keys(text) == open_cache(tmp_path / "two", "encoder", "int8").keys(text)).all()

    @pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
    def test_a_key_for_everybody_is_refused(self, tmp_path: Path, mode: int) -> None:
        open_cache(tmp_path, "encoder", "int8")
        (tmp_path / KEY_FILE).chmod(mode)
        with pytest.raises(ConfigError, match=rf"has mode {mode:04o}: everybody on this machine.*chmod 600"):
            open_cache(tmp_path, "encoder", "int8")
        (tmp_path / KEY_FILE).chmod(0o600)
        open_cache(tmp_path, "encoder", "int8")

    def test_a_key_for_the_group_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        open_cache(tmp_path, "encoder", "int8")
        assert not caplog.messages
        (tmp_path / KEY_FILE).chmod(0o640)
        open_cache(tmp_path, "encoder", "int8")
        assert "has mode 0640: its group can test guessed texts" in caplog.messages[0]
