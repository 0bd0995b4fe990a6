"""Workers that train together: rank 0 alone writes, and all go on from where it says."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flipkd.distill.checkpoint import load_checkpoint
from flipkd.distill.train import _start, train
from flipkd.errors import InputError
from flipkd.models import adapter, folder
from tests.distill.conftest import MakeConfig
from tests.distill.test_train import broken_off, lines, weights

# One of two workers; the second takes the newest checkpoint for damaged, and must not write.
WORKER = """
import pickle, sys
import torch
import torch.distributed as dist
import flipkd.distill.checkpoint as checkpoint
import flipkd.distill.train as module
from flipkd.distill.gradients import Workers


config = pickle.load(open(sys.argv[1], "rb"))
rank = int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + ".store", rank=rank, world_size=2)
if rank == 1:
    real, asked = checkpoint.is_whole, []

    def is_whole(path):
        asked.append(path)
        return len(asked) > 1 and real(path)

    checkpoint.is_whole = is_whole if sys.argv[3] == "unseen" else real

    def writes(*_, **__):
        raise AssertionError("a worker other than rank 0 opens the run's folder")

    module.RunFolder = writes
print(module.train_worker(config, Workers(rank, 2))["steps"])
"""


def of_two(config: Any, tmp_path: Path, sees: str) -> list[subprocess.CompletedProcess[str]]:
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(config))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), str(rank), sees],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        # The second first: where it gives up, the first waits for it for ever, as Ray Train ends both.
        told = {1: started[1].communicate(timeout=300)}
        if started[1].returncode == 0:
            told[0] = started[0].communicate(timeout=300)
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess([], started[rank].returncode, *told[rank]) for rank in sorted(told)]


def test_all_go_on_from_the_checkpoint_of_rank_0(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config(output=str(tmp_path / "whole"))
    train(whole)
    config = make_config(checkpoint_every=2)
    broken_off(config, monkeypatch, 5)
    found = of_two(config, tmp_path, "seen")
    assert [each.returncode for each in found] == [0, 0], found
    assert [each.stdout for each in found] == ["6\n", "6\n"]
    assert [line["step"] for line in lines(config) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(config)[name], value, atol=1e-4, rtol=1e-3)


def test_a_worker_that_cannot_read_that_checkpoint_takes_no_other(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint_every=2)
    broken_off(config, monkeypatch, 5)
    second = of_two(config, tmp_path, "unseen")[-1]
    assert second.returncode
    assert "step-00000004 cannot be read by this training worker" in second.stderr


def test_a_worker_with_other_data_is_told(make_config: MakeConfig) -> None:
    def told(numbers: Sequence[int], device: str) -> list[int]:
        assert set(numbers) == {0}
        return [0, 4, int("a" * 15, 16)]

    workers: Any = SimpleNamespace(rank=1, told=told)
    assert _start("a" * 64, None, workers, "cpu") == (False, 4)
    with pytest.raises(InputError, match="training worker 1 finds other pairs or another base than worker 0"):
        _start("b" * 64, None, workers, "cpu")
    with pytest.raises(InputError, match="step-00000004 cannot be read"):
        load_checkpoint(Path(make_config().output), 4, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]


def test_the_base_is_hashed_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, hashed = make_config(), []
    real = folder.files_fingerprint

    def counted(path: Path, *rest: Any) -> str:
        hashed.append(Path(path))
        return real(path, *rest)

    monkeypatch.setattr(adapter, "files_fingerprint", counted)
    train(config)
    assert hashed == [Path(config.student.folder)]
    student = adapter.load_student(Path(config.output) / "adapter")
    assert hashed == 2 * [Path(config.student.folder)]
    assert student.base_fingerprint == real(Path(config.student.folder))
