"""The peer of benchmarks.gpu_encode: sentence-transformers on a GPU, as its users run it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH_SIZES = (256, 1024, 4096)
DEVICE = "cuda"


def device_seconds(function: Callable[[], Any]) -> float:
    """Wall seconds of a call, the GPU's work included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class Peer:
    """sentence-transformers at its best on this GPU.

    Args:
        folder: of the encoder.
        texts: some, to see whether float16 can hold the model's numbers.
    """

    def __init__(self, folder: Path, texts: list[str]) -> None:
        from sentence_transformers import SentenceTransformer

        self.dtype, self.batch_size = "float16", BATCH_SIZES[0]
        for dtype in (torch.float16, torch.bfloat16):  # a model whose numbers leave float16 runs in bfloat16
            self.model = SentenceTransformer(
                str(folder), device=DEVICE, model_kwargs={"dtype": dtype, "attn_implementation": "sdpa"}
            )
            self.dtype = str(dtype).removeprefix("torch.")
            if np.isfinite(self.encode(texts)).all():
                break

    def encode(self, texts: list[str], batch_size: int | None = None) -> np.ndarray:
        """Vectors float32 [N, dim], on the GPU until the last batch."""
        found = self.model.encode(
            texts, batch_size=batch_size or self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        made: np.ndarray = found.float().cpu().numpy()
        return made

    def choose(self, texts: list[str]) -> dict[int, float]:
        """Texts/s by batch size; the best one is kept."""
        rates = {}
        for size in BATCH_SIZES:
            self.encode(texts[: 2 * size], size)
            rates[size] = len(texts) / device_seconds(lambda: self.encode(texts, size))  # noqa: B023
        self.batch_size = max(rates, key=rates.__getitem__)
        return rates

    def features(self, texts: list[str]) -> list[dict[str, torch.Tensor]]:
        """Token ids of sorted, padded batches, on the GPU."""
        order = sorted(texts, key=len, reverse=True)
        return [
            dict(self.model.tokenizer(order[start : start + self.batch_size], padding=True, truncation=True,
                                      max_length=self.model.max_seq_length, return_tensors="pt").to(DEVICE))
            for start in range(0, len(order), self.batch_size)
        ]  # fmt: skip

    def forward(self, features: list[dict[str, torch.Tensor]]) -> None:
        """The model alone."""
        with torch.inference_mode():
            for batch in features:
                self.model(dict(batch))
        torch.cuda.synchronize()
