"""Where a model runs, in which arithmetic, and how much of it at once. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flipkd.errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bf16", "int8")
DEVICES = ("cpu", "cuda", "auto")
# Measured with MiniLM on a CPU: from 512 to 8,192 tokens the speed is the same, and small batches share out better.
# A GPU wants to be filled.
MAX_TOKENS = {"cpu": 1024, "cuda": 65536}
GPU_STREAMS = 2  # one batch is copied while another computes
TOKENIZER_THREADS = {"cpu": 1, "cuda": 2}  # chunks of texts at once; a GPU is soon done with one


def check_options(dtype: str, device: str, max_length: int | None, threads: int | None) -> None:
    """Refuses what ``load_encoder`` and its like cannot be told.

    Raises:
        ConfigError: names the argument and what it may be.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; choose from {', '.join(DTYPES)}")
    if device not in DEVICES:
        raise ConfigError(f"device {device!r} is not known; choose from {', '.join(DEVICES)}")
    for name, number in (("max_length", max_length), ("threads", threads)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}")


def find_device(device: str) -> torch.device:
    """The device that "cpu", "cuda" (the current one) or "auto" (CUDA if there is a device) stands for.

    Raises:
        ConfigError: there is no CUDA device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device; use cpu or auto")
    # by number, since each thread has a current device of its own
    return torch.device("cuda", torch.cuda.current_device()) if place.type == "cuda" else place
