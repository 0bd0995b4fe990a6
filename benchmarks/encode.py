"""Encoding records: flipkd against ``SentenceTransformer.encode`` at its best batch size and dtype.

    python -m benchmarks.encode [--quick] [--texts N] [--models minilm,smollm2] [--work FOLDER]

The texts are 10,000 records of mixed length made of the 12,924 real ICD-9 descriptions: a quarter each short titles,
long titles, "short | long", and claims of two to six long titles joined by "; "; all distinct, in random order. The
models are all-MiniLM-L6-v2, and (over the first 3,000) SmolLM2-135M cut at 8 of 30 blocks as ``export`` writes it, its
LoRA untrained, which costs the same. Every peer is first tried on a sample at several batch sizes in float32 and bf16;
the best of them then runs in turn with flipkd over all texts. Before any timing, flipkd's vectors are compared with
those of sentence-transformers in float32: every cosine must be at least 0.99999 (float32), 0.999 (bf16), 0.98 (int8).

Ratios: ``vs_sentence_transformers`` (MiniLM; ``vs_sentence_transformers_smollm2``): texts per second, flipkd in bf16
over sentence-transformers at its best dtype. ``int8_over_bf16...``: flipkd in int8 over flipkd in bf16.
``gemm_share...``: of the time that PyTorch takes for the bf16 multiplications alone, at the same shapes on as many
threads, the share that flipkd's whole encoding in bf16 reaches.

With ``--work`` (a folder of ``benchmarks.quality``) the trained teachers and students there score their test pairs in
each arithmetic: F1 at the threshold that is best on the validation pairs. ``f1_points_lost_in_int8``: against bf16, the
mean and, ``_at_worst``, the most.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleave, report
from flipkd.assets import icd9_descriptions, minilm_folder, smollm2_folder

LEAST_COSINE = {"float32": 0.99999, "bf16": 0.999, "int8": 0.98}
LAYER = 8


def record_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct record texts of mixed length, in random order."""
    shuffled = random.Random(seed)
    rows = icd9_descriptions()
    texts: dict[str, None] = {}
    while len(texts) < count:
        _, long, short = shuffled.choice(rows)
        kind = len(texts) % 4
        if kind == 3:
            text = "; ".join(row[1] for row in shuffled.sample(rows, shuffled.randint(2, 6)))
        else:
            text = (short, long, f"{short} | {long}")[kind]
        texts[text] = None
    return list(texts)


def least_cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Smallest cosine between rows, computed in float64."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return float(((left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)).min())


def exported_student(folder: Path, texts: list[str]) -> Path:
    """SmolLM2's lower blocks as ``export`` writes them, before any training."""
    from flipkd.models.adapter import new_student
    from flipkd.models.export import export_student
    from flipkd.models.options import StudentOptions

    student = new_student(StudentOptions(str(smollm2_folder()), layer=LAYER))
    export_student(student, folder, sample_texts=texts[:64])
    return folder


