"""The ladder: the same pairs scored by every tool a user would pick instead, whole processes, Parquet to Parquet.

    python -m benchmarks.ladder [--quick] [--ratio 20] [--records 10000] [--vllm-python PYTHON] [--picture FILE]

Records are the real texts of ``benchmarks.encode``; pairs are random, ``--ratio`` times as many as records. The model
is all-MiniLM-L6-v2. Every rung reads records (id, text) and pairs (left_id, right_id) and writes left_id, right_id and
score.

    1  sentence-transformers on every pair as given (both texts of each pair are encoded)
    2  sentence-transformers on distinct texts, then gather and ``pairwise_cos_sim``
    3  Ray Data: texts encoded by sentence-transformers in actors, then the same gather
    4  vLLM (pooling runner, an environment of its own: ``--vllm-python``; left out without one), then the same gather
    5  flipkd, cold: ``flipkd-batch score --encoder --records``
    5b the same with ``--encoder-dtype int8``
    6  flipkd, warm: the same again into another folder, vectors kept by ``--cache``
    7  flipkd, resumed after SIGKILL at about half of a cold run

All but 5b compute in bf16, the faster dtype here (``benchmarks.encode``). Where pairs are many, rung 1 runs over the
first ``--as-given-pairs`` of them and the time beyond its start-up is scaled up: its work is proportional to pairs.
Scores of every rung are compared with float32 sentence-transformers: the largest difference, and the pairs that change
sides at 0.7. A rung that is off by more than 0.03 (5b: 0.06, int8 rounds what every multiplication takes in) makes the
result wrong.

Ratios: ``cold_vs_best_peer`` (best of 1 to 4), ``cold_int8_vs_best_peer``, ``warm_vs_best_peer``, and
``resumed_over_cold`` (below 1).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import report, save_svg, svg_figure
from benchmarks.encode import record_texts
from benchmarks.ladder_peers import PEERS
from flipkd.assets import minilm_folder

TOLERANCE = {"5b": 0.06}
OTHERS_TOLERANCE = 0.03
THRESHOLD = 0.7
VLLM_SCRIPT = Path(__file__).parent / "ladder_vllm.py"
NAMES = {
    "1": "sentence-transformers, every pair",
    "2": "sentence-transformers, distinct texts",
    "3": "Ray Data, distinct texts",
    "4": "vLLM, distinct texts",
    "5": "flipkd, cold",
    "5b": "flipkd, cold, int8",
    "6": "flipkd, warm cache",
    "7": "flipkd, resumed after SIGKILL",
}


def write_input(folder: Path, records: int, pairs: int) -> None:
    """Records and pairs as Parquet, in a few files each."""
    texts = record_texts(records)
    chosen = np.random.default_rng(0).integers(0, records, (2, pairs))
    for name, table, files in (
        ("records", pa.table({"id": pa.array(range(records)), "text": texts}), 4),
        ("pairs", pa.table({"left_id": chosen[0], "right_id": chosen[1]}), 4),
    ):
        (folder / name).mkdir()
        rows = -(-len(table) // files)
        for part in range(files):
            pq.write_table(table.slice(part * rows, rows), folder / name / f"part-{part}.parquet")


def scores_of(folder: Path) -> npt.NDArray[np.float32]:
    """Scores in the order of the pairs."""
    files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    found: npt.NDArray[np.float32] = pq.read_table(files[0]).column("score").to_numpy()
    return np.concatenate([found, *(pq.read_table(file).column("score").to_numpy() for file in files[1:])])


def timed(command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Seconds of a whole process.

    Raises:
        RuntimeError: it fails.
    """
    started = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])} ... failed:\n{done.stderr[-3000:]}")
    return seconds


def peer(rung: str, folder: Path, pairs: int | None = None, dtype: str = "bf16") -> tuple[float, Path]:
    """Seconds of a peer, and the folder of its scores."""
    output = folder / f"scores-{rung}-{pairs}-{dtype}"
    command = [sys.executable, "-m", "benchmarks.ladder_peers", rung, str(folder), str(output), "--dtype", dtype]
    if pairs is not None:
        command += ["--pairs", str(pairs)]
    return timed(command), output


