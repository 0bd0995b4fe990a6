"""No word of a record gets out: every command, in this process, whether it ends well or not, with debug logs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.errors import FlipkdError
from tests.privacy.canary import ID, ID_WORD, TEXT, TEXT_WORD, World, files, leaks, make_world, words_in, write

Invoke = Callable[..., str]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """said("score", ..., code=1) runs a command in a watched folder and gives what it printed, logged and raised."""
    watched, here = tmp_path / "tmp", tmp_path / "cwd"
    watched.mkdir()
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(watched))
    monkeypatch.setenv("TMPDIR", str(watched))
    monkeypatch.chdir(here)
    caplog.set_level(logging.DEBUG)
    errors: list[str] = []
    invoke = click.Group.invoke

    def noted(self: click.Group, ctx: click.Context) -> object:
        """An error of flipkd's with all that led to it: what a script that calls the library would print."""
        try:
            return invoke(self, ctx)
        except FlipkdError as error:
            errors.append("".join(traceback.format_exception(error)))
            raise

    monkeypatch.setattr(click.Group, "invoke", noted)

    def run(*words: object, code: int = 0) -> str:
        caplog.clear()
        done = CliRunner().invoke(main, [*map(str, words), "--log-level", "debug"])
        raised = "" if done.exc_info is None else "".join(traceback.format_exception(*done.exc_info))
        told = done.output + caplog.text + repr(caplog.records) + raised + "".join(errors)
        assert done.exit_code == code, told
        assert not words_in(told)
        return done.output

    yield run
    assert not leaks(watched)
    assert not leaks(here)


def test_the_search_finds_every_form(tmp_path: Path) -> None:
    for data in (TEXT.encode("utf-16-le"), b"x" + TEXT.upper().encode("utf-16-be"), TEXT.encode().hex().encode()):
        assert words_in(data) == {TEXT_WORD}
    assert words_in(json.dumps({"id": [ID]})) == {ID_WORD}
    pq.write_table(pa.table({"text": [TEXT] * 100}), tmp_path / "packed.parquet", compression="zstd")
    write(tmp_path / "deep/er/statistics", other=[1])
    assert leaks(tmp_path) == {"packed.parquet": {TEXT_WORD}}
    assert leaks(tmp_path, ["*.parquet"]) == {}
    assert leaks(tmp_path, ["deep/**/*.parquet"]) != {}


