"""pair_score: gather two rows by index, dot product, calibration, threshold.

    score[p] = clip(left[left_index[p]] . right[right_index[p]], -1, 1)      float32 accumulation
    int8:    the dot product over the product of the two rows' norms (see `flipkd.vectors.rows.quantise`)
    probability[p] = 1 / (1 + exp(-(a * score[p] + b)))

Nothing of size pairs x dim is allocated. The three implementations (cpu, reference, triton) share this contract.
"""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flipkd.errors import KernelError
from flipkd.kernels.dispatch import pair_score_backend
from flipkd.kernels.native import native
from flipkd.vectors.rows import DTYPES, VectorRows

# Instruction sets of the compiled library, lowest first. FLIPKD_CPU_LEVEL takes a lower one than the machine's best.
LEVELS = ("portable", "avx2", "avx512_vnni", "avx512_bf16")
LEVEL_OVERRIDE = "FLIPKD_CPU_LEVEL"

# Above this the int8 sums could leave int32 (the AVX-512 kernel adds up products of 255 and 127).
MAX_INT8_DIM = 65536

Indices = NDArray[Any]  # int32 or int64; NumPy's own types lose the union on the way through its functions


@dataclass(frozen=True)
class PairScores:
    """Scores of P pairs, or of the M of them that reach `min_score`, in the order of the pairs.

    Args:
        score: [M] float32, cosine in -1..1; NaN where an index was -1.
        probability: [M] float32 in 0..1, or None without a calibration.
        position: [M] int64, places of the survivors among the P pairs; None without `min_score` (then M = P).
    """

    score: NDArray[np.float32]
    probability: NDArray[np.float32] | None
    position: NDArray[np.int64] | None


def pair_score(
    left: VectorRows,
    right: VectorRows,
    left_index: Indices,
    right_index: Indices,
    *,
    calibration: tuple[float, float] | None = None,
    min_score: float | None = None,
    threads: int = 1,
    backend: str | None = None,
) -> PairScores:
    """Score pairs of rows.

    Pairs that follow each other with the same left row are scored faster. The bits are the same in any order of the
    pairs and for any number of threads. Rows and indices must stay as they are until it returns: indices are checked
    once and read again.

    Args:
        left: [N, d] rows, unit length.
        right: [M, d] rows of the same dtype and d; may be `left`.
        left_index: [P] int32 or int64, row of `left`; -1 means "no such row", and the pair's score is NaN.
        right_index: [P], of the same type, row of `right`.
        calibration: (a, b): adds probability = sigmoid(a * score + b).
        min_score: only pairs with score >= min_score are returned, in order (never those with NaN).
        threads: CPU threads to use at most.
        backend: "cpu", "reference" or "triton"; None: the environment variable FLIPKD_PAIR_SCORE, or the best there is.

    Raises:
        IndexError: an index below -1 or past the last row; names the side and the first place. Nothing is read there.
        ValueError: rows or indices that do not fit each other.
        KernelError: the backend asked for cannot run here.
    """
    if left.dtype != right.dtype or left.dim != right.dim:
        raise ValueError(f"left rows are {left.dtype} x {left.dim}, right rows are {right.dtype} x {right.dim}")
    if left.dtype == "int8" and left.dim > MAX_INT8_DIM:
        raise ValueError(f"int8 rows of {left.dim} numbers exceed the {MAX_INT8_DIM} that 32-bit sums can hold")
    _check_indices(left_index, right_index)
    left_index, right_index = np.ascontiguousarray(left_index), np.ascontiguousarray(right_index)
    if min_score is not None and math.isnan(min_score):
        raise ValueError("min_score is NaN")
    if min_score is not None:
        min_score = _as_float32_bound(min_score)
    chosen = pair_score_backend(backend)
    if chosen == "cpu":
        return _on_cpu(left, right, left_index, right_index, calibration, min_score, threads)
    if chosen == "reference":
        from flipkd.kernels.pair_score import reference

        _check_range(left_index, right_index, len(left), len(right))
        return PairScores(*reference.pair_score(left, right, left_index, right_index, calibration, min_score))
    from flipkd.kernels.pair_score import gpu

    return PairScores(*gpu.pair_score(left, right, left_index, right_index, calibration, min_score))


