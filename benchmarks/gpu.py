"""The GPU kernels against the memory of the GPU: pair_score and pool_project.

    python -m benchmarks.gpu [--quick] [--rows N] [--pairs N] [--limit SECONDS]

On a CUDA machine: a copy kernel gives the bandwidth of device memory that this GPU reaches; pair_score scores rows of
128 numbers, int8 and bf16, random and in runs of 20 pairs with the same left row, and its rate is held against the rate
at which that bandwidth could bring the bytes; pool_project is held against the same steps in PyTorch, compiled and not.
Results are checked first, and bytes are counted as the least that must move: for random pairs two rows, two int32
indices and one float32 score; for runs a twentieth of the left row. Each row is also printed as soon as it is known,
and what is not done after `--limit` seconds is left out. Ratios: `pair_score_*` is the share of the limit (1 is the
limit, the goal is 0.8), `pool_project_*` is how many times faster than PyTorch.

Without a CUDA GPU nothing is measured: the same limits are computed from the data sheet of an H100 and printed as such.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.common import OutOfTimeError, report, say, time_limit
from flipkd.vectors.rows import quantise

_DEVICE = "cuda"
_DIM = 128
_GROUP = 20  # pairs per left row
_ROW_BYTES = {"int8": _DIM, "bf16": 2 * _DIM}
_MAX_ERROR = {"int8": 1e-2, "bf16": 4e-3}
_CHECKED = 200_000  # pairs
_CHECKED_TEXTS = 2_000
_H100_BYTES_PER_SECOND = 3.35e12  # SXM, data sheet
_GOAL = 0.8
_WIDTH, _TOKENS = 576, 40  # SmolLM2-135M, and the tokens of a record


def pair_bytes(dtype: str, order: str) -> float:
    """Return the bytes that a pair must move: rows, two int32 indices, a float32 score."""
    left = 1.0 if order == "random" else 1 / _GROUP
    return _ROW_BYTES[dtype] * (1 + left) + 2 * 4 + 4


def text_bytes(width: int, tokens: int, dim: int) -> float:
    """Return the bytes that pool_project must move for a text: bf16 states in, an int8 row and a flag out."""
    return 2.0 * width * tokens + dim + 1


def on_paper() -> list[dict[str, Any]]:
    """Return the limits that the data sheet of an H100 sets; nothing here is measured."""
    rows = []
    for dtype in ("int8", "bf16"):
        for order in ("random", "grouped"):
            limit = _H100_BYTES_PER_SECOND / pair_bytes(dtype, order)
            rows.append(
                {
                    "not measured: H100 on paper": f"pair_score {dtype} {order}",
                    "bytes_each": round(pair_bytes(dtype, order), 1),
                    "limit_million_per_second": round(limit / 1e6),
                    "at_0.8": round(_GOAL * limit / 1e6),
                }
            )
    each = text_bytes(_WIDTH, _TOKENS, _DIM)
    limit = _H100_BYTES_PER_SECOND / each
    rows.append(
        {
            "not measured: H100 on paper": f"pool_project {_TOKENS} tokens x {_WIDTH} bf16 to {_DIM} int8",
            "bytes_each": round(each),
            "limit_million_per_second": round(limit / 1e6, 1),
            "at_0.8": round(_GOAL * limit / 1e6, 1),
        }
    )
    return rows


def median_seconds(function: Callable[[], Any], rounds: int) -> float:
    """Return the median time between events on the device, after a warm-up that also tunes."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        begin, end = (torch.Event(_DEVICE, enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return float(np.median(times))


