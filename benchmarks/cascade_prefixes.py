"""What the torch engine saves by computing common beginnings of prompts once; part of ``benchmarks.cascade``."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import interleave
from flipkd.assets import icd9_descriptions, smollm2_folder

if TYPE_CHECKING:
    from flipkd.models.llm_prompt import PromptedPairs
    from flipkd.models.llm_torch import TorchEngine

_CANDIDATES = 10
_MOST_DIFFERENCE = 1e-3


def computed_tokens(engine: TorchEngine, prompts: PromptedPairs) -> int:
    """Tokens that prompts put through the model, padding left out."""
    tasks = list(engine._tasks(prompts))
    rows = sum(len(row.ids) for task in tasks for row in task.rows)
    instruction = len(engine._prompt.before) if engine._shares and tasks else 0
    return instruction + rows + sum(len(prefix) for task in tasks for prefix in task.prefixes)


def sharing(
    groups: int, rounds: int, threads: int, device: str = "cpu"
) -> tuple[list[dict[str, Any]], dict[str, float], bool]:
    """The torch engine with and without shared beginnings: rows, ratios, and whether the answers agree.

    Args:
        groups: left records, each with ten candidates.
        rounds: of the comparison; both run in turn, and medians count.
        threads: of the engine.
        device: of the engine.
    """
    import torch
    import transformers

    from flipkd.models.llm_prompt import TRAINED_PROMPTS, PromptTokenizer, pair_prompt
    from flipkd.models.llm_torch import MAX_TOKENS, TorchEngine

    model = (
        transformers.AutoModelForCausalLM.from_pretrained(str(smollm2_folder()), dtype=torch.float32).to(device).eval()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(smollm2_folder()))
    pairs = grouped_pairs(groups)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    shared_seconds: dict[int, float] = {}
    correct = True
    for version, words in TRAINED_PROMPTS.items():
        prompt = pair_prompt(words, tokenizer)
        prompts = PromptTokenizer(prompt, tokenizer, 1024).tokenize(pairs)
        engines = {
            name: TorchEngine(
                model,
                prompt,
                device=torch.device(device),
                threads=threads,
                max_tokens=MAX_TOKENS[device],
                share_prefixes=name == "shared",
            )
            for name in ("shared", "apart")
        }
        sums = {name: engine.label_log_probabilities(prompts) for name, engine in engines.items()}
        odds = {name: each[:, 1] - each[:, 0] for name, each in sums.items()}
        difference = float(np.abs(odds["shared"] - odds["apart"]).max())
        correct &= difference < _MOST_DIFFERENCE and bool(odds["apart"].std() > 100 * difference)
        seconds = interleave(
            {name: partial(engine.label_log_probabilities, prompts) for name, engine in engines.items()},
            rounds,
        )
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        shared_seconds[version] = medians["shared"]
        tokens = {name: computed_tokens(engine, prompts) for name, engine in engines.items()}
        for name in engines:
            rows.append(
                {
                    "prompt": version,
                    "prefixes": name,
                    "pairs": len(pairs),
                    "tokens": tokens[name],
                    "seconds": round(medians[name], 2),
                    "pairs_per_second": round(len(pairs) / medians[name], 1),
                    "largest_difference": round(difference, 6),
                }
            )
        ratios[f"shared_prefixes_prompt_{version}"] = round(medians["apart"] / medians["shared"], 3)
        ratios[f"shared_prefixes_prompt_{version}_tokens"] = round(tokens["apart"] / tokens["shared"], 3)
    ratios["shared_prefixes_prompt_2_over_prompt_1"] = round(shared_seconds[1] / shared_seconds[2], 3)
    return rows, ratios, correct


def grouped_pairs(groups: int) -> list[tuple[str, str]]:
    """Long descriptions spread over ICD-9, each with the short ones of the ten codes around it."""
    descriptions = icd9_descriptions()
    last = len(descriptions) - _CANDIDATES
    return [
        (descriptions[place + _CANDIDATES // 2][1].lower(), descriptions[place + other][2].lower())
        for place in (round(last * number / groups) for number in range(groups))
        for other in range(_CANDIDATES)
    ]
