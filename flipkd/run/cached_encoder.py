"""Texts to rows of a store: those that the text cache knows are taken from it, the others are encoded and added.

A vector does not depend on the texts beside it (to the bit on the CPUs where we looked), so a store made with a cache
has the bytes of one made without. Vectors that another kind of machine has put into the cache are that machine's: they
differ by as much as encoding there would.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flipkd.config import EncodeConfig, EncoderOptions, VectorDtype
from flipkd.data.location import open_location
from flipkd.errors import ConfigError
from flipkd.vectors.cache import CACHE_FOLDER, TextCache, open_cache
from flipkd.vectors.cache_tidy import compact_if_free
from flipkd.vectors.layout import STATUS_TRUNCATED
from flipkd.vectors.rows import VectorRows

if TYPE_CHECKING:
    from flipkd.models.encoder import Encoder

_MANY_SEGMENTS = 32  # our choice: a look-up searches each of them


@dataclass(frozen=True)
class EncodedRows:
    """What became of N texts.

    Args:
        rows: [N, d] of the store's dtype.
        status: [N] uint8, bits of STATUS_*.
        encoded: texts that the model has read; ``tokens`` is how many tokens it saw.
        cached: texts that were in the cache.
        load_seconds: that this call took to load the model.
    """

    rows: VectorRows
    status: NDArray[np.uint8]
    encoded: int
    tokens: int
    cached: int
    load_seconds: float


class CachedEncoder:
    """An encoder and, if asked for, the text cache before it.

    With a cache the model is loaded when the first text is not in it: a night in which nothing changed loads none.

    Args:
        options: the encoder.
        dtype: of the rows.
        cache: the text cache, or None.
        threads: of the encoder.
    """

    def __init__(self, options: EncoderOptions, dtype: VectorDtype, cache: TextCache | None, threads: int) -> None:
        self._options, self._dtype, self._cache, self._threads = options, dtype, cache, threads
        self._load_seconds = 0.0
        self._loaded: Encoder | None = None if cache is not None else self._load()

    def rows(self, texts: pa.LargeStringArray) -> EncodedRows:
        """Rows of N normalised texts, none of them null. What was encoded is in the cache when this returns."""
        found = self._rows(texts)
        load_seconds, self._load_seconds = self._load_seconds, 0.0
        return replace(found, load_seconds=load_seconds)

    def _rows(self, texts: pa.LargeStringArray) -> EncodedRows:
        if self._cache is None:
            rows, status, tokens = self._encode(texts)
            return EncodedRows(rows, status, len(texts), tokens, 0, 0.0)
        keys = self._cache.keys(texts)
        hits = self._cache.look_up(keys)
        if hits.rows is not None and hits.found.all():
            return EncodedRows(hits.rows, hits.status, 0, 0, len(texts), 0.0)
        missing = np.flatnonzero(~hits.found)
        fresh, fresh_status, tokens = self._encode(texts.take(pa.array(missing)))
        self._cache.put(keys[missing], fresh, fresh_status)
        if self._cache.segment_count >= _MANY_SEGMENTS:
            compact_if_free(self._cache)
        if hits.rows is None:
            return EncodedRows(fresh, fresh_status, len(missing), tokens, 0, 0.0)
        hits.rows.values[missing], hits.status[missing] = fresh.values, fresh_status
        return EncodedRows(hits.rows, hits.status, len(missing), tokens, len(texts) - len(missing), 0.0)

    def _encode(self, texts: pa.LargeStringArray) -> tuple[VectorRows, NDArray[np.uint8], int]:
        if self._loaded is None:
            started = time.perf_counter()
            self._loaded = self._load()
            self._load_seconds = time.perf_counter() - started
        encoded = self._loaded.encode_rows(texts.to_pylist(), self._dtype, max_tokens=self._options.max_tokens)
        status = np.where(encoded.truncated, STATUS_TRUNCATED, 0).astype(np.uint8)
        return encoded.rows, status, int(encoded.tokens.sum())

    def _load(self) -> Encoder:
        from flipkd.models.encoder import load_encoder

        options = self._options
        return load_encoder(
            options.folder,
            dtype=options.dtype,
            device=options.device,
            max_length=options.max_length,
            trust_remote_code=options.trust_remote_code,
            threads=self._threads,
        )


def text_cache(folder: str, encoder: str, dtype: VectorDtype) -> TextCache:
    """The text cache below ``--cache``.

    Args:
        folder: what ``--cache`` names.
        encoder: ``encoder_fingerprint`` of the encoder.
        dtype: of the vectors.

    Raises:
        ConfigError: the folder is not local, or the key is damaged.
        OutputError: it cannot be written.
    """
    return open_cache(cache_root(folder), encoder, dtype)


def text_cache_of(config: EncodeConfig, encoder: str) -> TextCache | None:
    """The cache that a configuration names, or None; see ``text_cache``."""
    return None if config.cache is None else text_cache(config.cache, encoder, config.dtype)


def cache_root(folder: str) -> Path:
    """Where the text cache lies.

    Raises:
        ConfigError: it is not local, or no folder.
    """
    location = open_location(folder)
    if not location.is_local:
        raise ConfigError(f"--cache {location.uri}: a cache is mapped into memory; name a local folder")
    if os.path.exists(location.path) and not os.path.isdir(location.path):
        raise ConfigError(f"--cache {location.uri} is a file; name a folder")
    return Path(location.path) / CACHE_FOLDER