def copy_bandwidth(rounds: int, size: int = 1 << 31) -> float:
    """Return the bytes per second, read and written, of a copy of `size` bytes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=_DEVICE)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), rounds)
    if not torch.equal(source, target):
        raise RuntimeError("a copy differs from its source")
    return 2 * source.nbytes / seconds


def make_table(rows: int, dtype: str) -> torch.Tensor:
    """Return [rows, _DIM] unit rows in device memory."""
    generator = torch.Generator(device=_DEVICE).manual_seed(1)
    parts = []
    for start in range(0, rows, 1 << 20):
        part = torch.randn(min(1 << 20, rows - start), _DIM, generator=generator, device=_DEVICE)
        part /= part.norm(dim=1, keepdim=True)
        if dtype == "int8":  # the rule of `quantise`, on the device
            part = (part / part.abs().amax(1, keepdim=True) * 127).round()
        parts.append(part.to(torch.int8 if dtype == "int8" else torch.bfloat16))
    return torch.cat(parts)


def pair_score_rows(
    options: argparse.Namespace, bandwidth: float, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, float], bool]:
    """Check and time pair_score; return table rows, ratios and whether all was right."""
    from flipkd.kernels.pair_score.gpu import pair_score_tensors

    generator = torch.Generator(device=_DEVICE).manual_seed(2)
    left, right = (
        torch.randint(options.rows, (options.pairs,), generator=generator, device=_DEVICE, dtype=torch.int32)
        for _ in range(2)
    )
    runs = left[: -(-options.pairs // _GROUP)].repeat_interleave(_GROUP)[: options.pairs]
    rows, ratios, correct = [], {}, True
    for dtype in ("int8", "bf16"):
        table = make_table(options.rows, dtype)
        for order, left_index in (("random", left), ("grouped", runs)):
            grouped = order == "grouped"
            some, others = left_index[:_CHECKED].long(), right[:_CHECKED].long()
            a, b = table[some].double(), table[others].double()
            exact = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
            score, _, position = pair_score_tensors(table, table, left_index, right, min_score=0.1, grouped=grouped)
            plain, _, _ = pair_score_tensors(table, table, left_index, right, grouped=grouped)
            assert position is not None
            error = float((plain[:_CHECKED] - exact).abs().max())
            kept = torch.nonzero(plain >= 0.1).flatten()
            right_order = torch.equal(position, kept) and torch.equal(score, plain[kept])
            correct &= error <= _MAX_ERROR[dtype] and right_order
            if not correct:
                say({"what": f"pair_score {dtype} {order}", "wrong": error, "survivors are right": right_order})
            call = partial(pair_score_tensors, table, table, left_index, right, grouped=grouped)
            seconds = median_seconds(call, rounds)
            rate = options.pairs / seconds
            limit = bandwidth / pair_bytes(dtype, order)
            ratios[f"pair_score_{dtype}_{order}"] = rate / limit
            rows.append(
                {
                    "what": f"pair_score {dtype} {order}",
                    "milliseconds": round(seconds * 1000, 2),
                    "million_per_second": round(rate / 1e6),
                    "limit_million_per_second": round(limit / 1e6),
                    "share": round(rate / limit, 3),
                    "tuned": _tuned(grouped),
                }
            )
            if correct:
                say(rows[-1])
        del table
    return rows, ratios, correct


def _tuned(grouped: bool) -> str:
    """The sizes that were the fastest."""
    from flipkd.kernels.pair_score import gpu

    best = getattr(gpu._tuned_runs_kernel if grouped else gpu._tuned_score_kernel, "best_config", None)
    return "" if best is None else f"{best.kwargs} warps {best.num_warps}".replace("'", "")


def pool_project_rows(
    texts: int, bandwidth: float, rounds: int, limit: float = 60.0
) -> tuple[list[dict[str, Any]], dict[str, float], bool]:
    """Check and time pool_project against the same steps in PyTorch."""
    from flipkd.kernels.pool_project import pool_project

    generator = torch.Generator(device=_DEVICE).manual_seed(3)
    lengths = torch.randint(1, 2 * _TOKENS, (texts,), generator=generator, device=_DEVICE)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    total = int(starts[-1])
    states = torch.randn(total, _WIDTH, generator=generator, device=_DEVICE).bfloat16()
    weight = torch.rand(_WIDTH, generator=generator, device=_DEVICE) + 0.5
    projection = torch.randn(_DIM, _WIDTH, generator=generator, device=_DEVICE) * _WIDTH**-0.5
    text_of = torch.repeat_interleave(torch.arange(texts, device=_DEVICE), lengths)

    def steps() -> torch.Tensor:
        wide = states.float()
        normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6) * weight
        pooled = torch.zeros(texts, _WIDTH, device=_DEVICE).index_add_(0, text_of, normed) / lengths[:, None]
        unit = torch.nn.functional.normalize(pooled @ projection.T, dim=1)
        return (unit / unit.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)

    def kernel() -> torch.Tensor:
        return pool_project(states, starts, projection, norm_weight=weight, dtype="int8", backend="triton").rows

    some = min(texts, _CHECKED_TEXTS)
    end = int(starts[some])
    exact = pool_project(
        states[:end].cpu(), starts[: some + 1].cpu(), projection.cpu(), norm_weight=weight.cpu(), backend="reference"
    ).rows.numpy()
    stored = torch.from_numpy(quantise(exact, "int8").values).int()
    ways = {"pool_project": kernel, "PyTorch, step by step": steps, "PyTorch, torch.compile": torch.compile(steps)}
    correct, seconds = True, {}
    for name, way in ways.items():
        try:
            with time_limit(limit):
                found = way()[:some].cpu().int()
                largest = int((found - stored).abs().max())
                if largest > 1:
                    correct = False
                    say({"what": name, "wrong": largest})
                seconds[name] = median_seconds(way, rounds)
        except OutOfTimeError:
            say({"what": name, "left out": f"not done after {limit:g} s"})
    ideal = (2 * _WIDTH * total + texts * (_DIM + 1)) / bandwidth
    rows = [
        {
            "what": f"{name}, {texts} texts, {total} tokens",
            "milliseconds": round(value * 1000, 3),
            "million_per_second": round(texts / value / 1e6, 2),
            "limit_million_per_second": round(texts / ideal / 1e6, 2),
            "share": round(ideal / value, 3),
        }
        for name, value in seconds.items()
    ]
    for row in rows if correct else ():
        say(row)
    own = seconds["pool_project"]
    ratios = {"pool_project_of_limit": ideal / own}
    for ratio, peer in (("vs_pytorch", "PyTorch, step by step"), ("vs_compiled", "PyTorch, torch.compile")):
        if peer in seconds:
            ratios[f"pool_project_{ratio}"] = seconds[peer] / own
    return rows, ratios, correct


def main() -> int:
    """Measure on a GPU, or print the limits on paper; then the line of JSON."""
    parser = argparse.ArgumentParser(description="the GPU kernels against the memory of the GPU")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--quick", action="store_true", help="20 million pairs, 5 rounds")
    parser.add_argument("--limit", type=float, default=25.0, help="seconds for a part")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA GPU here, so nothing is measured. What the memory of an H100 would allow, on paper:")
        report("gpu", on_paper(), {}, True)
        return 0
    rounds = 5 if options.quick else 20
    if options.quick:
        options.pairs = min(options.pairs, 20_000_000)
    bandwidth = copy_bandwidth(rounds)
    say({"what": "copy of device memory", "terabytes_per_second": round(bandwidth / 1e12, 3)})
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    right = True
    try:
        with time_limit(2 * options.limit):
            rows, ratios, right = pair_score_rows(options, bandwidth, rounds)
    except OutOfTimeError as error:
        say({"what": "pair_score", "left out": str(error)})
    more_rows, more_ratios, also_right = pool_project_rows(20_000, bandwidth, rounds, options.limit)
    correct = right and also_right
    if correct:
        print(
            f"device memory: {bandwidth / 1e12:.2f} TB/s in a copy; rows {options.rows}, pairs {options.pairs}; "
            f"triton {importlib.metadata.version('triton')}"
        )
    all_ratios = {name: round(value, 3) for name, value in {**ratios, **more_ratios}.items()}
    report("gpu", [*rows, *more_rows], all_ratios, correct)
    return 0 if correct else 1


if __name__ == "__main__":
    raise SystemExit(main())
