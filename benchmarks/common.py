"""What every benchmark shares: timing peers in turn, and one form of result.

A benchmark prints a table and then, as its last line, one JSON object
``{"benchmark", "correct", "ratios", "machine", "versions"}``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PACKAGES = (
    "flipkd",
    "numpy",
    "pyarrow",
    "torch",
    "transformers",
    "sentence-transformers",
    "ray",
    "duckdb",
    "polars",
    "splink",
)


def interleave(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the wall seconds of every call, by name.

    The functions run in turn, round after round, so that a slow spell of the machine hits all of them. Warm them up
    first, by checking their results, and compare medians.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(benchmark: str, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float], correct: bool) -> None:
    """Print the rows as a table and the result as one line of JSON. Of a wrong result no number is printed.

    Args:
        benchmark: its module's name.
        rows: one mapping from column to value a line; columns may differ.
        ratios: name to number; above 1 is better for flipkd.
        correct: whether the results were checked and right.
    """
    if correct and rows:
        _print_table(rows)
    elif not correct:
        print(f"{benchmark}: the result is wrong, so no timing is printed")
    result = {
        "benchmark": benchmark,
        "correct": correct,
        "ratios": dict(ratios) if correct else {},
        "machine": machine(),
        "versions": versions(),
    }
    print(json.dumps(result), flush=True)


class OutOfTimeError(BaseException):
    """Raised by ``time_limit``; no Exception, which the code that runs then may take for one of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what runs in the main thread after so many seconds, with OutOfTimeError.

    It comes when the interpreter is next in charge: a call into a library is waited for.
    """

    def out_of_time(number: int, frame: object) -> None:
        raise OutOfTimeError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def say(row: Mapping[str, Any]) -> None:
    """Print one row at once, as a line of JSON, so that a run that is broken off has told what it found."""
    print(json.dumps(row), flush=True)


def svg_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of so many inches, without a window; see ``save_svg``."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def save_svg(figure: Any, path: Path) -> None:
    """Write a figure of ``svg_figure``: the same file for the same figures (no date, names from the content)."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "flipkd"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def machine() -> dict[str, Any]:
    """Return the processor's name, the CPUs this process may use, memory in GiB, the GPU if PyTorch sees one."""
    found: dict[str, Any] = {"processor": _processor(), "cpus": len(os.sched_getaffinity(0))}
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found["load_1_minute"] = round(os.getloadavg()[0], 2)
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that benchmarks compare or use, as far as installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_bytes() -> int:
    """High-water mark of this process's resident memory.

    Not ``getrusage``: its mark survives ``exec`` and so can be that of the parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell VmHWM")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
