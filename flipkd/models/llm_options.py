"""How a decoder is asked about pairs; apart from the decoder so that reading a configuration does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flipkd.checks import check_types
from flipkd.errors import ConfigError
from flipkd.models.device import DEVICES


@dataclass(frozen=True)
class LlmOptions:
    """Which decoder answers whether the two texts of a pair match, and how it is asked.

    Args:
        folder: a run of ``train``, or a Hugging Face decoder folder.
        engine: ``torch``, or ``vllm`` (which must be installed); nothing else is ever taken in its place.
        prompt_file: a text file with ``{left}`` and ``{right}`` (None: the prompt of training).
        labels: the answers for a match and for no match, as they follow the prompt (None: those of training).
        chat_template: whether the prompt is sent as a user's message in the model's chat template.
        both_orders: the mean of the probabilities of (left, right) and (right, left), at twice the work.
        dtype: of the model's weights and arithmetic.
        device: ``cpu``, ``cuda`` or ``auto``; of the torch engine.
        max_length: most tokens of a prompt (None: a run's own texts at their full length; else 1024).
        max_tokens: tokens in one forward pass of the torch engine (None: what suits the device).
        share_prefixes: whether the torch engine computes what prompts have in common only once.
        trust_remote_code: whether Python code in the folder may run.
    """

    folder: str
    engine: Literal["torch", "vllm"] = "torch"
    prompt_file: str | None = None
    labels: tuple[str, str] | None = None
    chat_template: bool = False
    both_orders: bool = False
    dtype: Literal["float32", "bf16"] = "float32"
    device: str = "auto"
    max_length: int | None = None
    max_tokens: int | None = None
    share_prefixes: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.engine not in ("torch", "vllm"):
            raise ConfigError(f"--engine must be torch or vllm, not {self.engine!r}")
        if self.dtype not in ("float32", "bf16"):
            raise ConfigError(f"--llm-dtype must be float32 or bf16, not {self.dtype!r}")
        if self.device not in DEVICES:
            raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        for name in ("max_length", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.labels is not None and (len(self.labels) != 2 or not all(self.labels)):
            raise ConfigError("--labels: give two words, first that of a match, as in --labels yes,no")
        if self.prompt_file is None and (self.labels is not None or self.chat_template):
            raise ConfigError("--labels and --chat-template belong to a prompt of your own: give --prompt-file")
        if self.prompt_file is not None and self.labels is None:
            raise ConfigError("--prompt-file needs --labels MATCH,NO_MATCH: the two answers that the prompt asks for")
