"""Encoding records on a GPU: flipkd in bf16 against sentence-transformers in float16, both from texts to vectors.

    python -m benchmarks.gpu_encode [--texts N] [--models minilm,smollm2] [--limit SECONDS] [--profile]
    python -m benchmarks.gpu_encode --prepare --work FOLDER    (makes the encoders alone; without a GPU too)

The texts are made: each joins a few real descriptions of ICD-10-CM codes and their inclusion terms with "; ", drawn at
random, so that they have about 40 tokens; all distinct, in random order. The models are all-MiniLM-L6-v2, and
SmolLM2-135M cut at 7 of 30 blocks as ``export`` writes it, its LoRA untrained, which costs the same (`shape`: the same
shape with random weights and MiniLM's tokenizer, where SmolLM2 cannot be had).

sentence-transformers runs as its users run it: float16, scaled_dot_product_attention, sorted by length as it does by
itself, vectors left on the GPU until the end. The best of three batch sizes counts. Vectors are compared before any
timing: every cosine must be at least 0.998 (bf16) or 0.98 (int8). The two then run in turn, the peer on the first
16,384 texts: it takes several times as long. "model alone" starts from token ids in main memory (flipkd) or in GPU
memory (the peer); "host alone" makes the batches that the model is given. "PyTorch's operations" is flipkd without its
Triton kernels between the multiplications (FLIPKD_ENCODER_OPS=reference).

TFLOP/s count the multiplications with weights, not attention; `gemm_share` is their share of the best bf16 matrix
multiplication of this run. Each row is printed as soon as it is known. Ratios: `vs_sentence_transformers...` is texts/s
over the peer's at its best, from texts to vectors; `model_vs_sentence_transformers...` the same of the models alone.
Without a CUDA GPU nothing is measured: texts per second that the data sheet of an H100 allows are printed as such.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import OutOfTimeError, interleave, report, say, time_limit
from benchmarks.encode import least_cosine, multiplications
from benchmarks.gpu_encode_peer import DEVICE, Peer, device_seconds
from flipkd.assets import minilm_folder, smollm2_folder
from flipkd.demo.icd10 import icd10_inclusions
from flipkd.errors import FlipkdError
from flipkd.models.encoder import Encoder, load_encoder

LAYER = 7
_CHECKED = 4_000  # texts
_TRIED = 16_384  # texts that the peer encodes
_LEAST_COSINE = {"bf16": 0.998, "int8 rows": 0.98}
_H100_FLOPS = 989.4e12  # SXM, dense bf16, data sheet
_TOKENS = 40  # of a text, on paper


def record_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of about 40 tokens, joined of real ones; see the module's docstring."""
    phrases = list(dict.fromkeys(phrase for row in icd10_inclusions() for phrase in (row.description, row.term)))
    shuffled = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts["; ".join(shuffled.sample(phrases, shuffled.randint(2, 6)))] = None
    return list(texts)


def encoder_folder(name: str, work: Path) -> Path:
    """The folder of a model; made in ``work`` where it is none that is fetched."""
    if name == "minilm":
        return minilm_folder()
    if (work / name).exists():  # an export is there whole or not at all
        return work / name
    from flipkd.models.adapter import new_student
    from flipkd.models.export import export_student
    from flipkd.models.options import StudentOptions

    base = smollm2_folder() if name == "smollm2" else _shape_of_smollm2(work / "base")
    student = new_student(StudentOptions(str(base), layer=LAYER))
    export_student(student, work / name, ["acute kidney failure"])
    return work / name


def _shape_of_smollm2(folder: Path) -> Path:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_folder()))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYER + 1,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def best_gemm(folders: list[Path]) -> float:
    """FLOP per second of the best bf16 multiplication: a large square one, and those of the models."""
    shapes = {(8192, 8192, 8192), *((65536, *shape) for folder in folders for shape in multiplications(folder))}
    best = 0.0
    for rows, inputs, outputs in sorted(shapes):
        left = torch.randn(rows, inputs, device=DEVICE).bfloat16()
        right = torch.randn(outputs, inputs, device=DEVICE).bfloat16()
        seconds = min(device_seconds(lambda: torch.nn.functional.linear(left, right)) for _ in range(10))  # noqa: B023
        rate = 2.0 * rows * inputs * outputs / seconds
        say({"what": f"bf16 multiplication {rows} x {inputs} x {outputs}", "TFLOP/s": round(rate / 1e12)})
        best = max(best, rate)
    return best


