"""Relative paths are those of the command's own working directory; Ray's workers have another one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flipkd.config import RunOptions
from flipkd.run import job as job_module
from flipkd.run.job import Job
from flipkd.run.local import run_local
from flipkd.run.manifest import UnitReport
from flipkd.run.units import WorkUnit
from tests.run.conftest import World
from tests.run.jobs import NAMES, make_job


@pytest.mark.parametrize("name", NAMES)
def test_workers_find_what_relative_paths_name(
    name: str, world: World, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "far/elsewhere"  # a ../ leads elsewhere too
    here.mkdir()
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(here)

    def execute(job: Job, pending: Sequence[WorkUnit], listener: Any) -> Iterator[UnitReport]:
        """As a process with another working directory would."""
        made = pickle.loads(pickle.dumps(job.make_worker))
        os.chdir(elsewhere)
        try:
            reports = list(run_local(made(1), pending, 1, False, listener, 0))
        finally:
            os.chdir(here)
        yield from reports

    monkeypatch.setattr(job_module, "_execute", execute)
    near = {place: os.path.relpath(getattr(world, place)) for place in ("encoder", "left", "right", "left_store")}
    world = replace(world, **near, right_store=f"file://{os.path.abspath(world.right_store)}")
    job = make_job(name, world, Path(os.path.relpath(base_dir)), Path("job"))
    assert job.run(RunOptions(threads=1))["complete"]
    assert not list(elsewhere.iterdir())
