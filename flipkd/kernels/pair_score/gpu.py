"""pair_score on a GPU: picks the kernel and its sizes, checks indices, keeps survivors. See gpu_kernels.py for the how.

Large calls are tuned (`triton.autotune`): the first one of a process with another length or type of rows or type of
indices tries every size of a short list, and the fastest serves from then on.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from flipkd.errors import KernelError
from flipkd.kernels.pair_score.gpu_kernels import compact_kernel, count_kernel, runs_kernel, score_kernel
from flipkd.vectors.rows import VectorRows

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TUNED_FROM = 1 << 18  # pairs; a smaller call runs with the first of the configurations
_COMPACT_BLOCK = 1024  # scores that a program counts or moves
_SAMPLE = 1 << 14  # pairs that are looked at to see whether they come in runs
_RUN = 4  # pairs per left row, on average, from which on the kernel for runs is taken

_resident: dict[int, torch.Tensor] = {}  # rows on the GPU, by the id of those that they are a copy of
_lock = threading.Lock()

# The few shapes worth trying, by the compiler's register counts; each GPU tunes for itself (an H200 takes 32 pairs and
# 4 warps). The first is the one for small calls.
_CONFIGS = [
    triton.Config({"BLOCK_PAIRS": pairs}, num_warps=warps)
    for pairs, warps in ((64, 4), (32, 4), (128, 4), (32, 2), (128, 8))
]
_RUN_CONFIGS = [
    triton.Config({"BLOCK_PAIRS": pairs, "CHUNK": chunk}, num_warps=warps)
    for pairs, chunk, warps in ((32, 256, 4), (16, 256, 2), (32, 128, 2), (32, 512, 4), (64, 512, 4))
]


def _tuned(kernel: Any, configs: list[triton.Config]) -> Any:
    """Tuned once per process for each (numbers in a row, types of rows and indices); not in the interpreter."""
    return kernel if _INTERPRETED else triton.autotune(configs=configs, key=["COLUMNS"])(kernel)


_tuned_score_kernel = _tuned(score_kernel, _CONFIGS)
_tuned_runs_kernel = _tuned(runs_kernel, _RUN_CONFIGS)


def device() -> torch.device:
    """Return where the kernel runs: the current CUDA device, or the CPU in Triton's interpreter.

    Raises:
        KernelError: there is no CUDA device.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    raise KernelError("pair_score backend 'triton' needs a CUDA GPU; unset FLIPKD_PAIR_SCORE to score on the CPU")


def rows_to_device(rows: VectorRows) -> torch.Tensor:
    """Copy rows to the GPU as a [N, d] float32, bfloat16 or int8 tensor."""
    values = torch.from_numpy(np.array(rows.values))  # a copy, since PyTorch warns of read-only maps
    return (values.view(torch.bfloat16) if rows.dtype == "bf16" else values).to(device())


def _rows_there(rows: VectorRows) -> torch.Tensor:
    """The rows on the GPU: those of a mapped store once for as long as `rows` lives, since nobody can change them."""
    if not _is_mapped(rows.values):
        return rows_to_device(rows)
    with _lock:
        if id(rows) not in _resident:
            _resident[id(rows)] = rows_to_device(rows)
            weakref.finalize(rows, _resident.pop, id(rows), None)
        return _resident[id(rows)]


def _is_mapped(values: NDArray[Any]) -> bool:
    """Whether an array is a view of a file that is mapped for reading alone."""
    if values.flags.writeable:
        return False
    base: Any = values
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def pair_score(
    left: VectorRows,
    right: VectorRows,
    left_index: NDArray[np.int32] | NDArray[np.int64],
    right_index: NDArray[np.int32] | NDArray[np.int64],
    calibration: tuple[float, float] | None,
    min_score: float | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.int64] | None]:
    """Copy indices and rows to the GPU, score, copy back.

    Rows of a mapped store stay there as long as the store is open: a job scores many batches of the same ones. To do so
    with others: `pair_score_tensors`.
    """
    left_tensor = _rows_there(left)
    right_tensor = left_tensor if right is left else _rows_there(right)
    score, probability, position = pair_score_tensors(
        left_tensor,
        right_tensor,
        torch.from_numpy(np.array(left_index)).to(device()),
        torch.from_numpy(np.array(right_index)).to(device()),
        calibration=calibration,
        min_score=min_score,
    )
    return (
        score.cpu().numpy(),
        None if probability is None else probability.cpu().numpy(),
        None if position is None else position.cpu().numpy(),
    )


