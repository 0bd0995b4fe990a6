"""The same job on Ray: the same bytes, with nodes and workers killed, and a clear end where nothing can run.

Clusters are real: three ``ray start`` nodes on this machine, the head without CPUs, as in ``cluster.yaml``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig
from flipkd.errors import ClusterError, ConfigError, FlipkdError
from flipkd.models.llm_options import LlmOptions
from flipkd.run.encode import encode
from flipkd.run.ray_session import ray_session
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score import score
from tests.run.conftest import RECORDS, World, record_id
from tests.run.faults import QUOTED
from tests.run.ray_cluster import ENVIRONMENT, Cluster, free_port, running_cluster, wait_until, worker_log
from tests.run.test_kill import contents

MakePairs = Callable[..., Path]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def command(
    world: World, pairs: Path, output: Path, *options: str, delay_s: float = 0.0, dies_at: str = "", fault: str = ""
) -> list[str]:
    return [
        sys.executable, "-m", "tests.run.faults", str(delay_s), f"kill:{dies_at}" if dies_at else fault,
        "score", "--pairs", str(pairs), "--output", str(output),
        "--store", world.left_store, "--right-store", world.right_store, "--no-progress", *options,
    ]  # fmt: skip


def local_run(world: World, pairs: Path, output: Path) -> dict[str, str]:
    score(ScoreConfig(pairs=str(pairs), output=str(output), store=world.left_store, right_store=world.right_store))
    return contents(output)


@pytest.mark.slow
def test_a_node_is_killed_midway_and_the_bytes_are_the_same(
    world: World, make_pairs: MakePairs, cluster: Cluster, tmp_path: Path
) -> None:
    pairs = make_pairs(files=40, rows=2000)
    expected = local_run(world, pairs, tmp_path / "undisturbed")
    assert len(expected) == 40
    output = tmp_path / "out"
    process = subprocess.Popen(command(world, pairs, output, "--ray", cluster.address, delay_s=0.3), env=ENVIRONMENT)
    wait_until(lambda: len(list(output.glob("*.parquet"))) >= 10, 90)
    cluster.kill(cluster.nodes[2])
    assert len(list(output.glob("*.parquet"))) < 40, "the kill came midway"
    assert process.wait(timeout=240) == 0
    assert contents(output) == expected


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver(
    world: World, make_pairs: MakePairs, cluster: Cluster, tmp_path: Path
) -> None:
    """Daft#3576."""
    pairs = make_pairs(files=30, rows=2000)
    expected = local_run(world, pairs, tmp_path / "undisturbed")
    output = tmp_path / "out"
    run = command(world, pairs, output, "--ray", cluster.address, delay_s=0.3)
    process = subprocess.Popen(run, env=ENVIRONMENT)
    wait_until(lambda: len(list(output.glob("*.parquet"))) >= 4, 90)
    victim, *_ = cluster.unit_workers()
    victim.send_signal(signal.SIGKILL)
    wait_until(lambda: len(list(output.glob("*.parquet"))) >= 12, 90)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(output.glob("*.parquet"))) < 30, "the kill came midway"
    subprocess.run(run, check=True, timeout=240, env=ENVIRONMENT)
    assert contents(output) == expected


@pytest.mark.slow
def test_encode_and_inline_texts_on_ray_give_the_bytes_of_one_process(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "pairs").mkdir()
    for file in range(3):
        rows = range(file * 10, file * 10 + 20)
        columns = {
            "left_text": [world.texts[0][row] for row in rows],
            "right_text": [world.texts[1][row] for row in rows],
        }
        pq.write_table(pa.table(columns), tmp_path / f"pairs/{file}.parquet")
    options = {"pairs": str(tmp_path / "pairs"), "encoder": EncoderOptions(world.encoder)}
    score(ScoreConfig(output=str(tmp_path / "here"), **options))  # type: ignore[arg-type]
    run = [
        sys.executable, "-m", "flipkd.cli", "score", "--pairs", str(tmp_path / "pairs"), "--encoder", world.encoder,
        "--output", str(tmp_path / "there"), "--ray", cluster.address, "--no-progress",
    ]  # fmt: skip
    subprocess.run(run, check=True, timeout=240, env=ENVIRONMENT)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    # A worker puts its texts into the cache; the next job's worker finds them there.
    encoded = []
    for name in ("cached", "again"):
        run[run.index("--output") + 1] = str(tmp_path / name)
        cached = [*run, "--cache", str(tmp_path / "cache"), "--json"]
        done = subprocess.run(cached, check=True, timeout=240, env=ENVIRONMENT, capture_output=True, text=True)
        encoded.append(json.loads(done.stdout)["stages"]["encode"]["counts"])
        assert contents(tmp_path / name) == contents(tmp_path / "here")
    assert encoded[0]["encoded_texts"] == encoded[1]["cached_texts"] == encoded[0]["distinct_texts"]
    assert "encoded_texts" not in encoded[1]


