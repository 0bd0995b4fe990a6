"""``status`` and ``status --watch``: of every kind of job, at work, ended, and broken off."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.config import EncodeConfig, EncoderOptions, RunOptions
from flipkd.data.find import Shard
from flipkd.data.location import open_location
from flipkd.distill.config import TrainConfig
from flipkd.distill.train import train
from flipkd.errors import InputError
from flipkd.models.options import StudentOptions
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.run import job as job_module
from flipkd.run import observe, unit_notes, watch
from flipkd.run.encode import encode
from flipkd.run.job import Job
from flipkd.run.lock import is_locked, locked
from flipkd.run.manifest import UnitReport
from flipkd.run.publishers import ProgressFile
from flipkd.run.status import status
from flipkd.run.units import Plan, WorkUnit
from tests.run.conftest import World
from tests.run.jobs import make_job
from tests.run.ray_cluster import wait_until

MakePairs = Callable[..., Path]
QUICK = (
    "import sys; from flipkd.run import observe, publishers; observe._TICK_S = 0.05;"
    "publishers.ProgressFile.interval_s = 0.1; from functools import partial; from flipkd.run import plan_score;"
    "from tests.run import faults; plan_score.ScoreWorker = partial(faults.FaultyWorker, 0.15, '');"
    "from flipkd.cli import main; main(sys.argv[1:])"
)
# Every stage of every kind of job; the slow tests try the ways to them that are left.
STAGES = [
    ("encode", "encode"), ("store", "score"), ("inline", "texts"), ("top-k", "candidates"), ("cache", "encode"),
    ("teach", "teach"), ("teach-ids", "join"), ("rescore", "rescore"), ("cascade", "score"), ("cascade", "rescore"),
]  # fmt: skip
OTHER_STAGES = [
    ("records", "encode"), ("records", "score"), ("inline", "encode"), ("inline", "score"), ("top-k", "score"),
    ("teach", "texts"), ("teach", "encode"),
]  # fmt: skip


@contextmanager
def broken_at(monkeypatch: pytest.MonkeyPatch, kind: str, look: Callable[[], None]) -> Iterator[None]:
    """Jobs of this kind break off after their first unit, as by a kill; ``look`` is called just before."""
    execute = job_module._execute

    def broken(job: Job, *arguments: Any) -> Iterator[UnitReport]:
        for report in execute(job, *arguments):
            yield report
            if job.kind == kind:
                look()
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "_execute", broken)
        patch.setattr(observe, "_TICK_S", 0.01)
        patch.setattr(ProgressFile, "interval_s", 0.0)
        yield


@pytest.mark.parametrize(
    ("name", "stage"), [*STAGES, *(pytest.param(*stage, marks=pytest.mark.slow) for stage in OTHER_STAGES)]
)
def test_a_job_at_work_broken_off_and_finished(
    name: str, stage: str, world: World, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(name, world, base_dir, tmp_path / "job")
    seen: list[dict[str, Any]] = []

    def look() -> None:
        def told() -> bool:
            seen.append(status(str(job.output)))
            return bool(seen[-1].get("stage") == stage and seen[-1].get("units_done"))

        wait_until(told, 10)

    with broken_at(monkeypatch, stage, look), pytest.raises(KeyboardInterrupt):
        job.run(RunOptions(threads=1))
    at_work = seen[-1]
    assert (at_work["state"], at_work["running"], at_work["stage"]) == ("unfinished", True, stage)
    assert at_work["kind"] == job.command
    assert 0 < at_work["rows_done"] <= at_work["rows"]
    assert at_work["rows_per_second"] > 0
    assert at_work["seconds_left"] is not None
    left = status(str(job.output))
    assert (left["state"], left["running"], left["error"]) == ("unfinished", False, "KeyboardInterrupt")
    assert left.get("stage", left["kind"]) == stage
    assert 0 < left["units_done"] <= left["units"]  # the unit in flight has ended too
    assert at_work["units_done"] <= left["units_done"]
    assert CliRunner().invoke(main, ["status", str(job.output), "--watch", "--interval", "0.01"]).exit_code == 1
    job.run(RunOptions(threads=1))
    found = status(str(job.output))
    assert (found["state"], found["kind"]) == ("finished", job.last)
    assert "running" not in found
    result = CliRunner().invoke(main, ["status", str(job.output), "--watch"])
    assert (result.exit_code, result.output.startswith(f"{job.last}: finished")) == (0, True)
    assert not (job.output / ".flipkd/progress").exists()


@pytest.mark.parametrize(
    ("name", "stage", "inputs"),
    [("store", "score", "ids"), ("inline", "encode", "texts"), ("teach", "encode", "texts")],
)
def test_a_finished_job_that_gets_more_input_is_unfinished_until_its_end(
    name: str,
    stage: str,
    inputs: str,
    world: World,
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its old manifest said that it was complete, to ``status`` and to whoever waits for that file."""
    job = make_job(name, world, base_dir, tmp_path / "job")
    later = sorted((tmp_path / "job" / inputs).glob("*.parquet"))[1:]
    for path in later:
        path.rename(tmp_path / path.name)
    job.run(RunOptions(threads=1))
    manifest = job.output / "_manifest.json"
    assert (status(str(job.output))["state"], status(str(job.output))["units"]) == ("finished", 1)
    for path in later:
        (tmp_path / path.name).rename(path)
    seen = []
    with broken_at(monkeypatch, stage, lambda: seen.append(manifest.exists())), pytest.raises(KeyboardInterrupt):
        job.run(RunOptions(threads=1))
    assert seen == [False]
    left = status(str(job.output))
    assert (left["state"], left["units"]) == ("unfinished", 3)
    assert CliRunner().invoke(main, ["status", str(job.output), "--watch", "--interval", "0.01"]).exit_code == 1
    job.run(RunOptions(threads=1))
    assert status(str(job.output))["state"] == "finished"


