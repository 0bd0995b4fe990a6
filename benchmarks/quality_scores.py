"""How each kind of model in ``benchmarks.quality`` scores pairs, and how many parameters it runs for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality_sets import Encode
from flipkd.demo.pair_sets import PairSet

Scores = npt.NDArray[Any]
Score = Callable[[PairSet], Scores]


def parameters_run(student: Any) -> int:
    """Weights that are run for a text: those of blocks 0..k-1 (LoRA merged) and A."""
    return block_parameters(student, student.layer) + int(student.projection.numel())


def block_parameters(student: Any, layers: int | None = None) -> int:
    """Weights of the first blocks, or of all, without LoRA's."""
    blocks = list(student.decoder.layers)[:layers]
    named = (each for block in blocks for each in block.named_parameters())
    return sum(weight.numel() for name, weight in named if "lora_" not in name)


def saved_parameters(folder: Path) -> int:
    """Weights of a saved BERT, but for its embeddings."""
    from safetensors import safe_open

    with safe_open(next(folder.rglob("model.safetensors")), "np") as file:
        names = [name for name in file.keys() if "embeddings" not in name]  # noqa: SIM118
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)


def encode_with(folder: Path, device: str) -> Encode:
    """A sentence-transformers folder's encoder."""
    from flipkd.models.encoder import load_encoder

    return load_encoder(folder, device=device).encode


def cosines(encode: Encode) -> Score:
    """Scores pairs by the cosine of their texts' unit vectors; each distinct text is encoded once."""

    def score(pairs: PairSet) -> Scores:
        texts = list(dict.fromkeys([*pairs.left_text, *pairs.right_text]))
        vectors, places = encode(texts), {text: place for place, text in enumerate(texts)}
        left, right = ([places[text] for text in side] for side in (pairs.left_text, pairs.right_text))
        scores: Scores = np.einsum("pd,pd->p", vectors[left], vectors[right])
        return scores

    return score


def answers(run: str, device: str) -> Score:
    """Scores pairs by the decoder's P(match)."""
    from flipkd.models.llm import load_llm
    from flipkd.models.llm_options import LlmOptions

    llm = load_llm(LlmOptions(run, device=device))

    def score(pairs: PairSet) -> Scores:
        return llm.score_pairs(list(pairs.left_text), list(pairs.right_text)).probabilities

    return score


def cross_scores(folder: Path, device: str) -> Score:
    """Scores pairs by a cross-encoder."""
    from flipkd.models.cross_encoder import load_cross_encoder

    model = load_cross_encoder(folder, device=device)

    def score(pairs: PairSet) -> Scores:
        return model.score_pairs(pairs.left_text, pairs.right_text).scores

    return score