def vllm(python: Path, folder: Path) -> tuple[float, Path]:
    """vLLM's process makes the vectors; the gather is the peers' own."""
    output, vectors = folder / "scores-4", folder / "vllm.npy"
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    texts = folder / "texts.json"
    started = time.perf_counter()
    texts.write_text(json.dumps(pq.read_table(folder / "records").column("text").to_pylist()))
    # Its process may abort at its end after correct work: what it wrote counts.
    subprocess.run(
        [str(python), str(VLLM_SCRIPT), str(minilm_folder()), str(texts), str(vectors)],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    if not vectors.exists():
        raise RuntimeError("vLLM wrote no vectors")
    seconds = time.perf_counter() - started
    command = [sys.executable, "-m", "benchmarks.ladder_peers", "gather", str(folder), str(output)]
    return seconds + timed([*command, "--vectors", str(vectors)]), output


def flipkd_command(folder: Path, output: str, cache: str, dtype: str = "bf16") -> list[str]:
    """``flipkd-batch score`` over the input of this run."""
    return [
        sys.executable, "-m", "flipkd.cli", "score", "--encoder", str(minilm_folder()), "--encoder-dtype", dtype,
        "--records", str(folder / "records"), "--pairs", str(folder / "pairs"), "--output", str(folder / output),
        "--cache", str(folder / cache), "--columns", "left_id,right_id,score", "--no-progress",
    ]  # fmt: skip


def killed_and_resumed(folder: Path, cold_seconds: float) -> tuple[float, Path]:
    """Seconds of the second try, after the first was killed when about half of a cold run's time was over."""
    command = flipkd_command(folder, "scores-7", "cache-7")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(0.55 * cold_seconds)
    if first.poll() is not None:
        raise RuntimeError("the run to be killed had ended already; use more records")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    return timed(command), folder / "scores-7"


def picture(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of seconds, one a rung, on a logarithmic axis."""
    figure = svg_figure(8, 3.2)
    axes = figure.subplots()
    labels = [row["rung"] for row in rows][::-1]
    seconds = [row["seconds"] for row in rows][::-1]
    colours = ["#1f6f8b" if label[3:].startswith("flipkd") else "#b8b8b8" for label in labels]
    bars = axes.barh(labels, seconds, color=colours)
    axes.bar_label(bars, [f" {value:.3g} s" for value in seconds])
    axes.set(xscale="log", xlabel="seconds, whole process, Parquet to Parquet (shorter is better)", title=title)
    axes.set_xlim(right=max(seconds) * 3)
    axes.spines[["top", "right"]].set_visible(False)
    save_svg(figure, path)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="600 records")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--ratio", type=int, default=20, help="pairs per record")
    parser.add_argument("--as-given-pairs", type=int, default=5_000, help="pairs that rung 1 runs over")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM")
    parser.add_argument("--picture", type=Path, help="SVG file")
    arguments = parser.parse_args()
    records = 600 if arguments.quick else arguments.records
    pairs = records * arguments.ratio

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder, records, pairs)
        _, exact = peer("2", folder, dtype="float32")
        expected = scores_of(exact)

        found: dict[str, tuple[float, Path]] = {}
        some = min(arguments.as_given_pairs, pairs)
        start, _ = peer("1", folder, pairs=1)
        seconds, output = peer("1", folder, pairs=some)
        found["1"] = (start + (seconds - start) * pairs / some, output)
        for rung in PEERS:
            if rung not in ("1", "gather"):
                found[rung] = peer(rung, folder)
        if arguments.vllm_python is not None:
            found["4"] = vllm(arguments.vllm_python, folder)
        found["5"] = timed(flipkd_command(folder, "scores-5", "cache-5")), folder / "scores-5"
        found["5b"] = timed(flipkd_command(folder, "scores-5b", "cache-5b", "int8")), folder / "scores-5b"
        found["6"] = timed(flipkd_command(folder, "scores-6", "cache-5")), folder / "scores-6"
        if not arguments.quick:
            found["7"] = killed_and_resumed(folder, found["5"][0])

        rows, correct = [], True
        for rung in sorted(found):
            seconds, output = found[rung]
            scores = scores_of(output)
            wanted = expected[: len(scores)]
            off = float(np.abs(scores - wanted).max())
            correct &= off <= TOLERANCE.get(rung, OTHERS_TOLERANCE) and len(scores) == (some if rung == "1" else pairs)
            rows.append(
                {
                    "rung": f"{rung:<2} {NAMES[rung]}",
                    "seconds": round(seconds, 2),
                    "pairs/s": round(pairs / seconds),
                    "largest difference": f"{off:.5f}",
                    "flips at 0.7": int(np.count_nonzero((scores >= THRESHOLD) != (wanted >= THRESHOLD))),
                }
            )
    best = min(found[rung][0] for rung in found if rung <= "4")
    ratios = {
        "cold_vs_best_peer": best / found["5"][0],
        "cold_int8_vs_best_peer": best / found["5b"][0],
        "warm_vs_best_peer": best / found["6"][0],
        **({"resumed_over_cold": found["7"][0] / found["5"][0]} if "7" in found else {}),
    }
    if arguments.picture is not None and correct:
        picture(rows, arguments.picture, f"{pairs:,} pairs of {records:,} records")
    report("ladder", rows, {key: round(value, 2) for key, value in ratios.items()}, correct)


if __name__ == "__main__":
    main()