@pytest.mark.parametrize(("name", "stage"), [("rescore", "rescore"), ("cascade", "score")])
def test_a_finished_job_that_has_lost_outputs_is_unfinished_until_its_end(
    name: str, stage: str, world: World, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(name, world, base_dir, tmp_path / "job")
    job.run(RunOptions(threads=1))
    for path in sorted(job.output.glob("*.parquet"))[1:]:
        path.unlink()
    assert status(str(job.output))["state"] == "unfinished"
    with broken_at(monkeypatch, stage, lambda: None), pytest.raises(KeyboardInterrupt):
        job.run(RunOptions(threads=1))
    assert not (job.output / "_manifest.json").exists()
    job.run(RunOptions(threads=1))
    assert status(str(job.output))["state"] == "finished"


def test_a_store_that_is_made_anew_is_unfinished_until_its_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncodeConfig(EncoderOptions(world.encoder), world.left, str(tmp_path / "store"), rows_per_unit=20)
    encode(config)
    assert status(config.output)["state"] == "finished"
    anew = replace(config, dtype="float32", run=RunOptions(overwrite=True))
    with broken_at(monkeypatch, "encode", lambda: None), pytest.raises(KeyboardInterrupt):
        encode(anew)
    assert status(config.output)["state"] == "unfinished"
    encode(anew)
    assert status(config.output)["state"] == "finished"


def test_train_and_evaluate(world: World, base_dir: Path, tmp_path: Path) -> None:
    taught = make_job("teach", world, base_dir, tmp_path / "teach")
    taught.run(RunOptions(threads=1))
    student = StudentOptions(str(base_dir), layer=1, dimension=8)
    config = TrainConfig(
        pairs=str(taught.output), output=str(tmp_path / "run"), student=student, steps=3, batch_pairs=8,
        evaluate_every=3, device="cpu", run=RunOptions(threads=1),
    )  # fmt: skip
    with locked(open_location(config.output)):
        (tmp_path / "run/run.json").write_text(json.dumps({"config": {"steps": 3}}))
        assert status(config.output) == {
            "state": "unfinished", "kind": "train", "steps": 3, "steps_done": 0, "seconds": 0, "seconds_left": None,
            "last_validation": None, "running": True,
        }  # fmt: skip
    assert status(config.output)["running"] is False
    assert watch.watch(config.output, interval_s=0.01) == 1
    (tmp_path / "run/run.json").unlink()
    train(config)
    assert status(config.output)["state"] == "finished"
    assert watch.watch(config.output) == 0
    scored = make_job("inline", world, base_dir, tmp_path / "inline")
    scored.run(RunOptions(threads=1))
    evaluate(EvaluateConfig(str(scored.output), str(tmp_path / "report"), bootstrap=20))
    found = status(str(tmp_path / "report"))
    assert (found["state"], found["kind"], found["labelled"]["pairs"]) == ("finished", "evaluate", 60)
    assert watch.watch(str(tmp_path / "report")) == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"not an output of flipkd.*named by --output"):
        status(str(tmp_path / "empty"))