def pair_score_tensors(
    left: torch.Tensor,
    right: torch.Tensor,
    left_index: torch.Tensor,
    right_index: torch.Tensor,
    *,
    calibration: tuple[float, float] | None = None,
    min_score: float | None = None,
    grouped: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Score pairs of rows in GPU memory; the contract is that of `flipkd.kernels.pair_score.pair_score`.

    Args:
        left: [N, d] contiguous float32, bfloat16 or int8.
        right: [M, d] of the same type.
        left_index: [P] int32 or int64 on the same device.
        right_index: [P] likewise.
        calibration: (a, b) of the probability.
        min_score: keep survivors only.
        grouped: whether pairs with the same left row follow each other; None: look at the first few.

    Returns:
        score [P or survivors] float32, probability or None, position int64 or None.

    Raises:
        IndexError: an index outside -1..rows-1; nothing was read there.
        ValueError: rows that are not contiguous.
    """
    if not (left.is_contiguous() and right.is_contiguous()):
        raise ValueError("rows must be contiguous; pass rows.contiguous()")
    pairs, on = len(left_index), left.device
    score = torch.empty(pairs, dtype=torch.float32, device=on)
    probability = torch.empty_like(score) if calibration is not None else None
    if pairs:
        _score(left, right, left_index.contiguous(), right_index.contiguous(), score, probability, calibration, grouped)
    if min_score is None:
        return score, probability, None
    blocks = triton.cdiv(pairs, _COMPACT_BLOCK)
    counts = torch.empty(blocks, dtype=torch.int64, device=on)
    if blocks:
        count_kernel[(blocks,)](score, counts, pairs, min_score, BLOCK=_COMPACT_BLOCK)
    ends = torch.cumsum(counts, 0)
    survivors = int(ends[-1].item()) if blocks else 0
    kept_score = torch.empty(survivors, dtype=torch.float32, device=on)
    kept_position = torch.empty(survivors, dtype=torch.int64, device=on)
    kept_probability = torch.empty_like(kept_score) if probability is not None else None
    if survivors:
        compact_kernel[(blocks,)](
            score,
            score if probability is None else probability,
            ends,
            kept_score,
            kept_score if kept_probability is None else kept_probability,
            kept_position,
            pairs,
            min_score,
            CALIBRATE=probability is not None,
            BLOCK=_COMPACT_BLOCK,
        )
    return kept_score, kept_probability, kept_position


def shape_constants(dtype: torch.dtype, dim: int) -> dict[str, int | bool]:
    """Return what follows from the rows alone, so that a tuned launch adds up a row in the same order as any other.

    BLOCK_COLUMNS is at most what one warp loads with 16 bytes a thread: then a row lies in one warp.
    """
    int8 = dtype == torch.int8
    words = int8 and dim % 4 == 0  # a row starts on a whole int32
    widest = 128 if words or dtype == torch.float32 else 256
    columns = dim // 4 if words else dim
    return {
        "INT8": int8,
        "WORDS": words,
        "COLUMNS": columns,
        "BLOCK_COLUMNS": min(widest, triton.next_power_of_2(columns)),
    }


def _score(
    left: torch.Tensor,
    right: torch.Tensor,
    left_index: torch.Tensor,
    right_index: torch.Tensor,
    score: torch.Tensor,
    probability: torch.Tensor | None,
    calibration: tuple[float, float] | None,
    grouped: bool | None,
) -> None:
    pairs = len(left_index)
    constants = shape_constants(left.dtype, left.shape[1])
    bad_place = torch.full((1,), pairs, dtype=torch.int64, device=left.device)
    slope, offset = calibration or (0.0, 0.0)
    if grouped is None:
        grouped = _comes_in_runs(left_index)
    configs = _RUN_CONFIGS if grouped else _CONFIGS
    sizes: dict[str, int] = {}
    if _INTERPRETED or pairs < _TUNED_FROM:
        kernel = runs_kernel if grouped else score_kernel
        sizes = {**configs[0].kwargs, "num_warps": configs[0].num_warps}
    else:
        kernel = _tuned_runs_kernel if grouped else _tuned_score_kernel
    step = "CHUNK" if grouped else "BLOCK_PAIRS"
    kernel[lambda values: (triton.cdiv(pairs, values[step]),)](
        left.view(torch.int32) if constants["WORDS"] else left,
        right.view(torch.int32) if constants["WORDS"] else right,
        left_index,
        right_index,
        score,
        score if probability is None else probability,
        bad_place,
        len(left),
        len(right),
        pairs,
        slope,
        offset,
        DP4A=not _INTERPRETED and torch.version.hip is None,
        CALIBRATE=probability is not None,
        **constants,
        **sizes,
        enable_fp_fusion=False,  # rounded as it is written, whatever Triton's default
    )
    place = int(bad_place.item())
    if place < pairs:
        from flipkd.kernels.pair_score import out_of_range

        raise out_of_range(place, int(left_index[place]), int(right_index[place]), len(left), len(right))


def _comes_in_runs(left_index: torch.Tensor) -> bool:
    sample = left_index[:_SAMPLE]
    runs = 1 + int((sample[1:] != sample[:-1]).sum().item())
    return len(sample) >= _RUN * runs
