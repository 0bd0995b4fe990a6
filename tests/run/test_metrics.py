"""Metrics: the file parses and says what the manifest says, whole under a SIGKILL; the same through Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from flipkd.cli import main
from flipkd.config import RunOptions
from flipkd.data.location import open_location
from flipkd.errors import ConfigError, InputError
from flipkd.run import metrics_file
from flipkd.run.manifest import UnitReport
from flipkd.run.observe import observed
from tests.run.conftest import World
from tests.run.jobs import NAMES, make_job
from tests.run.ray_cluster import ENVIRONMENT, RAY, free_port, wait_until

MakePairs = Callable[..., Path]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
# Writes the file as fast as it can: a kill then falls into a write, or just beside one.
BUSY_WRITER = (
    "import sys; from flipkd.run import metrics_file, observe; observe._TICK_S = 0.001;"
    "metrics_file.MetricsFile.interval_s = 0.0; from functools import partial; from flipkd.run import plan_score;"
    "from tests.run import faults; plan_score.ScoreWorker = partial(faults.FaultyWorker, 0.01, '');"
    "from flipkd.cli import main; main(sys.argv[1:])"
)


def parse(text: str, drop: tuple[str, ...] = ("batch_job",)) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key not in drop))
            assert (sample.name, labels) not in found
            found[sample.name, labels] = sample.value
    return found


def wanted(manifest: dict[str, Any], kind: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The counters of a kind, as its manifest has them; zeros are left out there."""

    def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        return f"flipkd_{name}_total", tuple(sorted({"kind": kind, **labels}.items()))

    found = {
        key("rows_read"): manifest["rows_in"],
        key("rows_written"): manifest["rows_out"],
        key("units_finished"): manifest["units"],
    }
    found.update({key("rows_unscored", reason=name): rows for name, rows in manifest["reasons"].items()})
    found.update({key("items", item=name): count for name, count in manifest["counts"].items()})
    if kind in ("candidates", "score", "teach", "rescore"):
        found[key("rows_scored")] = manifest["rows_in"] - sum(manifest["reasons"].values())
    return found