def test_a_job_that_has_only_just_begun(tmp_path: Path) -> None:
    with locked(open_location(tmp_path)):
        assert status(str(tmp_path)) == {"state": "unfinished", "kind": None, "running": True}


def test_looking_at_a_lock_does_not_take_it(tmp_path: Path) -> None:
    for folder in (open_location(tmp_path), open_location("memory://flipkd-watched/out")):
        assert not is_locked(folder)
        with locked(folder):
            assert is_locked(folder)
        assert not is_locked(folder)


def test_there_is_an_eta_before_the_first_unit_is_done(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cases.md 42: an ETA that moves, from rows done, from the first minute. The whole job is one unit here."""
    told: list[dict[str, Any]] = []
    publish = ProgressFile.publish

    def noted(self: ProgressFile, state: Any) -> None:
        publish(self, state)
        if state.state == "running" and state.stages:
            told.append(status(str(tmp_path / "store")))

    monkeypatch.setattr(ProgressFile, "publish", noted)
    monkeypatch.setattr(ProgressFile, "interval_s", 0.0)
    monkeypatch.setattr(observe, "_TICK_S", 0.001)
    encoder = EncoderOptions(world.encoder, max_tokens=16)
    encode(EncodeConfig(encoder, world.left, str(tmp_path / "store"), rows_per_unit=1000, run=RunOptions(threads=1)))
    assert {one["units"] for one in told} == {2}  # a unit each for the two files
    first = [one for one in told if one["units_done"] == 0 and one["seconds_left"] is not None]
    assert len({one["rows_done"] for one in first}) > 2
    assert len({one["seconds_left"] for one in first}) > 2
    rows = [one["rows_done"] for one in told]
    assert rows == sorted(rows)
    assert rows[-1] == 60


def start(world: World, pairs: Path, output: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [
            sys.executable, "-c", QUICK, "score", "--pairs", str(pairs), "--output", str(output), "--store",
            world.left_store, "--right-store", world.right_store, "--workers", "1", "--no-progress",
        ]
    )  # fmt: skip
    wait_until(lambda: (output / ".flipkd/progress/progress.json").exists(), 60)
    return process


WATCH = [sys.executable, "-m", "flipkd.cli", "status", "--watch", "--interval", "0.2"]


def test_a_job_is_followed_in_a_file_to_its_end(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    job = start(world, make_pairs(files=24), tmp_path / "out")
    lines = subprocess.run([*WATCH, str(tmp_path / "out")], capture_output=True, text=True, timeout=60, check=False)
    assert job.wait(timeout=60) == 0
    assert (lines.returncode, lines.stderr) == (0, "")
    assert "\r" not in lines.stdout
    assert "\x1b" not in lines.stdout
    shown = lines.stdout.splitlines()
    done = [int(found[1]) for line in shown if (found := re.match(r"score: (\d+) of 720 pairs, \d+ of 24 units", line))]
    assert len(set(done)) > 2
    assert any(re.search(r"\d+ pairs/s, about 00:\d\d left$", line) for line in shown)
    assert shown[-1] == "score: finished: 720 of 720 pairs, 24 of 24 units"


def test_a_job_is_followed_as_json_until_it_is_killed(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    job = start(world, make_pairs(files=100), tmp_path / "out")
    follower = subprocess.Popen([*WATCH, str(tmp_path / "out"), "--json"], stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    try:
        first = follower.stdout.readline()  # else the job may be dead before the follower has looked at it
        wait_until(lambda: len(list((tmp_path / "out").glob("*.parquet"))) > 5, 60)
        job.kill()
        job.wait()
        out, _ = follower.communicate(timeout=30)
    finally:
        job.kill()
        follower.kill()
    facts = [json.loads(line) for line in (first + out).splitlines()]
    assert follower.returncode == 1
    assert {one["state"] for one in facts[:-1]} == {"unfinished"}
    assert facts[-1]["state"] == "broken off"
    assert facts[-1]["running"] is False
    assert facts[-1]["units_done"] == len(list((tmp_path / "out").glob("*.parquet")))


def on_terminal(command: Sequence[str]) -> tuple[int, str]:
    """Runs a command with a terminal as its stdout."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, stdout=slave)
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    shown += os.read(master, 65536)
                except OSError:  # what Linux says when the other end is closed
                    break
    finally:
        process.kill()
        os.close(master)
    return process.wait(), shown.decode()


def test_a_job_is_followed_on_a_terminal(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs(files=24)
    job = start(world, pairs, tmp_path / "out")
    code, shown = on_terminal([*WATCH, str(tmp_path / "out")])
    assert job.wait(timeout=60) == 0
    assert code == 0
    assert len(set(re.findall(r"\rscore: +\d+%\|.*?\| [\d.]+/720, \d+ pairs/s, about 00:\d\d left", shown))) > 1
    assert shown.rstrip().splitlines()[-1].endswith("score: finished: 720 of 720 pairs, 24 of 24 units")
    for left in (world.texts[0][0], str(10**15)):
        assert left not in shown


def test_a_partial_job_ends_the_watch_with_its_exit_code(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs()
    (pairs / "part-001.parquet").write_bytes(b"PAR1")
    options = ["--pairs", str(pairs), "--store", world.left_store, "--output", str(tmp_path / "out"), "--no-progress"]
    assert CliRunner().invoke(main, ["score", *options, "--on-bad-shard", "skip"]).exit_code == 3
    result = CliRunner().invoke(main, ["status", "--watch", str(tmp_path / "out")])
    assert (result.exit_code, result.output) == (3, "score: partial: 90 of 90 pairs, 3 of 3 units\n")
    assert CliRunner().invoke(main, ["status", "--interval", "3", str(tmp_path / "out")]).exit_code == 2


def test_workers_of_other_processes_tell_by_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray's workers do; the files are the only thing between the two sides."""
    monkeypatch.setattr(unit_notes, "_INTERVAL_S", 0.01)
    output = open_location(tmp_path)
    shard = Shard("a.parquet", "a.parquet", 1, 1)
    units = [WorkUnit(shard, row, 100, (0, 1), 0, f"{row}.parquet", f"f{row}") for row in (0, 100, 200)]
    plan = Plan(units)
    state = observe.StageState("encode", "records", 3, plan.rows, 0)
    stage = observe.Stage(state, threading.Lock())
    with unit_notes.following_notes(output, units, stage.listener):
        told = [unit_notes.write_note(output, unit, tries=1) for unit in units[:2]]
        time.sleep(0.05)
        assert state.rows_done == 0  # begun, no more
        told[0](30, 60)
        told[1](15, 60)
        wait_until(lambda: state.rows_done == 75, 10)
        told[0](10, 60)  # a second try of a batch: not backwards
        time.sleep(0.1)
        assert state.rows_done == 75
        stage.add(UnitReport(units[0].output, 100, 100))
        time.sleep(0.1)  # its note is there yet
        assert state.rows_done == 125
    assert json.loads((tmp_path / unit_notes.note_name(units[1])).read_text()) == {"tries": 1, "done": 15, "total": 60}


@pytest.mark.slow
def test_there_is_an_eta_on_ray_before_the_first_unit_is_done(world: World, tmp_path: Path) -> None:
    """cases.md 42 on Ray, where a unit under way is in another process."""
    output = tmp_path / "store"
    copies = [table for path in sorted(Path(world.left).glob("*.parquet")) for table in [pq.read_table(path)] * 40]
    many = pa.concat_tables(copies)
    texts = [f"{text} {row}" for row, text in enumerate(many.column("text").to_pylist())]
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "records.parquet")
    job = subprocess.Popen(
        [
            sys.executable, "-m", "flipkd.cli", "encode", "--encoder", world.encoder, "--records",
            str(tmp_path / "records.parquet"), "--output", str(output), "--ray", "local", "--max-tokens", "16",
            "--no-progress",
        ]
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    try:
        wait_until(lambda: (output / ".flipkd/progress/progress.json").exists(), 60)
        while job.poll() is None:
            seen.append(status(str(output)))
            time.sleep(0.5)
    finally:
        job.kill()
    assert job.returncode == 0
    early = {one["rows_done"]: one["seconds_left"] for one in seen if one.get("units_done") == 0 and one["rows_done"]}
    assert len(early) > 1
    assert None not in early.values()
