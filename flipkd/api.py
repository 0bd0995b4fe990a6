"""``flipkd.score_pairs``: the kernel for people who hold vectors in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.kernels.pair_score import pair_score
from flipkd.vectors.rows import VectorRows, quantise


def score_pairs(
    vectors: VectorRows | npt.ArrayLike,
    left: npt.ArrayLike,
    right: npt.ArrayLike,
    *,
    right_vectors: VectorRows | npt.ArrayLike | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Cosines of pairs of rows.

    Args:
        vectors: [N, d] rows; ``quantise`` makes small ones (int8, bf16). Plain numbers are taken as float32 and divided
            by their length.
        left: [P] integer row of ``vectors``; -1 for none.
        right: [P] integer row of ``right_vectors``, or of ``vectors`` where that is not given; -1 for none.
        right_vectors: [M, d].
        threads: CPU threads.

    Returns:
        [P] float32; NaN where a row is -1.

    Raises:
        IndexError: a row is not there; names the place of the pair.
        ValueError: the two tables differ in type or dimension; or plain numbers are not [rows, dim], or not finite.
    """
    rows = _rows(vectors)
    others = rows if right_vectors is None else _rows(right_vectors)
    return pair_score(rows, others, _indices(left), _indices(right), threads=threads).score


def _rows(vectors: VectorRows | npt.ArrayLike) -> VectorRows:
    if isinstance(vectors, VectorRows):
        return vectors
    plain = np.asarray(vectors, np.float32)
    # The square of a float32 may leave its range, not that of a float64.
    lengths = np.sqrt(np.einsum("...d,...d->...", plain, plain, dtype=np.float64))[..., np.newaxis]
    lengths[lengths == 0] = 1
    return quantise((plain / lengths).astype(np.float32), "float32")


def _indices(values: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"rows must be integers, not {array.dtype}")
    if array.dtype == np.uint64:  # no table has so many rows: what int64 cannot hold must not become -1
        array = np.minimum(array, np.uint64(np.iinfo(np.int64).max))
    return np.ascontiguousarray(array, np.int64)
