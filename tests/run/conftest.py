"""A small world of real records: two tables, their vectors, and a few hundred pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import EncodeConfig, EncoderOptions
from flipkd.data.find import Shard
from flipkd.data.location import Location
from flipkd.data.shards import ShardReader
from flipkd.run.encode import encode
from tests.small_models import make_base

RECORDS = 60


@dataclass(frozen=True)
class World:
    """Records ``left`` and ``right`` (ids 10**15 + n), stores of them, and the vectors to check against."""

    encoder: str
    left: str
    right: str
    left_store: str
    right_store: str
    texts: tuple[list[str], list[str]]
    vectors: tuple[np.ndarray, np.ndarray]

    def cosine(self, left: int, right: int) -> float:
        return float(self.vectors[0][left] @ self.vectors[1][right])


def record_id(row: int) -> int:
    return 10**15 + row


@pytest.fixture(scope="session")
def world(minilm_dir: Path, icd9: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory) -> World:
    from flipkd.models.encoder import load_encoder

    folder = tmp_path_factory.mktemp("world")
    chosen = icd9[:: len(icd9) // RECORDS][:RECORDS]
    texts = ([long for _, long, _ in chosen], [short for _, _, short in chosen])
    encoder = load_encoder(minilm_dir)
    stores = []
    for name, values in zip(("left", "right"), texts, strict=True):
        ids = pa.array([record_id(row) for row in range(RECORDS)], pa.int64())
        (folder / name).mkdir()
        half = RECORDS // 2
        for part, rows in enumerate((slice(0, half), slice(half, RECORDS))):
            pq.write_table(pa.table({"id": ids[rows], "text": values[rows]}), folder / name / f"{part}.parquet")
        stores.append(str(folder / f"{name}-store"))
        encode(EncodeConfig(EncoderOptions(str(minilm_dir)), str(folder / name), stores[-1], dtype="float32"))
    vectors = tuple(encoder.encode_texts(values).vectors for values in texts)
    return World(
        str(minilm_dir),
        str(folder / "left"),
        str(folder / "right"),
        stores[0],
        stores[1],
        texts,
        (vectors[0], vectors[1]),
    )


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    """A Llama of 3 blocks whose answers differ from pair to pair."""
    return make_base(tmp_path_factory.mktemp("llm"), minilm_dir, seed=3, initializer_range=0.5)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened, by name."""
    counts: Counter[str] = Counter()
    init = ShardReader.__init__

    def counted(self: ShardReader, location: Location, shard: Shard, may_skip: bool = False) -> None:
        counts[shard.name] += 1
        init(self, location, shard, may_skip)

    monkeypatch.setattr(ShardReader, "__init__", counted)
    return counts


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., Path]:
    """make_pairs(files=4, rows=30, seed=0) -> folder of pairs with a running number ``n`` as pass-through column."""

    def make(files: int = 4, rows: int = 30, seed: int = 0, name: str = "pairs") -> Path:
        generator = np.random.default_rng(seed)
        folder = tmp_path / name
        folder.mkdir()
        for file in range(files):
            left, right = generator.integers(0, RECORDS, (2, rows))
            table = pa.table(
                {
                    "left_id": pa.array(left + record_id(0), pa.int64()),
                    "right_id": pa.array(right + record_id(0), pa.int64()),
                    "n": pa.array(np.arange(rows) + file * rows, pa.int32()),
                }
            )
            pq.write_table(table, folder / f"part-{file:03d}.parquet", row_group_size=max(rows // 3, 1))
        return folder

    return make