def test_ray_local_gives_the_same_bytes_and_json_logs(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """What workers log stands in Ray's own files, an object a line, and quotes no record; see ``worker_log``."""
    pairs = make_pairs(files=6)
    expected = local_run(world, pairs, tmp_path / "undisturbed")
    logs = ("--log-format", "json", "--log-level", "debug")
    run = command(world, pairs, tmp_path / "out", "--ray", "local", *logs, fault="tell:part-003")
    # Its name is short, as paths of sockets are bounded.
    with tempfile.TemporaryDirectory(prefix="fk-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder}
        done = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        told = worker_log(Path(folder))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert not [path for path in files if QUOTED.encode() in path.read_bytes()]
    assert contents(tmp_path / "out") == expected
    assert all(isinstance(json.loads(line), dict) for line in done.stderr.splitlines())
    by_logger = {one["logger"]: one for one in told}
    assert any(name.startswith("ray.data") for name in by_logger)  # what Ray itself says in a worker
    assert "RuntimeWarning: a library is unhappy" in by_logger["py.warnings"]["message"]
    assert {one["message"] for one in told if one["logger"] == "library"} == {"two\nlines", "it failed"}
    assert by_logger["library"]["exception"][-1] == "ValueError"
    assert QUOTED not in done.stdout + done.stderr


@pytest.mark.slow
def test_no_free_cpu_ends_within_the_stated_time(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """ray#41029."""
    run = command(
        world, make_pairs(), tmp_path / "out", "--ray", "local", "--threads", "1000", "--start-timeout-s", "5"
    )
    started = time.monotonic()
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "no Ray worker could start within --start-timeout-s 5" in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_ends_the_job(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """ray#52815."""
    pairs, output = make_pairs(), tmp_path / "out"
    options = ("--ray", "local", "--max-retries", "1")
    run = command(world, pairs, output, *options, dies_at="part-002")
    done = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "the worker died 2 times, more than --max-retries 1 allows, at part-002.parquet" in done.stderr
    assert "Traceback" not in done.stderr
    subprocess.run(command(world, pairs, output, *options), check=True, timeout=180, env=ENVIRONMENT)
    assert contents(output) == local_run(world, pairs, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_unit_that_hangs_ends_the_job(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    run = command(world, make_pairs(), tmp_path / "out", "--ray", "local", "--stall-timeout-s", "8", delay_s=1000)
    started = time.monotonic()
    done = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "no unit finished for --stall-timeout-s 8" in done.stderr
    assert time.monotonic() - started < 90


def test_an_address_without_a_cluster_is_a_clear_error(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    run = command(world, make_pairs(), tmp_path / "out", "--ray", f"127.0.0.1:{free_port()}")
    done = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "cannot join the cluster" in done.stderr


def test_record_ids_of_the_world_are_what_the_pairs_name(world: World) -> None:
    table = pq.read_table(world.left)
    assert sorted(table.column("id").to_pylist()) == [record_id(row) for row in range(RECORDS)]
    assert np.allclose(np.linalg.norm(world.vectors[0], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "room", "units", "size"),
    [
        ({}, 4, 100, (1, 4)),
        ({}, 0, 100, (1, 1)),
        ({"workers": 64}, 4, 100, (1, 64)),
        ({"min_workers": 8}, 2, 100, (8, 8)),  # a cluster that has yet to grow
        ({"min_workers": 8, "workers": 64}, 2, 100, (8, 64)),
        ({"min_workers": 8, "workers": 64}, 2, 5, (5, 5)),
    ],
    ids=str,
)
def test_workers_that_must_start_and_may_start(
    options: dict[str, int], room: int, units: int, size: tuple[int, int]
) -> None:
    from flipkd.run.cluster import pool_size

    assert pool_size(RunOptions(**options), room, units) == size


def test_a_worker_takes_a_gpu_where_its_model_may_be_on_one(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flipkd.run import cluster

    resources = {"CPU": 4.0, "GPU": 2.0}
    assert [cluster.gpus_of_a_worker(RunOptions(), may, resources) for may in (True, False)] == [1, 0]
    assert cluster.gpus_of_a_worker(RunOptions(), True, {"CPU": 4.0}) == 0
    assert cluster.gpus_of_a_worker(RunOptions(gpus=0.5), False, resources) == 0.5

    told = []

    def refuse(*_: object, may_use_gpu: bool, **__: object) -> None:
        told.append(may_use_gpu)
        raise ClusterError("not here")

    pairs, run = make_pairs(), RunOptions(ray="local")
    scores = ScoreConfig(str(pairs), str(tmp_path / "scores"), store=world.left_store, threshold=0.5)
    score(scores)
    monkeypatch.setattr(cluster, "run_cluster", refuse)
    sides = {"records": world.left, "right_records": world.right}
    for device in ("auto", "cpu"):
        encoder, llm = EncoderOptions(world.encoder, device=device), LlmOptions(str(llm_dir), device=device)
        jobs: list[Any] = [
            lambda encoder=encoder: encode(EncodeConfig(encoder, world.left, str(tmp_path / "store"), run=run)),
            lambda llm=llm: rescore(
                RescoreConfig(
                    llm, scores.output, str(tmp_path / "out"), **sides, band=(0.0, 1.0), threshold=0.5, run=run
                )
            ),
        ]
        for job in jobs:
            with pytest.raises(ClusterError, match="not here"):
                job()
    assert told == [True, True, False, False]


@pytest.mark.slow
def test_ray_that_was_started_here_ends_with_the_outermost_session(
    world: World, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flipkd.run.cluster import ray

    starts, init, pairs = [], ray.init, str(make_pairs(files=6))

    def counted(**options: Any) -> Any:
        starts.append(options["address"])
        return init(**options)

    monkeypatch.setattr(ray, "init", counted)
    stores = {"store": world.left_store, "right_store": world.right_store}
    local = RunOptions(ray="local")
    with ray_session():  # as of a night
        for name in ("one", "two"):
            score(ScoreConfig(pairs, str(tmp_path / name), **stores, run=local))
            assert ray.is_initialized()
        with pytest.raises(
            ConfigError, match="connected to the cluster local already; pass --ray auto to use that one"
        ):
            score(ScoreConfig(pairs, str(tmp_path / "three"), **stores, run=RunOptions(ray="10.0.0.1:6379")))
        score(ScoreConfig(pairs, str(tmp_path / "three"), **stores, run=RunOptions(ray="auto")))
        # A thread of Ray Data that is left would end this process once Ray is shut down.
        threads = set(threading.enumerate())
        bad = shutil.copytree(pairs, tmp_path / "damaged")
        with sorted(bad.glob("*.parquet"))[1].open("r+b") as file:  # its footer can be read, its rows cannot
            file.write(bytes(1000))
        with pytest.raises(FlipkdError, match=r"cannot read part-001.parquet of .*damaged"):
            score(ScoreConfig(str(bad), str(tmp_path / "bad"), **stores, run=local))
        left = {thread.name for thread in set(threading.enumerate()) - threads}
        assert left <= {"Prefetcher"}  # which sleeps
    assert not ray.is_initialized()
    score(ScoreConfig(pairs, str(tmp_path / "four"), **stores, run=local))
    assert not ray.is_initialized()
    assert starts == ["local", "local"]
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


@pytest.mark.parametrize(
    ("address", "is_same"),
    [
        ("auto", True),
        ("local", True),
        ("10.1.2.3:6379", True),
        ("localhost:6379", True),  # Ray gives a node another name
        ("10.1.2.4:6379", False),
        ("10.1.2.3:6380", False),
        ("ray://10.1.2.3:10001", False),
    ],
)
def test_a_connection_of_the_caller_is_used_and_stays(
    address: str, is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flipkd.run import ray_connection

    def never(**_: object) -> None:
        raise AssertionError("it is not ours")

    monkeypatch.setattr(ray_connection.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_connection.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.1.2.3:6379"))
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray_connection.ray, name, never)
    with ray_session():
        if is_same:
            ray_connection.connect(address)
        else:
            with pytest.raises(ConfigError, match=r"connected to the cluster 10\.1\.2\.3:6379 already"):
                ray_connection.connect(address)
