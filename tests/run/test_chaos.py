"""Fifty jobs of 200 units, each disturbed at a random moment: a rerun gives every pair once, in the same bytes.

``pytest -m chaos``. The table at the end tells the seed; ``FLIPKD_CHAOS_SEED=N pytest -m chaos`` runs the same faults
again (at the same number of finished units: the machine's own timing is not repeated).
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.score import write_store
from flipkd.config import ScoreConfig
from flipkd.run.score import score
from tests.run import chaos
from tests.run.chaos import UNITS, Fault, Run, Site
from tests.run.ray_cluster import Cluster, running_cluster
from tests.run.test_kill import contents

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("FLIPKD_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
RECORDS, ROWS, GROUPS = 500, 240, 4
ON_RAY: dict[Fault, int] = {
    chaos.kill_worker: 4, chaos.kill_node: 3, chaos.kill_driver: 4, chaos.fill_disk: 2, chaos.read_only: 2,
    chaos.lose_shard: 3, chaos.exit_worker: 2, chaos.stop_worker: 2, chaos.eat_memory: 2,
}  # fmt: skip
IN_PROCESS: dict[Fault, int] = {
    chaos.kill_driver: 11, chaos.fill_disk: 6, chaos.read_only: 4, chaos.lose_shard: 4, chaos.stop_driver: 1,
}  # fmt: skip
RUNS = [
    (fault, on_ray)
    for on_ray, kinds in ((False, IN_PROCESS), (True, ON_RAY))
    for fault, count in kinds.items()
    for _ in range(count)
]
assert len(RUNS) == 50


class Account:
    """What became of the runs, per kind."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])

    def add(self, kind: tuple[str, str], interrupted: bool, resumed: int, seconds: float) -> None:
        for place, value in enumerate((1, interrupted, resumed, seconds)):
            self.rows[kind][place] += value

    def lines(self) -> list[str]:
        found = [f"{'fault':14}{'where':12}{'runs':>5}{'broken off':>12}{'units resumed':>15}{'seconds':>9}"]
        totals = [sum(column) for column in zip(*self.rows.values(), strict=True)] or [0, 0, 0, 0.0]
        for (fault, where), row in [*self.rows.items(), (("all", ""), totals)]:
            runs, interrupted, resumed, seconds = row
            found.append(f"{fault:14}{where:12}{runs:5.0f}{interrupted:12.0f}{resumed:15.0f}{seconds:9.1f}")
        return found


@pytest.fixture(scope="module")
def account(request: pytest.FixtureRequest) -> Iterator[Account]:
    made = Account()
    yield made
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nFLIPKD_CHAOS_SEED={SEED}", *made.lines(), sep="\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """50 files of 4 row groups; each row group is a unit."""
    folder = tmp_path_factory.mktemp("chaos")
    generator = np.random.default_rng(SEED)
    vectors = generator.standard_normal((RECORDS, 64), dtype=np.float32)
    write_store(folder / "store", pa.array(range(RECORDS), pa.int64()), vectors)
    (folder / "pairs").mkdir()
    for file in range(UNITS // GROUPS):
        ids = generator.integers(0, RECORDS + 5, (2, ROWS))  # the last few have no record
        numbers = np.arange(ROWS) + file * ROWS
        table = pa.table({"left_id": ids[0], "right_id": ids[1], "n": numbers})
        pq.write_table(table, folder / f"pairs/part-{file:03d}.parquet", row_group_size=ROWS // GROUPS)
    (folder / "work").mkdir()
    return Site(folder / "pairs", folder / "store", folder / "work")


@pytest.fixture(scope="module")
def expected(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names and digests of an undisturbed run's outputs."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    score(ScoreConfig(pairs=str(site.pairs), output=str(output), store=str(site.store), rows_per_unit=1))
    assert_every_pair_once(output)
    found = contents(output)
    assert len(found) == UNITS
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def assert_every_pair_once(output: Path) -> None:
    numbers = pq.read_table(output, columns=["n"]).column("n").to_numpy()
    assert np.array_equal(np.sort(numbers), np.arange(UNITS // GROUPS * ROWS))


@pytest.mark.parametrize("number", range(len(RUNS)), ids=[
    f"{number:02d}-{fault.__name__}-{'ray' if on_ray else 'process'}" for number, (fault, on_ray) in enumerate(RUNS)
])  # fmt: skip
def test_a_disturbed_job_is_taken_up(
    number: int, site: Site, expected: dict[str, str], account: Account, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fault, on_ray = RUNS[number]
    cluster = request.getfixturevalue("cluster") if on_ray else None
    run = Run(Site(site.pairs, site.store, tmp_path), tmp_path / "disk/out", random.Random(f"{SEED} {number}"), cluster)
    started = time.monotonic()
    print(f"FLIPKD_CHAOS_SEED={SEED}")  # pytest shows it with a failure
    with chaos.ending(run):
        interrupted = fault(run)
        code, told, errors = run.again()
        assert code == 0, errors
        manifest = json.loads(told)
        assert manifest["complete"]
        assert manifest["units"] == UNITS
        assert manifest["rows_in"] == UNITS // GROUPS * ROWS
        assert contents(run.output) == expected
        assert_every_pair_once(run.output)
        assert {path.name for path in (run.output / ".flipkd").iterdir()} <= {"lock", "plan.json"}
    kind = (fault.__name__, "ray" if on_ray else "process")
    account.add(kind, interrupted, manifest["units_resumed"], time.monotonic() - started)
