"""How fast is a training step, against the loop that one would write first?

    python -m benchmarks.train [--quick] [--layer 10] [--dtype bf16]

SmolLM2-135M, read at layer k = 10 of 30, on real ICD-9 pairs (64 a step) with a real teacher's vectors (MiniLM's).

- *plain*: PEFT on transformers: the texts of both sides are tokenised and padded in the loop, the whole tower runs with
  ``output_hidden_states``, hidden state k is normed, pooled and projected by A, the loss goes backwards.
- *flipkd*: ``flipkd.distill``: blocks 0..k-1 alone, each distinct text once, packed without padding, tokenised once.

Both have the same LoRA weights, the same pairs and the same loss (MCL, pairs, in-batch matrix); the loss and the
gradient of a step are compared first. Steps are timed in turn. Peak memory is that of a process of its own for each.
``gemm_share`` is the part of the machine's rate in plain matrix multiplications of these shapes that a step of flipkd
reaches, counting only the multiplications by weights. Ratios:

    vs_plain_peft       steps per second, flipkd / the faster of the two plain loops (float32 and bf16)
    vs_plain_same_dtype the same against the plain loop of flipkd's own dtype
    memory              peak memory of a process, plain of that dtype / flipkd
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from benchmarks.common import interleave, peak_bytes, report
from flipkd.assets import icd9_descriptions, minilm_folder, smollm2_folder
from flipkd.distill.config import LossOptions
from flipkd.distill.gradients import Workers, backward_vectors
from flipkd.distill.objective import Batch, batch_loss
from flipkd.models.adapter import adapter_weights, new_student
from flipkd.models.encoder import load_encoder
from flipkd.models.options import LINEAR_LAYERS, StudentOptions
from flipkd.models.student import Student

_PAIRS = 64
_LOSS = LossOptions()


def batches(count: int) -> list[dict[str, Any]]:
    """Real pairs: long descriptions, with the short ones of the same and of the two neighbouring codes."""
    rows = icd9_descriptions()
    random = np.random.default_rng(5)
    encoder = load_encoder(minilm_folder())
    made = []
    for _ in range(count):
        codes = random.integers(1, len(rows) - 1, _PAIRS // 3 + 1)
        places = [(code, code + shift) for code in codes for shift in (0, -1, 1)][:_PAIRS]
        left, right = [rows[i][1].lower() for i, _ in places], [rows[j][2].lower() for _, j in places]
        texts = list(dict.fromkeys(left + right))
        vectors = encoder.encode(texts)
        indices = [np.array([texts.index(text) for text in side]) for side in (left, right)]
        made.append(
            {
                "left": left,
                "right": right,
                "texts": texts,
                "indices": indices,
                "labels": np.array([i == j for i, j in places], np.float32),
                "vectors": vectors,
                "teacher": (vectors[indices[0]] * vectors[indices[1]]).sum(1),
            }
        )
    return made


def as_tensors(batch: dict[str, Any]) -> Batch:
    """What the loss needs of a batch."""
    arrays = (*batch["indices"], batch["labels"], batch["teacher"], batch["vectors"])
    return Batch(*map(torch.from_numpy, arrays))


def flipkd_step(student: Student, batch: dict[str, Any], ids: list[list[int]]) -> float:
    """Forwards and backwards of one batch."""
    pairs = as_tensors(batch)
    student.train()
    metrics = backward_vectors(
        student, ids, lambda vectors: batch_loss(_LOSS, vectors, pairs), Workers(), 1 << 20, (0, 0)
    )
    return float(metrics["loss"])


class PlainLoop:
    """PEFT and transformers alone: padded batches through the whole tower."""

    def __init__(self, options: StudentOptions, weights: dict[str, Tensor] | None) -> None:
        import peft
        import transformers

        assert options.layer is not None
        self.layer, self.dtype = options.layer, torch.bfloat16 if options.dtype == "bf16" else torch.float32
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        base = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=self.dtype)
        head = rf"layers\.{self.layer}\.self_attn\.q_proj"
        blocks = "|".join(map(str, range(self.layer)))
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            target_modules=rf".*layers\.({blocks})\.(self_attn|mlp)\.({'|'.join(LINEAR_LAYERS)})|.*{head}",
            rank_pattern={head: options.dimension},
            alpha_pattern={head: options.dimension},
        )
        self.model = peft.get_peft_model(base, config)
        if weights is not None:
            peft.set_peft_model_state_dict(self.model, weights)

    def encode(self, texts: list[str]) -> Tensor:
        """Unit vectors of texts, padded to the longest."""
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            states = self.model(**batch, output_hidden_states=True, logits_to_keep=1).hidden_states[self.layer]
            block = self.model.get_base_model().model.layers[self.layer]
            x = block.input_layernorm(states).float()
        mask = batch["attention_mask"][:, :, None]
        pooled = (x * mask).sum(1) / mask.sum(1)
        return normalize(linear(pooled, block.self_attn.q_proj.lora_A["default"].weight), dim=-1)

    def step(self, batch: dict[str, Any]) -> float:
        """Forwards and backwards of one batch: both sides as they come."""
        self.model.train()
        left, right = self.encode(batch["left"]), self.encode(batch["right"])
        # The loss is over the batch's texts; a text that stands twice has one vector there.
        vectors = torch.cat([left, right])
        first: dict[str, int] = {}
        for place, text in enumerate(batch["left"] + batch["right"]):
            first.setdefault(text, place)
        vectors = vectors[[first[text] for text in batch["texts"]]]
        pairs = as_tensors(batch)
        loss, _ = batch_loss(_LOSS, vectors, pairs)
        torch.autograd.backward(loss)
        return float(loss.detach())


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of LoRA's weights by name; then they are cleared."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[name.split("base_model.", 1)[1]] = parameter.grad.float().clone()
            parameter.grad = None
    return found


def agree(student: Student, plain: PlainLoop, batch: dict[str, Any], ids: list[list[int]], tolerance: float) -> bool:
    """Whether loss and gradient of one step are the same but for rounding."""
    losses = [flipkd_step(student, batch, ids), plain.step(batch)]
    found, expected = gradients(student), gradients(plain.model)
    names = found.keys() & expected.keys()
    flat = [torch.cat([each[name].double().reshape(-1) for name in sorted(names)]) for each in (found, expected)]
    cosine = float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))
    close = abs(losses[0] - losses[1]) <= tolerance * abs(losses[1]) and cosine > 1 - 10 * tolerance
    print(f"loss {losses[0]:.5f} and {losses[1]:.5f}, cosine of the gradients {cosine:.6f}, {len(names)} weights")
    return close and len(names) >= 2 * len(LINEAR_LAYERS) * plain.layer


def gemm_rate(student: Student, tokens: int) -> tuple[float, float]:
    """(multiply-adds of a step by weights, multiply-adds per second of the same multiplications alone)."""
    dtype = torch.bfloat16 if student.options.dtype == "bf16" else torch.float32
    rank = student.options.rank
    shapes = [
        (module.in_features, module.out_features)
        for block in student.decoder.layers[: student.layer]
        for name, module in block.named_modules()
        if name.endswith(LINEAR_LAYERS)
    ]
    # Forwards, and backwards to the input, through the frozen weight; LoRA's two also backwards to themselves.
    work = sum(tokens * (2 * inner * outer + 3 * rank * (inner + outer)) for inner, outer in shapes)
    inner, outer = max(shapes, key=lambda shape: shape[0] * shape[1])
    x, weight = torch.randn(tokens, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(5):
            linear(x, weight)
        best = min(best, (time.perf_counter() - started) / 5)
    return work, tokens * inner * outer / best


def child(name: str, options: StudentOptions) -> None:
    """Peak memory of a few steps in this process, as JSON."""
    batch = batches(1)[0]
    student = new_student(options)
    if name == "flipkd":
        for _ in range(3):
            flipkd_step(student, batch, student.tokenize(batch["texts"]).ids)
    elif name == "plain":
        del student
        plain = PlainLoop(options, None)
        for _ in range(3):
            plain.step(batch)
    print(json.dumps(peak_bytes()))


def child_peak_bytes(name: str, arguments: argparse.Namespace) -> int:
    """Peak memory of ``child`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.train", "--child", name, "--layer", str(arguments.layer)]
    found = subprocess.run([*command, "--dtype", arguments.dtype], capture_output=True, text=True, check=True)
    return int(json.loads(found.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; the same work")
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="bf16")
    parser.add_argument("--child", choices=("flipkd", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = StudentOptions(str(smollm2_folder()), layer=arguments.layer, dtype=arguments.dtype)
    if arguments.child:
        child(arguments.child, options)
        return
    rounds = 3 if arguments.quick else 9
    student = new_student(options)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if "lora_B" in parameter_name:  # zero at the start: LoRA would not count in the comparison
                parameter.normal_(0, 0.01)
    same = PlainLoop(options, adapter_weights(student))
    other_dtype: Any = "float32" if arguments.dtype == "bf16" else "bf16"
    other = PlainLoop(replace(options, dtype=other_dtype), adapter_weights(student))
    made = batches(rounds)
    ids = [student.tokenize(batch["texts"]).ids for batch in made]
    correct = agree(student, same, made[0], ids[0], 0.05 if arguments.dtype == "bf16" else 1e-4)
    names = {"flipkd": f"flipkd {arguments.dtype}", "same": f"plain {arguments.dtype}", "other": f"plain {other_dtype}"}
    steps: dict[str, Callable[[int], float]] = {
        "flipkd": lambda turn: flipkd_step(student, made[turn], ids[turn]),
        "same": lambda turn: same.step(made[turn]),
        "other": lambda turn: other.step(made[turn]),
    }
    turns = {name: iter(range(rounds)) for name in steps}
    seconds = interleave({name: lambda name=name: steps[name](next(turns[name])) for name in steps}, rounds)  # type: ignore[misc]
    median = {name: statistics.median(found) for name, found in seconds.items()}
    tokens = round(statistics.mean(sum(map(len, texts)) for texts in ids))
    work, limit = gemm_rate(student, tokens)
    share = round(work / median["flipkd"] / limit, 3)
    peaks = {"flipkd": child_peak_bytes("flipkd", arguments), "same": child_peak_bytes("plain", arguments)}
    rows = [
        {
            "loop": shown,
            "steps/s": round(1 / median[name], 3),
            "peak MB": round(peaks[name] / 1e6) if name in peaks else "",
            "gemm_share": share if name == "flipkd" else "",
        }
        for name, shown in names.items()
    ]
    ratios = {
        "vs_plain_peft": round(min(median["same"], median["other"]) / median["flipkd"], 3),
        "vs_plain_same_dtype": round(median["same"] / median["flipkd"], 3),
        "memory": round(peaks["same"] / peaks["flipkd"], 3),
        "gemm_share": share,
    }
    report("train", rows, ratios, correct)
    if not correct:
        sys.exit(1)


if __name__ == "__main__":
    main()
