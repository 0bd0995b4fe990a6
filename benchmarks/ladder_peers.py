"""The peers of ``benchmarks.ladder``, each run in a process of its own.

    python -m benchmarks.ladder_peers RUNG FOLDER OUTPUT [--pairs N] [--dtype bf16|float32] [--vectors FILE]

FOLDER holds records/ (id, text) and pairs/ (left_id, right_id); OUTPUT gets left_id, right_id, score.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flipkd.assets import minilm_folder

BATCH_SIZE = 32  # the fastest of 16 to 256 for these texts, see benchmarks.encode
_GATHER_PAIRS = 4096

Vectors = npt.NDArray[Any]


def load(dtype: str) -> Any:
    """sentence-transformers' MiniLM."""
    import torch
    from sentence_transformers import SentenceTransformer

    kinds = {"bf16": torch.bfloat16, "float32": torch.float32}
    return SentenceTransformer(str(minilm_folder()), device="cpu", model_kwargs={"dtype": kinds[dtype]})


def as_given(records: pa.Table, pairs: pa.Table, dtype: str) -> Vectors:
    """Both texts of every pair are encoded, in chunks as a batch job would."""
    from sentence_transformers.util import pairwise_cos_sim

    model = load(dtype)
    left, right = (
        records.column("text").take(pc.index_in(pairs.column(name), records.column("id"))).to_pylist()
        for name in ("left_id", "right_id")
    )
    scores = []
    for start in range(0, len(left), _GATHER_PAIRS):
        both = [
            model.encode(side[start : start + _GATHER_PAIRS], batch_size=BATCH_SIZE, convert_to_tensor=True).float()
            for side in (left, right)
        ]
        scores.append(pairwise_cos_sim(*both).numpy())
    return np.concatenate(scores)


def gather(records: pa.Table, pairs: pa.Table, vectors: Vectors) -> Vectors:
    """sentence-transformers' pairwise similarity of gathered rows, in blocks that fit the cache."""
    import torch
    from sentence_transformers.util import pairwise_cos_sim

    table = torch.from_numpy(np.ascontiguousarray(vectors, np.float32))
    rows = [
        torch.from_numpy(pc.index_in(pairs.column(name), records.column("id")).to_numpy().astype(np.int64))
        for name in ("left_id", "right_id")
    ]
    blocks = zip(*(torch.split(side, _GATHER_PAIRS) for side in rows), strict=True)
    scores: Vectors = torch.cat([pairwise_cos_sim(table[left], table[right]) for left, right in blocks]).numpy()
    return scores


def distinct(records: pa.Table, pairs: pa.Table, dtype: str) -> Vectors:
    """Each text once, then the gather."""
    texts = records.column("text").to_pylist()
    return gather(records, pairs, load(dtype).encode(texts, batch_size=BATCH_SIZE))


class EncodeActor:
    """Holds the model in a Ray actor of one core."""

    def __init__(self, dtype: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._model = load(dtype)

    def __call__(self, batch: dict[str, Vectors]) -> dict[str, Vectors]:
        """id, text to id, vector."""
        return {"id": batch["id"], "vector": self._model.encode(list(batch["text"]), batch_size=BATCH_SIZE)}


def ray_data(records: pa.Table, pairs: pa.Table, dtype: str) -> Vectors:
    """Texts encoded by actors, one a core; the vectors come back to the driver for the gather."""
    import ray

    cores = len(os.sched_getaffinity(0))
    # One more than there are: the actors hold a core each for the whole job, and reading the blocks needs one too.
    ray.init("local", num_cpus=cores + 1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    encoded = ray.data.from_arrow(records).repartition(4 * cores).map_batches(
        EncodeActor, fn_constructor_args=(dtype,), batch_size=512, concurrency=cores, num_cpus=1
    )  # fmt: skip
    found = encoded.to_pandas()
    order = pc.index_in(records.column("id"), pa.array(found["id"].to_numpy())).to_numpy()
    return gather(records, pairs, np.stack(found["vector"].to_list())[order])


PEERS: dict[str, Callable[..., Vectors]] = {"1": as_given, "2": distinct, "3": ray_data, "gather": gather}


def main() -> None:
    """Runs one peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rung", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=int, help="the first so many only")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--vectors", type=Path)
    arguments = parser.parse_args()
    records = pq.read_table(arguments.folder / "records").combine_chunks()
    pairs = pq.read_table(arguments.folder / "pairs").combine_chunks()
    if arguments.pairs is not None:
        pairs = pairs.slice(0, arguments.pairs)
    last = np.load(arguments.vectors) if arguments.rung == "gather" else arguments.dtype
    scores = PEERS[arguments.rung](records, pairs, last)
    arguments.output.mkdir()
    table = pairs.append_column("score", pa.array(scores.astype(np.float32)))
    pq.write_table(table, arguments.output / "part-0.parquet")


if __name__ == "__main__":
    main()
