"""Texts to vectors: any sentence-transformers bi-encoder folder, without sentence-transformers.

Vectors equal ``SentenceTransformer(folder).encode(texts, normalize_embeddings=True)`` but for two things, both wanted:
special tokens inside a text are plain text here, and nothing is ever padded, so a text's vector does not depend on its
neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from flipkd.errors import ConfigError, ModelError
from flipkd.models.folder import ModelFolder, folder_fingerprint, read_folder
from flipkd.models.tokenizer import load_tokenizer, text_tokenizer
from flipkd.models.tokens import TextTokenizer, TokenizedTexts, equal_length_batches, tokenized_chunks

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bf16")
DEVICES = ("cpu", "cuda", "auto")
# Measured with MiniLM on a CPU: from 512 to 8,192 tokens the speed is the same, and small batches share out better.
# A GPU wants to be filled.
MAX_TOKENS = {"cpu": 1024, "cuda": 65536}


@dataclass(frozen=True)
class EncodedTexts:
    """Vectors of N texts, in their order.

    ``vectors`` float32 [N, dim]; ``truncated`` bool [N], whether the text was longer than the encoder's maximum length;
    ``tokens`` int32 [N], tokens that the model saw, special tokens included.
    """

    vectors: np.ndarray
    truncated: np.ndarray
    tokens: np.ndarray


class Encoder:
    """A loaded bi-encoder. Use ``load_encoder`` to get one.

    Args:
        tokenizer: texts to token ids.
        model: ids int64 [texts, tokens] to vectors float32 [texts, dim], both on ``device``.
        exact_model: gives the same in float32; called only when ``model`` gives a number that is not finite.
        dim: size of a vector.
        max_length: most tokens per text, special tokens included; None for no limit.
        dtype: "float32" or "bf16", what the transformer computes in; pooling and all after it are float32.
        device: where ``model`` runs.
        threads: how many batches run at once.
        fingerprint: ``folder_fingerprint`` of the folder and the maximum length that was asked for.
    """

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        model: Callable[[torch.Tensor], torch.Tensor],
        exact_model: Callable[[torch.Tensor], torch.Tensor] | None,
        dim: int,
        max_length: int | None,
        dtype: str,
        device: torch.device,
        threads: int,
        fingerprint: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._exact_model = exact_model
        self.dim = dim
        self.max_length = max_length
        self.dtype = dtype
        self.device = device
        self.threads = threads
        self.fingerprint = fingerprint

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, dim] of N texts; see ``encode_texts``."""
        return self.encode_texts(texts).vectors

    def encode_texts(
        self, texts: Sequence[str], *, max_tokens: int | None = None, normalize: bool = True
    ) -> EncodedTexts:
        """Encodes texts; each distinct text once.

        Args:
            texts: N texts, normalised by the caller; they are taken as they are.
            max_tokens: most tokens per batch (a longer text has a batch of its own); by default what suits the device.
            normalize: divide each vector by its length, as everything downstream takes it (scores are cosines); False
                gives what the folder's own last step gives.

        Returns:
            Vectors, truncation flags and token counts in the order of ``texts``. A text without any token (the empty
            text, where the tokenizer adds no special tokens) has the zero vector and 0 tokens.

        Raises:
            ConfigError: ``max_tokens`` is not positive.
            ModelError: the model gives numbers that are not finite, in float32 too; names the places of the texts.
        """
        if max_tokens is None:
            max_tokens = MAX_TOKENS[self.device.type]
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
        first_places: dict[str, int] = {}
        rows = np.fromiter((first_places.setdefault(text, len(first_places)) for text in texts), np.int64, len(texts))
        distinct = list(first_places)
        vectors = np.zeros((len(distinct), self.dim), dtype=np.float32)
        truncated = np.zeros(len(distinct), dtype=np.bool_)
        tokens = np.zeros(len(distinct), dtype=np.int32)

        def noted() -> Iterator[tuple[int, TokenizedTexts]]:
            for start, chunk in tokenized_chunks(self._tokenizer, distinct):
                truncated[start : start + len(chunk.ids)] = chunk.truncated
                tokens[start : start + len(chunk.ids)] = [len(ids) for ids in chunk.ids]
                yield start, chunk

        with closing(self._computed(equal_length_batches(noted(), max_tokens))) as batches:
            for places, found, finite in batches:
                if not finite.all():
                    # By place in the input, not by text: records are private.
                    bad = np.flatnonzero(np.isin(rows, places[~finite]))
                    shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
                    raise ModelError(
                        f"the encoder gives numbers that are not finite, in float32 too, for {len(bad)} of the texts "
                        f"(places {shown}); its weights or the texts are out of range"
                    )
                vectors[places] = found
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if len(distinct) == len(texts):
            return EncodedTexts(vectors, truncated, tokens)
        return EncodedTexts(vectors[rows], truncated[rows], tokens[rows])

    def _computed(
        self, batches: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
        """Runs the model over batches (places, ids), several at once; yields places, vectors and which are finite.

        On a CPU each batch has one thread to itself. So no thread waits for another inside every operation, which is
        slow for small batches and slower still on a shared machine, and vectors do not depend on the number of threads.
        """
        import torch

        on_cpu = self.device.type == "cpu"
        own_threads = torch.get_num_threads()
        waiting: deque[tuple[np.ndarray, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
        try:
            with ThreadPoolExecutor(
                self.threads, "flipkd-encode", partial(torch.set_num_threads, 1) if on_cpu else None
            ) as pool:
                for places, ids in batches:
                    waiting.append((places, pool.submit(self._encode_batch, ids)))
                    if len(waiting) > 2 * self.threads:
                        first, done = waiting.popleft()
                        yield first, *done.result()
                while waiting:
                    first, done = waiting.popleft()
                    yield first, *done.result()
        finally:
            torch.set_num_threads(own_threads)  # what threads that start later take over

    def _encode_batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of a batch, and which of them are finite."""
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(ids).to(self.device)
            found: np.ndarray = self._model(batch).cpu().numpy()
            finite = np.isfinite(found).all(axis=1)
            if not finite.all() and self._exact_model is not None:
                found = self._exact_model(batch).cpu().numpy()
                finite = np.isfinite(found).all(axis=1)
            return found, finite


def load_encoder(
    folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    max_length: int | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
) -> Encoder:
    """Loads a bi-encoder in sentence-transformers format.

    Args:
        folder: a local folder, or the name of a model on the hub (owner/name) where no such folder exists.
        dtype: "float32" or "bf16".
        device: "cpu", "cuda", or "auto" (CUDA if there is a device).
        max_length: most tokens per text, special tokens included; by default what the folder says.
        trust_remote_code: allow the folder to bring Python code for its transformer or tokenizer.
        threads: CPU threads, one batch each; by default as many as torch would use. A GPU takes one batch at a time.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: the folder cannot be loaded; the message names the file and the way out.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; choose from {', '.join(DTYPES)}")
    if device not in DEVICES:
        raise ConfigError(f"device {device!r} is not known; choose from {', '.join(DEVICES)}")
    for name, number in (("max_length", max_length), ("threads", threads)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}")
    settings = read_folder(folder)  # before torch is imported, so that a wrong folder is reported at once

    import torch

    from flipkd.models.backbone import load_backbone
    from flipkd.models.pooling import load_head, output_width, pool

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device; use cpu or auto")
    transformers_tokenizer = load_tokenizer(settings, trust_remote_code)
    backbone = load_backbone(settings, torch.bfloat16 if dtype == "bf16" else torch.float32, place, trust_remote_code)
    limit = _max_length(settings, transformers_tokenizer, backbone.position_limit, max_length)
    tokenizer = text_tokenizer(settings, transformers_tokenizer, limit)
    head = load_head(settings, place)
    skip = tokenizer.prompt_tokens if settings.prompt and not settings.pools_prompt else 0

    def through(states: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def model(ids: torch.Tensor) -> torch.Tensor:
            vectors = pool(states(ids), settings.pooling_modes, skip)
            for step in head:
                vectors = step(vectors)
            return vectors[:, : settings.truncate_dim]

        return model

    def exact_model(ids: torch.Tensor) -> torch.Tensor:
        # Loaded when the first number overflows, and then kept: most runs never need it.
        with loading:
            if not exact:
                exact.append(through(load_backbone(settings, torch.float32, place, trust_remote_code).states))
        return exact[0](ids)

    exact: list[Callable[[torch.Tensor], torch.Tensor]] = []
    loading = Lock()
    model = through(backbone.states)
    return Encoder(
        tokenizer=tokenizer,
        model=model,
        exact_model=exact_model if dtype == "bf16" else None,
        dim=output_width(settings, backbone.width),
        max_length=limit,
        dtype=dtype,
        device=place,
        threads=1 if place.type == "cuda" else threads or torch.get_num_threads(),
        fingerprint=folder_fingerprint(settings.path, max_length),
    )


def _max_length(settings: ModelFolder, tokenizer: Any, position_limit: int | None, wanted: int | None) -> int | None:
    """The effective maximum length: what was asked for, else what the folder says, at most what the model can take."""
    if wanted is not None:
        if position_limit is not None and wanted > position_limit:
            raise ConfigError(f"max_length {wanted} is more than the {position_limit} positions of this model")
        return wanted
    limit = settings.max_length
    if limit is None and settings.truncates:
        # transformers writes a huge number where a tokenizer has no limit.
        limit = tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else None
    if position_limit is not None:
        limit = min(limit or position_limit, position_limit)
    return limit