def counters(samples: Samples) -> Samples:
    """Without zeros, and without times, which a manifest rounds."""
    return {
        key: value for key, value in samples.items() if key[0].endswith("_total") and value and "seconds" not in key[0]
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_sums_are_the_manifests(name: str, world: World, base_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "night.prom"
    job = make_job(name, world, base_dir, tmp_path / "job")
    started = time.time()
    manifest = job.run(RunOptions(threads=1, metrics_file=str(path)))
    assert path.stat().st_mode & 0o777 == 0o644  # node_exporter is another user
    samples = parse(path.read_text())
    stages = {"encode_left": "encode", "encode_right": "encode"}
    expected: Counter[Any] = Counter(wanted(manifest, job.last))
    for stage, facts in manifest.get("stages", {}).items():
        expected.update(wanted(facts, stages.get(stage, stage)))
    assert counters(samples) == {key: value for key, value in expected.items() if value}
    seconds = {key[1]: value for key, value in samples.items() if key[0] == "flipkd_stage_seconds_total"}
    for stage, value in manifest["seconds"].items():
        assert seconds[("kind", job.last), ("stage", stage)] == pytest.approx(value, abs=0.001)
    assert samples["flipkd_units_planned", (("kind", job.last),)] == manifest["units"]
    assert samples["flipkd_rows_planned", (("kind", job.last),)] == manifest["rows_in"]
    assert (samples["flipkd_up", ()], samples["flipkd_complete", ()]) == (0, 1)
    assert started < samples["flipkd_start_time_seconds", ()] <= samples["flipkd_last_success_time_seconds", ()]
    assert not set(world.texts[0]) & set(path.read_text().split('"'))


def test_a_failure_keeps_the_time_of_the_last_success(
    world: World, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pairs = tmp_path / "night.prom", make_pairs()
    options = ["--pairs", str(pairs), "--store", world.left_store, "--metrics-file", str(path), "--no-progress"]

    def run(output: str, *more: str) -> int:
        return CliRunner().invoke(main, ["score", *options, "--output", str(tmp_path / output), *more]).exit_code

    assert run("a") == 0
    first = parse(path.read_text())["flipkd_last_success_time_seconds", ()]
    (pairs / "part-001.parquet").write_bytes(b"PAR1")
    assert run("b", "--on-bad-shard", "skip") == 3
    partial = parse(path.read_text())
    assert (partial["flipkd_up", ()], partial["flipkd_complete", ()]) == (0, 0)
    assert partial["flipkd_files_skipped", (("kind", "score"),)] == 1
    assert partial["flipkd_last_success_time_seconds", ()] == first

    def unreadable(*_: object) -> UnitReport:
        raise InputError("part-000.parquet: damaged")

    monkeypatch.setattr("flipkd.run.score_unit.ScoreWorker.__call__", unreadable)
    assert run("c", "--on-bad-shard", "skip") == 3
    assert parse(path.read_text())["flipkd_units_failed_total", (("kind", "score"),)] == 3
    (pairs / "part-001.parquet").unlink()
    assert run("d") == 1
    failed = parse(path.read_text())
    assert (failed["flipkd_up", ()], failed["flipkd_complete", ()]) == (0, 0)
    assert failed["flipkd_last_success_time_seconds", ()] == first


def test_the_file_is_whole_whenever_the_job_is_killed(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs, output, path = make_pairs(files=60, rows=900), tmp_path / "out", tmp_path / "night.prom"
    run = [
        sys.executable, "-c", BUSY_WRITER, "score", "--pairs", str(pairs), "--output", str(output), "--store",
        world.left_store, "--right-store", world.right_store, "--rows-per-unit", "1", "--no-progress", "--metrics-file",
        str(path), "--workers", "2",
    ]  # fmt: skip
    read, looks = 0.0, 0
    for share in (0.2, 0.5, 0.8):
        process = subprocess.Popen(run)
        try:
            while process.poll() is None and read < share * 60 * 900:
                if path.exists():
                    samples, looks = parse(path.read_text()), looks + 1
                    rows = samples.get(("flipkd_rows_read_total", (("kind", "score"),)), read)
                    assert rows >= read, "a counter fell"
                    read = rows
                    assert samples["flipkd_up", ()] == 1
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        parse(path.read_text())
        assert len(list(output.glob("*.parquet"))) < 180, "the kill came midway"
    assert looks > 20
    subprocess.run(run, check=True, timeout=120)
    samples = parse(path.read_text())
    assert samples["flipkd_rows_read_total", (("kind", "score"),)] == 60 * 900
    assert 0 < samples["flipkd_units_resumed", (("kind", "score"),)] < 180
    assert (samples["flipkd_up", ()], samples["flipkd_complete", ()]) == (0, 1)


def test_a_file_that_cannot_be_written(
    world: World,
    make_pairs: MakePairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = make_job("store", world, tmp_path, tmp_path / "job")
    for path, message in ((tmp_path / "none/x.prom", "its folder is not there"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=message):
            job.run(RunOptions(metrics_file=str(path)))
    written = []

    def full(path: str, data: bytes) -> None:
        written.append(path)
        if len(written) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics_file, "write_public_file", full)
    manifest = job.run(RunOptions(metrics_file=str(tmp_path / "x.prom")))  # the job does not fail for it
    assert manifest["complete"]
    assert caplog.text.count("MetricsFile: OSError; the job goes on") == 1
    assert len(written) > 2


@pytest.mark.slow
def test_ray_exports_what_the_manifest_says(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    port, exported = free_port(), free_port()
    head = [
        *RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=1",
        "--include-dashboard=false", "--disable-usage-stats", f"--metrics-export-port={exported}",
        "--object-store-memory=100000000", '--system-config={"metrics_report_interval_ms": 1000}',
    ]  # fmt: skip
    path = tmp_path / "night.prom"
    run = [
        sys.executable, "-m", "flipkd.cli", "score", "--pairs", str(make_pairs(files=6)), "--store", world.left_store,
        "--output", str(tmp_path / "out"), "--ray", f"127.0.0.1:{port}", "--metrics-file", str(path),
        "--log-format", "json", "--no-progress",
    ]  # fmt: skip
    scraped: Samples = {}

    def scrape() -> Samples:
        with urllib.request.urlopen(f"http://127.0.0.1:{exported}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        own = "\n".join(line for line in text.splitlines() if "ray_flipkd" in line) + "\n"
        ours = ("kind", "reason", "stage", "item")
        found: Samples = {}
        for family in text_string_to_metric_families(own):
            for sample in family.samples:
                labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key in ours))
                found[sample.name.removeprefix("ray_"), labels] = sample.value
        return found

    def all_there() -> bool:
        scraped.update(scrape())
        return ("flipkd_complete", ()) in scraped

    with open(tmp_path / "ray.log", "wb") as log:
        node = subprocess.Popen(head, stdout=log, stderr=log, start_new_session=True, env=ENVIRONMENT)
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{exported}/metrics"), 120)
        done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=True)
        wait_until(all_there, 30)
    finally:
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            process.kill()
        node.wait()
    from_file = parse(path.read_text())
    assert counters(scraped) == counters(from_file)
    assert len(counters(scraped)) >= 4
    for name in ("flipkd_units_planned", "flipkd_rows_planned"):
        assert scraped[name, (("kind", "score"),)] == from_file[name, (("kind", "score"),)]
    assert (scraped["flipkd_up", ()], scraped["flipkd_complete", ()]) == (0, 1)
    assert [json.loads(line) for line in done.stderr.splitlines()]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_a_manifest_that_cannot_be_read_at_the_end_leaves_no_observer_behind(tmp_path: Path) -> None:
    path = tmp_path / "night.prom"
    (tmp_path / "out").mkdir()
    with observed("score", RunOptions(metrics_file=str(path)), open_location(tmp_path / "out")):
        (tmp_path / "out/_manifest.json").write_text("{")
    assert parse(path.read_text())["flipkd_up", ()] == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "observer"]
