"""Texts to vectors: any sentence-transformers bi-encoder folder, without sentence-transformers.

Vectors equal ``SentenceTransformer(folder).encode(texts, normalize_embeddings=True)`` but for two things, both wanted:
special tokens inside a text are plain text here, and nothing is ever padded, so a text's vector does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flipkd.errors import ConfigError
from flipkd.models.batches import full_batches, packed_batches, tokenized_chunks
from flipkd.models.device import GPU_STREAMS, MAX_TOKENS, TOKENIZER_THREADS, check_options, find_device
from flipkd.models.folder import read_folder
from flipkd.models.parallel import finite_rows, loaded_at_first_use, not_finite, run_batches
from flipkd.models.progress import tell
from flipkd.models.tokenizer import load_tokenizer, longest_input, text_tokenizer
from flipkd.models.tokens import TextTokenizer, TokenizedTexts, distinct_of, listed_texts
from flipkd.models.trust import check_code
from flipkd.models.vector_size import output_width
from flipkd.vectors.rows import STORAGE, VectorRows, quantise

if TYPE_CHECKING:
    import torch

    from flipkd.config import VectorDtype
    from flipkd.kernels.encoder_ops import Texts as TextPlaces
    from flipkd.models.gpu_rows import RowModel
    from flipkd.models.parallel import Model


@dataclass(frozen=True)
class EncodedTexts:
    """Vectors of N texts, in their order.

    ``vectors`` float32 [N, dim]; ``truncated`` bool [N], whether the text was longer than the encoder's maximum length;
    ``tokens`` int32 [N], tokens that the model saw, special tokens included.
    """

    vectors: np.ndarray
    truncated: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class TextRows:
    """Rows of N texts as a store keeps them: ``rows`` [N, dim]; ``truncated`` and ``tokens`` as in ``EncodedTexts``."""

    rows: VectorRows
    truncated: np.ndarray
    tokens: np.ndarray


class Encoder:
    """A loaded bi-encoder. Use ``load_encoder`` to get one.

    Args:
        tokenizer: texts to token ids.
        model: packed texts on ``device`` (ids int64 [T], and where each text lies) to vectors float32 [texts, dim].
        mixes_lengths: whether texts of different lengths may stand in one call of ``model``.
        exact_model: gives the same in float32; called only when ``model`` gives a number that is not finite.
        row_model: gives finished rows of a dtype on the device (``flipkd.models.gpu_rows``); None on a CPU.
        dim: size of a vector.
        max_length: most tokens per text, special tokens included; None for no limit.
        dtype: "float32", "bf16" or "int8", what the transformer multiplies in; pooling and all after it are float32.
        device: where ``model`` runs.
        threads: how many batches run at once.
    """

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        model: Model,
        mixes_lengths: bool,
        exact_model: Model | None,
        row_model: RowModel | None = None,
        dim: int,
        max_length: int | None,
        dtype: str,
        device: torch.device,
        threads: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._mixes_lengths = mixes_lengths
        self._exact_model = exact_model
        self._row_model = row_model
        self.dim = dim
        self.max_length = max_length
        self.dtype = dtype
        self.device = device
        self.threads = threads

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
            TypeError: an item is no string; names its place.
            ModelError: the model gives numbers that are not finite, in float32 too; names the places of the texts.
        """
        if normalize and self._row_model is not None:
            made = self.encode_rows(texts, "float32", max_tokens=max_tokens)
            return EncodedTexts(made.rows.values, made.truncated, made.tokens)
        found = self._encode(texts, max_tokens, self._model, self._exact_model, np.float32, finite_rows)
        if normalize:
            vectors = found.vectors
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return found

    def encode_rows(self, texts: Sequence[str], dtype: VectorDtype, *, max_tokens: int | None = None) -> TextRows:
        """Encodes texts into rows of ``dtype``; arguments and errors are those of ``encode_texts``."""
        row_model = self._row_model
        if row_model is None:
            encoded = self.encode_texts(texts, max_tokens=max_tokens)
            return TextRows(quantise(encoded.vectors, dtype), encoded.truncated, encoded.tokens)

        from flipkd.models.gpu_rows import are_finite, finished_rows

        def model(ids: torch.Tensor, places: TextPlaces) -> torch.Tensor:
            return row_model(ids, places, dtype)

        def exact(ids: torch.Tensor, places: TextPlaces) -> torch.Tensor:
            return finished_rows((self._exact_model or self._model)(ids, places), dtype)

        found = self._encode(texts, max_tokens, model, exact, STORAGE[dtype], are_finite)
        return TextRows(VectorRows(found.vectors, dtype), found.truncated, found.tokens)

    def _encode(
        self,
        texts: Sequence[str],
        max_tokens: int | None,
        model: Model,
        exact_model: Model | None,
        kind: Any,
        are_finite: Callable[[np.ndarray], np.ndarray],
    ) -> EncodedTexts:
        """What ``model`` makes of the texts, [N, dim] of numpy type ``kind``."""
        texts = listed_texts(texts)
        if max_tokens is None:
            max_tokens = MAX_TOKENS[self.device.type]
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
        distinct, rows = distinct_of(texts)
        vectors = np.zeros((len(distinct), self.dim), kind)
        truncated = np.zeros(len(distinct), dtype=np.bool_)
        tokens = np.zeros(len(distinct), dtype=np.int32)

        def noted() -> Iterator[tuple[int, TokenizedTexts]]:
            for start, chunk in tokenized_chunks(self._tokenizer, distinct, TOKENIZER_THREADS[self.device.type]):
                truncated[start : start + len(chunk)] = chunk.truncated
                tokens[start : start + len(chunk)] = chunk.lengths
                yield start, chunk

        def batches() -> Iterator[tuple[Any, ...]]:
            from flipkd.kernels.encoder_ops import Texts as TextPlaces

            made = (
                full_batches(noted(), max_tokens)
                if self.device.type == "cuda" and self._mixes_lengths
                else packed_batches(noted(), max_tokens, self._mixes_lengths)
            )
            for places, ids, lengths in made:
                yield places, ids, TextPlaces(lengths, self.device)

        done = 0
        running = run_batches(batches(), model, exact_model, self.device, self.threads, are_finite)
        with closing(running) as results:
            for places, found, finite in results:
                if not finite.all():
                    raise not_finite("encoder", "texts", rows, places[~finite])
                vectors[places] = found
                done += len(places)
                tell(done, len(distinct))
        if len(distinct) == len(texts):
            return EncodedTexts(vectors, truncated, tokens)
        return EncodedTexts(vectors[rows], truncated[rows], tokens[rows])


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
        dtype: "float32", "bf16", or "int8" (plain BERT, Llama and Qwen2 models).
        device: "cpu", "cuda", or "auto" (CUDA if there is a device).
        max_length: most tokens per text, special tokens included; by default what the folder says.
        trust_remote_code: allow the folder to bring Python code for its transformer or tokenizer.
        threads: CPU threads, one batch each; by default as many as torch would use. A GPU has two
            streams instead.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: the folder cannot be loaded; the message names the file and the way out.
    """
    check_options(dtype, device, max_length, threads)
    settings = read_folder(folder)  # before torch is imported, so that a wrong folder is reported at once
    check_code(settings.transformer_path, trust_remote_code)

    import torch

    from flipkd.models.backbone import Backbone, load_backbone
    from flipkd.models.gpu_rows import load_row_model
    from flipkd.models.pooling import load_head, pool_packed

    place = find_device(device)
    transformers_tokenizer = load_tokenizer(settings, trust_remote_code)
    kinds = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    backbone = load_backbone(settings, kinds[dtype], place, trust_remote_code)
    limit = longest_input(settings, transformers_tokenizer, backbone.position_limit, max_length)
    tokenizer = text_tokenizer(settings, transformers_tokenizer, limit)
    head = load_head(settings, place)
    skip = tokenizer.prompt_tokens if settings.prompt and not settings.pools_prompt else 0

    def through(backbone: Backbone) -> Model:
        def model(ids: torch.Tensor, texts: TextPlaces) -> torch.Tensor:
            vectors = pool_packed(backbone.states(ids, texts), texts, settings.pooling_modes, skip)
            for step in head:
                vectors = step(vectors)
            return vectors[:, : settings.truncate_dim]

        return model

    model = through(backbone)

    def exact() -> Model:
        return through(load_backbone(settings, torch.float32, place, trust_remote_code))

    return Encoder(
        tokenizer=tokenizer,
        model=model,
        mixes_lengths=backbone.mixes_lengths,
        exact_model=loaded_at_first_use(exact) if dtype != "float32" else None,
        row_model=load_row_model(settings, backbone, model, place) if place.type == "cuda" else None,
        dim=output_width(settings, backbone.width),
        max_length=limit,
        dtype=dtype,
        device=place,
        threads=GPU_STREAMS if place.type == "cuda" else threads or torch.get_num_threads(),
    )
