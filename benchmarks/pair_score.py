"""Pairs scored per second by the CPU kernel, against PyTorch's gather, multiply, sum in float32.

    python -m benchmarks.pair_score [--quick] [--rows N] [--pairs N] [--threads N] [--huge-pages]

Rows of 128 numbers; random pairs, and pairs in groups of 20 with the same left row, as blocking gives them. The peer
scores the same pairs in chunks that fit the cache; several chunk sizes are tried and the fastest is timed. Ratios above
1: flipkd is faster. `gather_limit` is the share of what the machine gives a loop that only reads the same rows (its
best prefetch distance of several) that int8 scoring of random pairs reaches; 1 would be the limit of memory.

`reorder_gain`: what a job would win that sorts each batch of random pairs by left row, scores it and puts the scores
back in order, sorting included (below 1: it loses, so `score` does not). `block_order` is the gain of pairs whose both
rows lie in blocks of 4,096 neighbouring rows over random ones: what a table sorted by its blocking key would give.

Rows lie in anonymous memory in pages of 4 KiB, as a mapped store has them; --huge-pages asks for 2 MiB pages instead.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import interleave, report
from flipkd.kernels.native import native
from flipkd.kernels.pair_score import pair_score
from flipkd.vectors.rows import STORAGE, VectorRows, quantise

_DIM = 128
_BATCH_PAIRS = 1 << 20
_GROUP = 20  # pairs per left row
_BLOCK_ROWS = 4096
_CHUNKS = (256, 512, 1024, 2048, 4096, 8192)  # pairs
_READS = ((8, 1), (16, 1), (16, 2), (32, 2), (16, 8), (64, 32))  # (pairs ahead, pairs per burst)
_CHECKED = 200_000  # pairs
_MAX_ERROR = {"float32": 1e-6, "bf16": 4e-3, "int8": 1e-2}
_SOURCE_ROWS = 1 << 16  # distinct rows; a table repeats them, which changes no address


def gather_multiply_sum(
    left: torch.Tensor, right: torch.Tensor, left_index: torch.Tensor, right_index: torch.Tensor, chunk_pairs: int
) -> torch.Tensor:
    """Return [P] float32 dot products of float32 rows the way one writes it in PyTorch with care.

    Chunked so that the gathered rows stay in the cache, into buffers made once.
    """
    pairs, dim = len(left_index), left.shape[1]
    score = torch.empty(pairs)
    left_rows, right_rows = torch.empty(chunk_pairs, dim), torch.empty(chunk_pairs, dim)
    for start in range(0, pairs, chunk_pairs):
        count = min(chunk_pairs, pairs - start)
        a, b = left_rows[:count], right_rows[:count]
        torch.index_select(left, 0, left_index[start : start + count], out=a)
        torch.index_select(right, 0, right_index[start : start + count], out=b)
        torch.sum(a.mul_(b), 1, out=score[start : start + count])
    return score


def allocate(rows: int, dtype: str, huge_pages: bool) -> NDArray[Any]:
    """Return a [rows, _DIM] array that begins on a page, as a mapped store does."""
    storage = STORAGE[dtype]
    memory = mmap.mmap(-1, rows * _DIM * storage.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, storage).reshape(rows, _DIM)


def make_rows(rows: int, dtypes: tuple[str, ...], huge_pages: bool) -> dict[str, VectorRows]:
    """Return the same random unit rows in every dtype."""
    source = np.random.default_rng(1).standard_normal((min(rows, _SOURCE_ROWS), _DIM), dtype=np.float32)
    source /= np.linalg.norm(source, axis=1, keepdims=True)
    tables = {}
    for dtype in dtypes:
        values, few = allocate(rows, dtype, huge_pages), quantise(source, dtype).values
        for start in range(0, rows, len(few)):
            values[start : start + len(few)] = few[: rows - start]
        tables[dtype] = VectorRows(values, dtype)
    return tables


def score_batches(table: VectorRows, left: NDArray[np.int32], right: NDArray[np.int32], threads: int) -> None:
    """Scores in batches, as `flipkd-batch score` does: one result of 80 MB would time how the system zeroes pages."""
    for start in range(0, len(left), _BATCH_PAIRS):
        batch = slice(start, start + _BATCH_PAIRS)
        pair_score(table, table, left[batch], right[batch], threads=threads)


def score_reordered(table: VectorRows, left: NDArray[np.int32], right: NDArray[np.int32], threads: int) -> None:
    """The same scores in the same order, each batch scored in the order of its left rows."""
    for start in range(0, len(left), _BATCH_PAIRS):
        batch_left, batch_right = left[start : start + _BATCH_PAIRS], right[start : start + _BATCH_PAIRS]
        order = np.argsort(batch_left, kind="stable")  # numpy's radix sort
        scores = np.empty(len(order), np.float32)
        scores[order] = pair_score(table, table, batch_left[order], batch_right[order], threads=threads).score


def make_pairs(rows: int, pairs: int) -> dict[str, tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return (left_index, right_index): random; _GROUP pairs in a row for each left row; blocks of neighbours."""
    rng = np.random.default_rng(2)
    left, right = (rng.integers(0, rows, pairs, dtype=np.int32) for _ in range(2))
    block = rng.integers(0, -(-rows // _BLOCK_ROWS), -(-pairs // _BLOCK_ROWS), dtype=np.int32).repeat(_BLOCK_ROWS)[
        :pairs
    ]
    within = (np.minimum(block * _BLOCK_ROWS + side % _BLOCK_ROWS, rows - 1).astype(np.int32) for side in (left, right))
    return {
        "random": (left, right),
        "grouped": (np.repeat(left[: -(-pairs // _GROUP)], _GROUP)[:pairs], right),
        "in blocks": (next(within), next(within)),
    }


def is_right(tables: dict[str, VectorRows], source: VectorRows, left: Any, right: Any, threads: int) -> bool:
    """Check the scores of some pairs of every dtype against float64."""
    left, right = left[:_CHECKED], right[:_CHECKED]
    exact = np.einsum("pd,pd->p", source.values[left].astype(np.float64), source.values[right].astype(np.float64))
    errors = {
        dtype: np.abs(pair_score(table, table, left, right, threads=threads).score - exact).max()
        for dtype, table in tables.items()
    }
    return all(error <= _MAX_ERROR[dtype] for dtype, error in errors.items())


def gather_read(
    table: VectorRows, left: NDArray[np.int32], right: NDArray[np.int32], ahead: int, burst: int, threads: int
) -> int:
    """Read the rows of all pairs and do nothing else; return the XOR of their words."""
    library = native()
    assert library is not None
    function = library.flipkd_gather_read
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
    row_bytes = table.dim * table.values.itemsize
    addresses = (table.values.ctypes.data, row_bytes, left.ctypes.data, right.ctypes.data)
    return int(function(*addresses, len(left), threads, ahead, burst))


def best_of(candidates: dict[Any, Callable[[], Any]], rounds: int) -> Any:
    """Return the key of the fastest candidate."""
    seconds = interleave(candidates, rounds)
    return min(seconds, key=lambda key: min(seconds[key]))


def main() -> int:
    """Measure, print the table and the line of JSON."""
    parser = argparse.ArgumentParser(description="pair_score on the CPU against PyTorch")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--quick", action="store_true", help="2 million pairs, 3 rounds")
    options = parser.parse_args()
    if native() is None:
        print("the compiled library is missing, so there is nothing to compare")
        return 1
    pairs, rounds = (2_000_000, 3) if options.quick else (options.pairs, options.rounds)
    threads = options.threads
    torch.set_num_threads(threads)
    # 64 million float32 rows are 32 GB: the peer then has the first few million rows only, which favours it
    peer_rows = min(options.rows, 4_000_000)
    tables = make_rows(options.rows, ("int8", "bf16") if options.rows <= 16_000_000 else ("int8",), options.huge_pages)
    source = make_rows(peer_rows, ("float32",), options.huge_pages)["float32"]
    orders = make_pairs(options.rows, pairs)
    peer_orders = orders if peer_rows == options.rows else make_pairs(peer_rows, pairs)
    correct = all(is_right({**tables, "float32": source}, source, *peer_orders[order], threads) for order in orders)
    if not correct:
        report("pair_score", [], {}, False)
        return 1

    rows_tensor = torch.from_numpy(source.values)
    functions: dict[str, Callable[[], Any]] = {}
    few = min(pairs, 2_000_000)
    chunks = {}
    for order, (left, right) in peer_orders.items():
        if order == "in blocks":
            continue
        peer = partial(gather_multiply_sum, rows_tensor, rows_tensor)
        some = torch.from_numpy(left[:few]), torch.from_numpy(right[:few])
        chunks[order] = best_of({chunk: partial(peer, *some, chunk) for chunk in _CHUNKS}, 2)
        functions[f"torch float32 {order}"] = partial(
            peer, torch.from_numpy(left), torch.from_numpy(right), chunks[order]
        )
    if peer_rows == options.rows:
        tables["float32"] = source
    for dtype, table in tables.items():
        for order, indices in orders.items():
            functions[f"flipkd {dtype} {order}"] = partial(score_batches, table, *indices, threads)
    left, right = orders["random"]
    functions["flipkd int8 random, reordered"] = partial(score_reordered, tables["int8"], left, right, threads)
    for ahead, burst in _READS:
        functions[f"read only int8 random, {ahead} ahead, bursts of {burst}"] = partial(
            gather_read, tables["int8"], left, right, ahead, burst, threads
        )

    seconds = {name: statistics.median(times) for name, times in interleave(functions, rounds).items()}
    rows = []
    for name, value in seconds.items():
        dtype = next(dtype for dtype in STORAGE if dtype in name)
        touched = pairs * _DIM * STORAGE[dtype].itemsize * (2 if "random" in name else 1 + 1 / _GROUP)
        rows.append(
            {
                "what": name,
                "seconds": round(value, 3),
                "million_pairs_per_second": round(pairs / value / 1e6, 1),
                "gb_of_rows_per_second": round(touched / value / 1e9, 2),
            }
        )
    ratios = {
        "int8_random": seconds["torch float32 random"] / seconds["flipkd int8 random"],
        "int8_grouped": seconds["torch float32 grouped"] / seconds["flipkd int8 grouped"],
        "gather_limit": min(value for name, value in seconds.items() if "read only" in name)
        / seconds["flipkd int8 random"],
        "reorder_gain": seconds["flipkd int8 random"] / seconds["flipkd int8 random, reordered"],
        "block_order": seconds["flipkd int8 random"] / seconds["flipkd int8 in blocks"],
    }
    if "bf16" in tables:
        ratios["bf16_random"] = seconds["torch float32 random"] / seconds["flipkd bf16 random"]
    print(f"rows {options.rows}, pairs {pairs}, dim {_DIM}, threads {threads}, huge pages {options.huge_pages}")
    print(f"best PyTorch chunk: {chunks}")
    report("pair_score", rows, {name: round(value, 2) for name, value in ratios.items()}, True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
