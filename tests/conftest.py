"""Fixtures that more than one test module needs: a real small model, real medical descriptions, a Parquet writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Set before any test module imports transformers or Ray, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers share the cores; threads that wait by spinning would slow all
    cores = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
os.environ.pop("TOKENIZERS_PARALLELISM", None)  # what a user's shell has: our code must not depend on it

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.assets import icd9_descriptions, minilm_folder, smollm2_folder
from tests.small_models import make_base

hypothesis.settings.register_profile("flipkd", deadline=None)  # other work on the machine is no failure of a test
hypothesis.settings.load_profile("flipkd")

# Nodes on one machine choose their ports as they start, so that two clusters must not start at one time.
STARTS_CLUSTERS = ("run/test_cluster.py", "run/test_metrics.py", "privacy/test_ray.py", "distill/test_cluster.py")

WriteParquet = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file run in one process, as their fixtures are made for all of them; so do all that start nodes."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        item.add_marker(pytest.mark.xdist_group("ray" if file in STARTS_CLUSTERS else file))


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Folder of the real all-MiniLM-L6-v2; downloaded once per machine."""
    return minilm_folder()


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, from 4-bit weights; downloaded and converted once per machine."""
    return smollm2_folder()


@pytest.fixture(scope="session")
def icd9() -> list[tuple[str, str, str]]:
    """(code, long description, short description), 12,924 rows in order of code."""
    return icd9_descriptions()


@pytest.fixture
def write_parquet(tmp_path: Path) -> WriteParquet:
    """write_parquet("pairs/part-0.parquet", {"left_id": [1, 2]}, row_group_rows=1) -> the path below tmp_path."""

    def write(name: str, columns: Mapping[str, Any] | pa.Table, row_group_rows: int | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        pq.write_table(table, path, row_group_size=row_group_rows)
        return path

    return write


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    """A Llama of 3 blocks x 32 with MiniLM's tokenizer."""
    return make_base(tmp_path_factory.mktemp("base"), minilm_dir, seed=0)