def test_encode_score_and_forget(said: Invoke, world: World, minilm_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cached = ["--encoder", minilm_dir, "--records", world.records, "--cache", out / "cache"]
    metrics = {name: out / f"metrics/{name}.prom" for name in ("encode", "score", "inline")}  # searched below too
    (out / "metrics").mkdir(parents=True)
    said("encode", *cached, "--output", out / "store", "--metrics-file", metrics["encode"])
    said("encode", *cached, "--output", out / "store", "--json")  # done already
    by_id = ["--store", out / "store", "--pairs", world.pairs]
    said("score", *by_id, "--output", out / "all", "--threshold", "0.5", "--metrics-file", metrics["score"])
    said("score", *by_id, "--output", out / "min", "--min-score", "0.1", "--columns", "n,score")
    said("score", *by_id, "--output", out / "top", "--top-k", "1", "--columns", "score")
    said("score", *by_id, "--output", out / "dry", "--dry-run", "--json")
    said("score", *cached, "--pairs", world.pairs, "--output", out / "whole", "--columns", "score,reason")
    inline = ["--encoder", minilm_dir, "--pairs", world.inline]
    said("score", *inline, "--output", out / "inline", "--metrics-file", metrics["inline"])
    said("score", *inline, "--output", out / "inline-score", "--columns", "score", "--cache", out / "cache")
    for name in ("store", "all", "inline"):
        said("status", out / name)
        said("status", out / name, "--json")
    assert all("flipkd_" in path.read_text() for path in metrics.values())
    # Ids stand in a store's index, and in outputs where they are passed through; texts in what passes texts through.
    found = leaks(out)
    stores = {name for name in found if name.endswith("ids.bin")}
    assert all(found[name] == {ID_WORD} for name in stores)
    assert {name.split("/")[0] for name in stores} == {"store", "cache"}
    others = {name.split("/")[0]: words for name, words in found.items() if name not in stores}
    assert others == {"all": {ID_WORD}, "inline": {TEXT_WORD}}

    said("encode", *cached, "--output", out / "store", "--forget", world.ids)
    assert {name.split("/")[0] for name in leaks(out)} == {"all", "inline"}


def test_the_passed_through_columns_have_no_statistics(
    said: Invoke, world: World, minilm_dir: Path, tmp_path: Path
) -> None:
    said("score", "--encoder", minilm_dir, "--pairs", world.inline, "--output", tmp_path / "out")
    for path in (tmp_path / "out").glob("*.parquet"):
        footer = pq.read_metadata(path)
        assert not words_in(repr(footer.metadata))
        group = footer.row_group(0)
        assert all(group.column(place).statistics is None for place in range(footer.num_columns))


def test_teach_train_export_rescore_and_evaluate(
    said: Invoke, world: World, minilm_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said("teach", "--teacher", minilm_dir, "--pairs", world.inline, "--output", out / "taught")
    by_id = ["--pairs", world.pairs, "--records", world.records]
    said("teach", "--teacher", minilm_dir, *by_id, "--output", out / "taught-ids", "--cache", out / "cache")
    student = ["--student", base_dir, "--layer", "2", "--dimension", "8", "--rank", "4", "--threads", "1"]
    training = ["--steps", "2", "--batch-pairs", "8", "--evaluate-every", "1", "--checkpoint-every", "1"]
    said("train", *student, "--pairs", out / "taught", "--output", out / "run", *training)
    said("status", out / "run")
    said("export", "--run", out / "run", "--output", out / "encoder")
    said("score", "--encoder", out / "encoder", "--pairs", world.inline, "--output", out / "scores")
    asked = ["--scores", out / "scores", "--llm", base_dir, "--band", "-1:1"]
    said("rescore", *asked, "--output", out / "rescored")
    said("rescore", *asked, "--output", out / "dry", "--dry-run", "--json")
    labelled = ["--scores", out / "scores", "--key", "left_text,right_text", "--bootstrap", "10"]
    said("evaluate", *labelled, "--output", out / "report", "--slice", "left_text", code=2)  # a key is no slice
    said("evaluate", *labelled, "--output", out / "report", "--slice", "label")
    said("evaluate", *labelled, "--output", out / "shown", "--show-examples", "40")
    said("evaluate", "--scores", out / "rescored", "--output", out / "sample.parquet", "--sample", "48",
         "--label-column", "asked")  # fmt: skip
    found = leaks(out)
    places = {name.split("/")[0] for name in found}
    assert places == {"taught", "taught-ids", "scores", "rescored", "shown", "sample.parquet"}
    assert {name for name in found if name.startswith("shown/")} == {"shown/report.html"}
    assert all(name.endswith(".parquet") for name in found if not name.startswith("shown/"))


FAILING = {
    "conflicting records": "stands twice with different texts",
    "bad shard": "cannot read",
    "missing column": "has no column",
    "ids of another type": "cast one of them",
    "a label that is a text": "is neither 0 nor 1",
    "a score that is a text": "score",
    "a weight that is a text": "weights are numbers",
    "a teacher score that is a text": "teacher_score",
    "an llm score that is a text": "not a floating point number",
    "a stratum that is a text": "must be numbers",
    "a list": "no plain text form",
    "a calibration that is none": "expected a JSON object",
    "a combination that is none": "expected a _combination.json",
    "a prompt with a placeholder": "placeholder",
    "records with a floating id": "id",
}


@pytest.mark.parametrize("kind", FAILING)
def test_errors_hold_no_word_of_a_record(
    said: Invoke, world: World, minilm_dir: Path, base_dir: Path, tmp_path: Path, kind: str
) -> None:
    out, spoiled = tmp_path / "out", tmp_path / "in/spoiled/0.parquet"
    inline = ["score", "--encoder", minilm_dir, "--pairs", world.inline, "--output", out]
    by_id = ["score", "--encoder", minilm_dir, "--records", world.records, "--pairs", spoiled, "--output", out]
    scores = ["--scores", spoiled, "--output", out]
    code = 1
    if kind == "conflicting records":
        write(world.records / "2.parquet", id=[ID], text=[TEXT + " again"])
        command: list[object] = [*by_id[:-4], "--pairs", world.pairs, "--output", out]
    elif kind == "bad shard":
        whole = next(world.records.iterdir())
        whole.write_bytes(whole.read_bytes()[:-20])
        command = [*by_id[:-4], "--pairs", world.pairs, "--output", out]
    elif kind == "missing column":
        write(spoiled, left_id=[ID], text=[TEXT])
        command, code = by_id, 2
    elif kind == "ids of another type":
        write(spoiled, left_id=[1], right_id=[ID])
        command, code = by_id, 2
    elif kind == "a label that is a text":
        write(spoiled, left_text=[TEXT], right_text=[TEXT], label=[TEXT])
        command = ["teach", "--teacher", minilm_dir, "--pairs", spoiled, "--output", out]
    elif kind == "a score that is a text":
        write(spoiled, left_id=[ID], right_id=[ID], label=[1], score=[TEXT])
        command, code = ["evaluate", *scores], 2
    elif kind == "a weight that is a text":
        write(spoiled, left_id=[ID], right_id=[ID], label=[1], score=[0.5], w=[TEXT])
        command, code = ["evaluate", *scores, "--weight-column", "w"], 2
    elif kind == "a teacher score that is a text":
        write(spoiled, left_text=[TEXT], right_text=[TEXT], teacher_score=[TEXT])
        command, code = ["train", "--student", base_dir, "--pairs", spoiled, "--output", out], 2
    elif kind == "an llm score that is a text":
        write(spoiled, left_text=[TEXT], right_text=[TEXT], score=[TEXT])
        command, code = ["rescore", "--llm", base_dir, "--band", "0:1", *scores], 2
    elif kind == "a stratum that is a text":
        write(spoiled, left_id=[ID], right_id=[ID], score=[0.5])
        labels = write(
            tmp_path / "in/labels.parquet", label=[1], score=[0.5], sample_stratum=[TEXT], sample_stratum_rows=[1]
        )
        command, code = ["evaluate", *scores, "--labels", labels], 2
    elif kind == "a list":
        write(spoiled, left_text=[[TEXT]], right_text=[[TEXT]])
        command, code = [*inline[:3], "--pairs", spoiled, "--output", out], 2
    elif kind == "a calibration that is none":
        (tmp_path / "in/c.json").write_text(json.dumps({"slope": TEXT, "intercept": ID}))
        command, code = [*inline, "--calibration", tmp_path / "in/c.json"], 2
    elif kind == "a combination that is none":
        write(spoiled, left_text=[TEXT], right_text=[TEXT], score=[0.5])
        (tmp_path / "in/c.json").write_text(json.dumps({"kind": TEXT}))
        command, code = ["rescore", "--llm", base_dir, "--band", "0:1", *scores, "--combine", tmp_path / "in/c.json"], 2
    elif kind == "a prompt with a placeholder":
        write(spoiled, left_text=[TEXT], right_text=[TEXT], score=[0.5])
        (tmp_path / "in/prompt.txt").write_text(f"{{left}} {{right}} {{{TEXT}}}?")
        command, code = ["rescore", "--llm", base_dir, "--band", "0:1", *scores, "--labels", "yes,no",
                         "--prompt-file", tmp_path / "in/prompt.txt"], 2  # fmt: skip
    else:
        write(spoiled, id=[1.5], text=[TEXT])
        command, code = ["encode", "--encoder", minilm_dir, "--records", spoiled, "--output", out], 2
    assert FAILING[kind] in said(*command, code=code)
    # What a store in the making needs of ids; the next run takes it up.
    assert not leaks(out, [".flipkd/store-*/**/*.parquet", ".flipkd/store-*/**/ids.bin"])


def test_what_is_not_utf8_is_counted_and_not_quoted(said: Invoke, minilm_dir: Path, tmp_path: Path) -> None:
    values = pa.array([b"\xff" + TEXT.encode(), TEXT.encode()], pa.binary()).cast(pa.string(), safe=False)
    write(tmp_path / "in/pairs/0.parquet", left_text=values, right_text=["a", "b"])
    options = ["--pairs", tmp_path / "in/pairs", "--output", tmp_path / "out", "--columns", "score,reason"]
    assert "1 invalid_text" in said("score", "--encoder", minilm_dir, *options)
    assert not leaks(tmp_path / "out")


def test_a_skipped_shard_is_named_and_not_quoted(said: Invoke, world: World, minilm_dir: Path, tmp_path: Path) -> None:
    (world.inline / "1.parquet").write_bytes(b"PAR1" + TEXT.encode() * 50)
    options = ["--pairs", world.inline, "--output", tmp_path / "out", "--columns", "score", "--on-bad-shard", "skip"]
    metrics = tmp_path / "skipped.prom"
    said("score", "--encoder", minilm_dir, *options, "--metrics-file", metrics, code=3)
    assert "1.parquet" in (tmp_path / "out/_manifest.json").read_text()
    assert not leaks(tmp_path / "out")
    assert not words_in(metrics.read_text())


def test_an_unexpected_error_shows_its_place_alone(
    said: Invoke, world: World, minilm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError(f"no such key: {TEXT} of {ID}")

    monkeypatch.setattr("flipkd.run.score_unit.assemble", broken)
    options = ["--encoder", minilm_dir, "--pairs", world.inline, "--output", tmp_path / "out"]
    metrics = tmp_path / "broken.prom"
    told = said("score", *options, "--metrics-file", metrics, code=1)
    assert "builtins.KeyError in run/score_unit.py:" in told
    assert not words_in(metrics.read_text())


KILLED = """
import os, signal, sys
from flipkd.cli import main
from flipkd.run import score_unit

def call(self, unit):
    os.kill(os.getpid(), signal.SIGKILL)
score_unit.ScoreWorker.__call__ = call
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_job_leaves_texts_in_its_work_folder_alone(
    world: World, minilm_dir: Path, tmp_path: Path, said: Invoke
) -> None:
    """Texts of inline pairs are kept there while a job runs; the next run takes them up, and removes them."""
    options = ["--encoder", str(minilm_dir), "--pairs", str(world.inline), "--output", str(tmp_path / "out")]
    options += ["--columns", "score"]
    command = [sys.executable, "-c", KILLED, "score", *options, "--log-level", "debug"]
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir(), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path / "cwd", env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not words_in(done.stdout + done.stderr)
    left = leaks(tmp_path / "out")
    assert left
    assert all(name.startswith(".flipkd/work-") and name.endswith(".parquet") for name in left)
    assert all(path.stat().st_mode & 0o077 == 0 for path in files(tmp_path / "out"))
    said("score", *options)
    assert not leaks(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")


def test_worlds_have_the_canary_once_a_side(world: World, icd9: list[tuple[str, str, str]], tmp_path: Path) -> None:
    assert set(leaks(tmp_path / "in")) == {"records/0.parquet", "pairs/0.parquet", "inline/0.parquet", "ids.txt"}
    again = make_world(tmp_path / "again", icd9)
    assert pq.read_table(again.pairs).equals(pq.read_table(world.pairs))