def _in_short_turns(function: Callable[[], Any]) -> None:
    """With threads of Python that give way to each other after 0.2 ms, not 5: does the GPU wait for the tokenizer?"""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        function()
    finally:
        sys.setswitchinterval(usual)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Without flipkd's Triton kernels between the multiplications."""
    os.environ["FLIPKD_ENCODER_OPS"] = "reference"
    try:
        yield
    finally:
        del os.environ["FLIPKD_ENCODER_OPS"]


def host_batches(encoder: Encoder, texts: list[str]) -> list[tuple[np.ndarray, ...]]:
    """What the encoder's model is given: tokens of the texts, packed."""
    from flipkd.models.batches import packed_batches, tokenized_chunks
    from flipkd.models.device import MAX_TOKENS, TOKENIZER_THREADS

    chunks = tokenized_chunks(encoder._tokenizer, texts, TOKENIZER_THREADS[DEVICE])
    return list(packed_batches(chunks, MAX_TOKENS[DEVICE], True))


def run_model(encoder: Encoder, batches: list[tuple[np.ndarray, ...]]) -> None:
    """The model alone, two batches at once as in ``encode_texts``."""
    from flipkd.models.parallel import run_batches

    for _ in run_batches(batches, encoder._model, None, encoder.device, encoder.threads):
        pass