def multiplications(folder: Path) -> list[tuple[int, int]]:
    """(inputs, outputs) of every multiplication of a token, block after block."""
    import json

    config = json.loads((folder / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    joined = (heads + 2 * config.get("num_key_value_heads", heads)) * head
    wide = 2 * inner if config["model_type"] == "llama" else inner
    block = [(width, joined), (heads * head, width), (width, wide), (inner, width)]
    return block * int(config["num_hidden_layers"])


def gemm_seconds(folder: Path, tokens: int, threads: int) -> float:
    """Seconds that PyTorch takes for the multiplications of so many tokens in bf16, alone, on so many threads."""
    import torch

    rows = 1024
    operands = [
        (torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16())
        for inputs, outputs in multiplications(folder)
    ]

    def work(count: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            for _ in range(count):
                for left, right in operands:
                    torch.nn.functional.linear(left, right)

    passes = 8
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [1] * threads))
        started = time.perf_counter()
        list(pool.map(work, [passes] * threads))
        seconds = time.perf_counter() - started
    return seconds * tokens / (passes * threads * rows)


def measure(
    name: str, folder: Path, texts: list[str], quick: bool
) -> tuple[list[dict[str, Any]], dict[str, float], bool]:
    """Rows of the table, ratios, and whether the vectors are right, of one model."""
    import torch
    from sentence_transformers import SentenceTransformer

    from flipkd.models.encoder import load_encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers = {
        dtype: SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": kind})
        for dtype, kind in (("float32", torch.float32), ("bf16", torch.bfloat16))
    }
    encoders = {dtype: load_encoder(folder, dtype=dtype, device=device) for dtype in LEAST_COSINE}
    expected = np.asarray(peers["float32"].encode(texts, batch_size=64))
    cosines = {dtype: least_cosine(encoder.encode(texts), expected) for dtype, encoder in encoders.items()}
    if any(cosines[dtype] < least for dtype, least in LEAST_COSINE.items()):
        return [], {}, False

    def peer_run(dtype: str, batch_size: int, some: list[str]) -> Callable[[], Any]:
        return lambda: peers[dtype].encode(some, batch_size=batch_size)

    def own_run(dtype: str) -> Callable[[], Any]:
        return lambda: encoders[dtype].encode_texts(texts)

    sample = texts[: 200 if quick else 600]
    batch_sizes = (32, 128) if quick else (16, 32, 64, 128)
    trials = {f"{dtype} {size}": peer_run(dtype, size, sample) for dtype in peers for size in batch_sizes}
    peer_run("bf16", 32, sample)()
    tried = {key: min(seconds) for key, seconds in interleave(trials, 1).items()}
    best = min(tried, key=tried.__getitem__)
    tokens = int(encoders["bf16"].encode_texts(texts).tokens.sum())
    threads = encoders["bf16"].threads
    runs: dict[str, Callable[[], Any]] = {
        f"sentence-transformers {best}": peer_run(best.split()[0], int(best.split()[1]), texts),
        **{f"flipkd {dtype}": own_run(dtype) for dtype in ("bf16", "int8")},
        "tokenising alone": lambda: encoders["bf16"]._tokenizer.tokenize(texts),
    }
    seconds = {run: statistics.median(values) for run, values in interleave(runs, 1 if quick else 3).items()}
    alone = gemm_seconds(folder, tokens, threads)
    flops = 2.0 * sum(inputs * outputs for inputs, outputs in multiplications(folder)) * tokens
    peer, own, int8 = (seconds[run] for run in list(runs)[:3])
    rows = [
        {
            "model": name,
            "encoder": run,
            "texts/s": round(len(texts) / value),
            "seconds": round(value, 2),
            "GFLOP/s": "" if run.startswith("token") else round(flops / value / 1e9),
        }
        for run, value in seconds.items()
    ]
    rows.append({"model": name, "encoder": "bf16 multiplications alone", "seconds": round(alone, 2),
                 "GFLOP/s": round(flops / alone / 1e9)})  # fmt: skip
    rows.append({"model": name, "encoder": "of flipkd bf16: multiplications", "share": f"{alone / own:.2f}"})
    rows.append({"model": name, "encoder": "of flipkd bf16: tokenising (other thread)",
                 "share": f"{seconds['tokenising alone'] / own / threads:.2f}"})  # fmt: skip
    rows.append({"model": name, "encoder": "MFLOP per text", "share": round(flops / len(texts) / 1e6)})
    rows += [{"model": name, "encoder": f"flipkd {key} least cosine", "share": f"{value:.6f}"}
             for key, value in cosines.items()]  # fmt: skip
    end = "" if name == "minilm" else f"_{name}"
    ratios = {
        f"vs_sentence_transformers{end}": peer / own,
        f"int8_over_bf16{end}": own / int8,
        f"gemm_share{end}": alone / own,
    }
    return rows, ratios, True


def quality_by_dtype(work: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """F1 of trained encoders in each arithmetic, and the points that int8 loses against bf16."""
    from benchmarks.quality_sets import read_pairs
    from benchmarks.quality_trial import Settings, pairs_folder
    from flipkd.demo.evaluation import quality
    from flipkd.models.encoder import load_encoder
    from flipkd.models.export import export

    rows: list[dict[str, Any]] = []
    lost = []
    for trial in sorted(work.glob("*-labels-1-seed-*")):
        dataset, _, rest = trial.name.partition("-labels-")
        seed = rest.split("-")[2]
        pairs_of = pairs_folder(work, Settings()) / dataset
        validation, test = (read_pairs(pairs_of / f"{name}.parquet") for name in ("validation", "test"))
        with tempfile.TemporaryDirectory() as folder:
            teacher = trial / "teacher-encoder"
            encoders = {"teacher": teacher} if teacher.exists() else {}  # it may still be trained
            for run in sorted(trial.glob("runs/*")):
                if (run / "adapter").exists():
                    encoders[run.name] = Path(folder) / run.name
                    export(str(run), str(encoders[run.name]))
            for name, path in encoders.items():
                found: dict[str, float] = {}
                for dtype in LEAST_COSINE:
                    encoder = load_encoder(path, dtype=dtype)
                    scores = [
                        (encoder.encode(list(pairs.left_text)) * encoder.encode(list(pairs.right_text))).sum(1)
                        for pairs in (validation, test)
                    ]
                    result = quality(validation.label, scores[0], test.label, scores[1])
                    found[dtype] = result.f1
                    rows.append({"model": f"{dataset} {name} {seed}", "encoder": f"flipkd {dtype}",
                                 "F1": f"{result.f1:.4f}", "AUC": f"{result.auc:.4f}"})  # fmt: skip
                lost.append(100 * (found["bf16"] - found["int8"]))
    return rows, {"f1_points_lost_in_int8": statistics.mean(lost), "f1_points_lost_in_int8_at_worst": max(lost)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="600 texts, one round")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--models", default="minilm,smollm2")
    parser.add_argument("--work", type=Path, help="folder of benchmarks.quality with trained models")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    texts = record_texts(600 if arguments.quick else arguments.texts)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    correct = True
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models.split(","):
            place = minilm_folder() if name == "minilm" else exported_student(Path(folder) / "smollm2", texts)
            some = texts if name == "minilm" else texts[:3000]
            more, found, right = measure(name, place, some, arguments.quick)
            rows, ratios, correct = rows + more, ratios | found, correct and right
    if arguments.work is not None:
        more, lost = quality_by_dtype(arguments.work)
        rows, ratios = rows + more, ratios | lost
    report("encode", rows, {name: round(value, 3) for name, value in ratios.items()}, correct)


if __name__ == "__main__":
    main()
