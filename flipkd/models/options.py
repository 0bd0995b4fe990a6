"""What a student is made of; apart from the student so that reading a configuration does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flipkd.checks import check_types
from flipkd.errors import ConfigError

PROMPT_VERSIONS = (1, 2)
# As sentence-transformers and ``flipkd.models.pooling`` call them.
STUDENT_POOLINGS = {"mean": "mean", "last": "lasttoken", "weighted": "weightedmean"}
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KNOWN = {
    "projection": ("q", "k", "v"),
    "pooling": tuple(STUDENT_POOLINGS),
    "attention": ("causal", "full"),
    "dtype": ("float32", "bf16"),
}


@dataclass(frozen=True)
class StudentOptions:
    """What a student is made of. Defaults are our choices; ``docs/quality.md`` says which were measured.

    Args:
        folder: a Hugging Face decoder folder, or the name of one on the hub.
        layer: k; blocks 0..k-1 are run. None: a quarter of the depth.
        dimension: rank of layer k's A, the size of a vector.
        rank: LoRA rank of the linear layers below.
        alpha: LoRA's alpha; the update is (alpha / rank) B A.
        dropout: of LoRA's input.
        target_modules: linear layers of blocks 0..k-1 that have LoRA.
        projection: whose A is read at layer k: ``q``, ``k`` or ``v``.
        pooling: over a text's tokens: ``mean``; ``last``; or ``weighted``, the mean with weights 1, 2, 3, ... (SGPT,
            arXiv 2202.08904: under causal attention later tokens have seen more). vLLM does not know the last one.
        attention: of the blocks where they encode: ``causal``, as the base was trained, or ``full``: a token sees the
            tokens after it too. Where the model answers, it is always causal. Full attention is there for bases
            without sliding windows; the exported folder says ``is_causal: false``, which transformers 5, vLLM and
            flipkd heed.
        max_length: most tokens per text.
        dtype: what the blocks compute in; LoRA's weights, pooling and the projection are float32.
        whole_tower: load all blocks, with LoRA in each, so that the language model's loss can be trained too.
        prompt_version: which question the language model's loss asks (``flipkd.models.llm_prompt``).
        trust_remote_code: whether Python code in the folder may run.
    """

    folder: str
    layer: int | None = None
    dimension: int = 128
    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    projection: Literal["q", "k", "v"] = "q"
    pooling: Literal["mean", "last", "weighted"] = "mean"
    attention: Literal["causal", "full"] = "causal"
    max_length: int = 128
    dtype: Literal["float32", "bf16"] = "float32"
    whole_tower: bool = False
    prompt_version: int = PROMPT_VERSIONS[-1]
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("dimension", "rank", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.layer is not None and self.layer < 1:
            raise ConfigError(f"--layer must be at least 1, not {self.layer}")
        if not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise ConfigError("--alpha must be greater than 0, and --dropout from 0 to less than 1")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.prompt_version not in PROMPT_VERSIONS:
            known_versions = ", ".join(map(str, PROMPT_VERSIONS))
            raise ConfigError(f"--prompt-version must be one of {known_versions}, not {self.prompt_version}")
        unknown = set(self.target_modules) - set(LINEAR_LAYERS)
        if unknown or not self.target_modules:
            raise ConfigError(f"--target-modules must be some of {', '.join(LINEAR_LAYERS)}")


def saved_options(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``StudentOptions`` from a ``student.json``; before prompts had versions, all asked the first one.

    Likewise all attention was causal before there was another one.

    Raises:
        KeyError: the file holds no options.
    """
    options = {"prompt_version": 1, "attention": "causal", **facts["options"]}
    return {**options, "target_modules": tuple(options["target_modules"])}
