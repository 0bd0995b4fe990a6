"""Training on Ray: real workers in processes of their own, one of which is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from flipkd.config import RunOptions
from flipkd.data.folders import is_whole
from flipkd.distill import cluster
from flipkd.distill.config import TrainConfig
from flipkd.distill.facts import run_facts
from flipkd.distill.train import train
from flipkd.distill.training_data import read_training_data
from flipkd.errors import ConfigError
from tests.distill.conftest import MakeConfig
from tests.run.ray_cluster import ROOT


def command(config: TrainConfig) -> list[str]:
    return [
        sys.executable, "-m", "flipkd.cli", "train", "--student", config.student.folder, "--pairs", config.pairs,
        "--output", config.output, "--layer", "2", "--dimension", "8", "--rank", "4", "--batch-pairs", "16",
        "--steps", str(config.steps), "--evaluate-every", str(config.evaluate_every), "--checkpoint-every",
        str(config.checkpoint_every), "--log-every", "1", "--device", "cpu", "--no-progress", "--json", "--ray",
        "local", "--workers", "2", "--threads", "1", "--learning-rate", str(config.learning_rate),
    ]  # fmt: skip


def curve(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(found: TrainConfig, expected: TrainConfig) -> None:
    pairs = list(zip(curve(found), curve(expected), strict=True))
    assert [left["step"] for left, _ in pairs] == [right["step"] for _, right in pairs]
    for left, right in pairs:
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["tokens"] == right["tokens"]
        if "validation" in right:
            assert left["validation"]["auc"] == pytest.approx(right["validation"]["auc"], abs=1e-4)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_worker_with_a_gpu_trains_the_same_run(
    make_config: MakeConfig, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, told = make_config(device=device), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(cluster.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(cluster, "train_worker", lambda config, workers: told.append((config, workers.count)))
    monkeypatch.chdir(tmp_path)  # which a worker does too
    threads = torch.get_num_threads()
    cluster._train_share({"config": config, "threads": threads, "logs": None, "folder": str(tmp_path)})
    ((own, count),) = told
    assert (own.device, count) == (device, 1)
    data = read_training_data(config)
    made = [run_facts(each, data, "base") for each in (replace(config, device="cuda"), config)]
    assert made[0]["fingerprint"] == made[1]["fingerprint"]  # another device is no other run either


def test_gpus_do_not_go_with_the_cpu(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="--gpus does not go with --device cpu"):
        cluster.train_on_ray(make_config(device="cpu", run=RunOptions(ray="local", gpus=0.5)))


def test_the_driver_tells_of_the_run_by_its_metrics(
    make_config: MakeConfig, pairs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers have read the pairs, which may be many, and made the folder."""
    pairs = tmp_path / "pairs"
    shutil.copytree(pairs_dir, pairs)
    config = make_config(pairs=str(pairs), run=RunOptions(ray="local", threads=1))

    def fit() -> None:
        train(replace(config, run=RunOptions(threads=1)))
        shutil.rmtree(pairs)

    monkeypatch.setattr(cluster, "connect", lambda _: None)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(cluster.ray.train.torch, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    found = cluster.train_on_ray(config)
    validated = [line for line in curve(config) if "validation" in line]
    assert found["steps"] == 6
    assert found["validation"] in [line["validation"] for line in validated]


@pytest.mark.slow
def test_two_workers_give_the_curve_of_one(make_config: MakeConfig, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 24, "checkpoint_every": 4, "evaluate_every": 8}
    one = make_config(output=str(tmp_path / "one"), **options)
    train(one)
    two = make_config(output=str(tmp_path / "two"), **options)
    # Paths are relative, as the driver sees them; and a training worker logs objects.
    near = replace(two, pairs=os.path.relpath(two.pairs, tmp_path), output="two")
    run = [*command(near), "--log-format", "json", "--log-level", "debug"]
    with tempfile.TemporaryDirectory(prefix="fk-", ignore_cleanup_errors=True) as folder:  # a short name, for sockets
        places = {**environment(), "RAY_TMPDIR": folder, "PYTHONPATH": ROOT}
        done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=300, env=places, cwd=tmp_path)
        logs = sorted(Path(folder).glob("ray/session_2*/logs/worker-*.err"))
        told = [path.read_text() for path in logs if ":actor_name:RayTrainWorker" in path.read_text()]
    assert json.loads(done.stdout.strip().splitlines()[-1])["steps"] == 24
    assert len(told) == 2
    for text in told:  # all but what Ray says before flipkd's code runs
        lines = [line for line in text.splitlines() if not line.startswith((":", "Setting up process group"))]
        assert all(isinstance(json.loads(line), dict) for line in lines), text
    assert '"logger": ' in "".join(told)
    assert_same_curve(two, one)
    assert is_whole(tmp_path / "two" / "adapter")


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_curve_is_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    # A low rate: over many steps a high one makes of the last bit, in which the order of sums differs, a visible one.
    options: dict[str, Any] = {"steps": 120, "checkpoint_every": 5, "evaluate_every": 40, "learning_rate": 1e-4}
    one = make_config(output=str(tmp_path / "one"), **options)
    train(one)
    two = make_config(output=str(tmp_path / "two"), **options)
    process = subprocess.Popen(command(two), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "two" / "checkpoints").glob("step-00000015")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("RayTrainWorker" in part for part in child.cmdline())
    ]
    assert len(workers) == 2
    workers[1].kill()
    assert process.wait(timeout=300) == 0
    assert_same_curve(two, one)


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