def profile(encoder: Encoder, batches: list[tuple[np.ndarray, ...]]) -> str:
    """Where the GPU's time goes in two batches: PyTorch's table of kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    full = sorted(batches, key=lambda batch: -len(batch[1]))[:2]
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run_model(encoder, full)
        torch.cuda.synchronize()
    return str(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))


def measure(
    name: str, folder: Path, texts: list[str], gemm: float, rounds: int, shows: bool
) -> tuple[list[dict[str, Any]], dict[str, float], bool]:
    """Rows of the table, ratios, and whether the vectors are right, of one model."""
    rows: list[dict[str, Any]] = []

    def add(what: str, seconds: float, count: int = len(texts), flops: float = 0.0) -> None:
        row = {"model": name, "what": what, "texts/s": round(count / seconds), "seconds": round(seconds, 3)}
        if flops:
            row |= {"TFLOP/s": round(flops / seconds / 1e12, 1), "of best GEMM": round(flops / seconds / gemm, 3)}
        rows.append(row)
        say(row)

    encoder = load_encoder(folder, dtype="bf16", device=DEVICE)
    checked = texts[:_CHECKED]
    peer = Peer(folder, checked)
    wanted = peer.encode(checked)
    stored = encoder.encode_rows(checked, "int8").rows.values
    cosines = {
        "bf16": least_cosine(encoder.encode(checked), wanted),
        "int8 rows": least_cosine(stored.astype(np.float32), wanted),
    }
    say({"model": name, "peer": f"sentence-transformers {peer.dtype}", "least cosine": cosines})
    if any(cosines[way] < least for way, least in _LEAST_COSINE.items()):
        return [], {}, False

    fewer = texts[:_TRIED]
    for size, rate in peer.choose(fewer).items():
        add(f"sentence-transformers, trial, batch size {size}", len(fewer) / rate, len(fewer))
    encoded = encoder.encode_texts(texts)
    tokens = int(encoded.tokens.sum())
    flops = 2.0 * sum(inputs * outputs for inputs, outputs in multiplications(folder)) * tokens
    say({"model": name, "tokens per text": round(tokens / len(texts), 1),
         "GFLOP per text": round(flops / len(texts) / 1e9, 3)})  # fmt: skip

    theirs = f"sentence-transformers {peer.dtype}, batch size {peer.batch_size}"
    whole: dict[str, Callable[[], Any]] = {
        "flipkd bf16": lambda: encoder.encode_texts(texts),
        "flipkd bf16, int8 rows": lambda: encoder.encode_rows(texts, "int8"),
        "flipkd bf16, short turns": lambda: _in_short_turns(lambda: encoder.encode_texts(texts)),
        theirs: lambda: peer.encode(fewer),
    }
    seconds = {way: statistics.median(each) for way, each in interleave(whole, rounds).items()}
    seconds[theirs] *= len(texts) / len(fewer)
    for way, value in seconds.items():
        add(way, value, flops=flops)
    batches = host_batches(encoder, texts)
    add("flipkd, host alone", min(device_seconds(lambda: host_batches(encoder, texts)) for _ in range(rounds)))
    features = peer.features(fewer)
    add("sentence-transformers, host alone", device_seconds(lambda: peer.features(fewer)), len(fewer))
    with plain_operations():
        run_model(encoder, batches)
        plain = min(device_seconds(lambda: run_model(encoder, batches)) for _ in range(rounds))
    run_model(encoder, batches)
    peer.forward(features)
    own = min(device_seconds(lambda: run_model(encoder, batches)) for _ in range(rounds))
    other = min(device_seconds(lambda: peer.forward(features)) for _ in range(rounds)) * len(texts) / len(fewer)
    for way, value in (("flipkd, model alone", own), ("flipkd, model alone, PyTorch's operations", plain),
                       ("sentence-transformers, model alone", other)):  # fmt: skip
        add(way, value, flops=flops)
    if shows:
        print(profile(encoder, batches), flush=True)
    end = "" if name == "minilm" else f"_{name}"
    ratios = {
        f"vs_sentence_transformers{end}": seconds[theirs] / seconds["flipkd bf16"],
        f"model_vs_sentence_transformers{end}": other / own,
        f"model_vs_own_without_triton{end}": plain / own,
        f"gemm_share{end}": flops / own / gemm,
    }
    return rows, ratios, True


def on_paper(names: Sequence[str], work: Path) -> list[dict[str, Any]]:
    """Return the texts per second that the data sheet of an H100 allows; nothing here is measured."""
    rows = []
    for name in names:
        shapes = multiplications(encoder_folder(name, work))
        flops = 2.0 * _TOKENS * sum(inputs * outputs for inputs, outputs in shapes)
        rows.append(
            {
                "not measured: H100 on paper": f"{name}, {_TOKENS} tokens",
                "GFLOP per text": round(flops / 1e9, 3),
                "limit_texts_per_second": round(_H100_FLOPS / flops),
            }
        )
    return rows


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--models", default="minilm,smollm2", help="of minilm, smollm2, shape")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a model")
    parser.add_argument("--profile", action="store_true", help="also print where the GPU's time goes")
    parser.add_argument("--work", type=Path, help="folder in which encoders that are made are kept")
    parser.add_argument("--prepare", action="store_true", help="make the encoders, measure nothing")
    arguments = parser.parse_args()
    if arguments.prepare:
        for name in arguments.models.split(","):
            print(encoder_folder(name, arguments.work))
        return 0
    if not torch.cuda.is_available():
        print("No CUDA GPU here, so nothing is measured. What the multiplications on an H100 would allow, on paper:")
        with tempfile.TemporaryDirectory() as scratch:
            names = arguments.models.split(",")
            report("gpu_encode", on_paper(names, arguments.work or Path(scratch)), {}, True)
        return 0
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    correct = True
    texts = record_texts(arguments.texts)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        folders: dict[str, Path] = {}
        for name in arguments.models.split(","):
            try:
                folders[name] = encoder_folder(name, work)
            except FlipkdError as error:  # one that cannot be fetched here need not keep the others from running
                say({"model": name, "left out": str(error)})
        gemm = best_gemm(list(folders.values()))
        for name, folder in folders.items():
            try:
                with time_limit(arguments.limit):
                    more, found, right = measure(name, folder, texts, gemm, arguments.rounds, arguments.profile)
            except OutOfTimeError as error:
                say({"model": name, "left out": str(error)})
                continue
            rows, ratios, correct = rows + more, ratios | found, correct and right
    report("gpu_encode", rows, {name: round(value, 3) for name, value in ratios.items()}, correct)
    return 0 if correct else 1


if __name__ == "__main__":
    raise SystemExit(main())