def out_of_range(place: int, left: int, right: int, left_rows: int, right_rows: int) -> IndexError:
    """Return the error for the pair at `place`, whose indices are `left` and `right`."""
    left_is_bad = not -1 <= left < left_rows
    side, index, rows = ("left", left, left_rows) if left_is_bad else ("right", right, right_rows)
    return IndexError(f"{side}_index[{place}] is {index}, outside the {rows} rows (-1 means no row)")


def _check_range(left_index: Indices, right_index: Indices, left_rows: int, right_rows: int) -> None:
    bad = (left_index < -1) | (left_index >= left_rows) | (right_index < -1) | (right_index >= right_rows)
    if bad.any():
        place = int(np.argmax(bad))
        raise out_of_range(place, int(left_index[place]), int(right_index[place]), left_rows, right_rows)


def _check_indices(left_index: Indices, right_index: Indices) -> None:
    for name, index in (("left_index", left_index), ("right_index", right_index)):
        if index.dtype not in (np.int32, np.int64) or index.ndim != 1:
            raise ValueError(f"{name} must be int32 or int64 [pairs], not {index.dtype} of shape {index.shape}")
    if left_index.dtype != right_index.dtype or len(left_index) != len(right_index):
        raise ValueError(
            f"left_index ({left_index.dtype} [{len(left_index)}]) and right_index ({right_index.dtype} "
            f"[{len(right_index)}]) must be of one type and length"
        )


class _Job(ctypes.Structure):
    """Mirrors `struct Job` in cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "left_index", "right_index")),
        *((name, ctypes.c_void_p) for name in ("score", "probability", "position")),
        *((name, ctypes.c_int64) for name in ("left_rows", "right_rows", "dim", "pairs", "bad_place", "survivors")),
        *((name, ctypes.c_float) for name in ("slope", "offset", "min_score")),
        *((name, ctypes.c_int32) for name in ("dtype", "index_bytes", "level", "threads")),
    )


def _on_cpu(
    left: VectorRows,
    right: VectorRows,
    left_index: Indices,
    right_index: Indices,
    calibration: tuple[float, float] | None,
    min_score: float | None,
    threads: int,
) -> PairScores:
    library = native()
    assert library is not None  # dispatch saw it
    pairs = len(left_index)
    score = np.empty(pairs, np.float32)
    probability = None if calibration is None else np.empty(pairs, np.float32)
    position = None if min_score is None else np.empty(pairs, np.int64)
    slope, offset = calibration or (0.0, 0.0)
    job = _Job(
        left=_address(left.values),
        right=_address(right.values),
        left_index=_address(left_index),
        right_index=_address(right_index),
        score=_address(score),
        probability=_address(probability),
        position=_address(position),
        left_rows=len(left),
        right_rows=len(right),
        dim=left.dim,
        pairs=pairs,
        slope=slope,
        offset=offset,
        min_score=0.0 if min_score is None else min_score,
        dtype=DTYPES.index(left.dtype),
        index_bytes=left_index.itemsize,
        level=_cpu_level(),
        threads=threads,
    )
    library.flipkd_pair_score(ctypes.byref(job))
    if job.bad_place >= 0:
        place = job.bad_place
        raise out_of_range(place, int(left_index[place]), int(right_index[place]), len(left), len(right))
    if position is None:
        return PairScores(score, probability, None)
    kept = job.survivors  # copies, so that the long buffers are given back
    return PairScores(
        score[:kept].copy(), None if probability is None else probability[:kept].copy(), position[:kept].copy()
    )


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _as_float32_bound(min_score: float) -> float:
    """Return the least float32 not below `min_score`: a float32 score reaches it just when it reaches `min_score`."""
    nearest = np.float32(min_score)
    return float(nearest if float(nearest) >= min_score else np.nextafter(nearest, np.float32(np.inf)))


def _cpu_level() -> int:
    """Return the highest instruction set to use; the library lowers it to what the CPU has."""
    name = os.environ.get(LEVEL_OVERRIDE, LEVELS[-1])
    if name not in LEVELS:
        raise KernelError(f"{LEVEL_OVERRIDE}={name} is not one of {', '.join(LEVELS)}")
    return LEVELS.index(name)
