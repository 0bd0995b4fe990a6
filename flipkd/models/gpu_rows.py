"""Texts to finished rows on the GPU: of length 1, in the store's dtype, so that int8 rows leave it as bytes.

Encoders of the form that ``export`` writes end in ``flipkd.kernels.pool_project``: last norm, pooling, projection,
length 1 and the row's dtype in one launch in place of eight. All others end in the same steps one by one. On a CPU
``flipkd.vectors.rows.quantise`` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flipkd.kernels.encoder_ops import Texts
from flipkd.kernels.pool_project import MAX_DIM, MAX_WIDTH, TORCH_DTYPES, pool_project
from flipkd.models.backbone import Backbone
from flipkd.models.decoder import Decoder
from flipkd.models.folder import ModelFolder
from flipkd.models.pooling import load_projection

if TYPE_CHECKING:
    from flipkd.models.parallel import Model

# ids int64 [T], where each text lies, dtype: to rows [texts, dim] float32, int8 or uint16 (bf16).
RowModel = Callable[[Tensor, Texts, str], Tensor]
_POOLINGS = {"mean": "mean", "lasttoken": "last"}
_NOT_FINITE = -128  # in front of an int8 row; numbers go from -127 to 127


def load_row_model(folder: ModelFolder, backbone: Backbone, model: Model, device: torch.device) -> RowModel:
    """The function; ``are_finite`` tells which of its rows are.

    Args:
        folder: of the encoder.
        backbone: its transformer.
        model: texts to vectors float32 [texts, dim] in any other way.
        device: where they run.
    """
    decoder = backbone.states
    projection = load_projection(folder, device)
    modes = folder.pooling_modes
    skips = bool(folder.prompt) and not folder.pools_prompt
    is_plain = len(modes) == 1 and modes[0] in _POOLINGS and not skips
    if not isinstance(decoder, Decoder) or projection is None or not is_plain or not _fits(projection):
        return lambda ids, texts, dtype: finished_rows(model(ids, texts), dtype)
    norm, pooling = decoder.last_norm, _POOLINGS[modes[0]]

    def rows(ids: Tensor, texts: Texts, dtype: str) -> Tensor:
        made = pool_project(
            decoder.before_last_norm(ids, texts),
            texts.starts,
            projection,
            norm_weight=norm.weight,
            epsilon=norm.epsilon,
            pooling=pooling,
            dtype=dtype,
        )
        return _marked(made.rows, made.finite)

    return rows


def _fits(projection: Tensor) -> bool:
    dim, width = projection.shape
    return dim <= MAX_DIM and width <= MAX_WIDTH


def finished_rows(vectors: Tensor, dtype: str) -> Tensor:
    """Vectors float32 [N, dim] of any length to rows as ``flipkd.vectors.rows.quantise`` makes them.

    Returns:
        [N, dim] float32, int8 or uint16 (bf16); ``are_finite`` tells which of them are.
    """
    norms = vectors.norm(dim=1, keepdim=True)
    finite = norms.isfinite()
    rows = torch.where(finite, vectors / norms.clamp(min=1e-12), 0.0)
    if dtype == "int8":
        largest = rows.abs().amax(dim=1, keepdim=True)
        rows = (rows / torch.where(largest > 0, largest, 1.0) * 127.0).round()
    return _marked(rows.to(TORCH_DTYPES[dtype]), finite[:, 0])


def are_finite(rows: np.ndarray) -> np.ndarray:
    """Bool [N]: which of the rows [N, dim] that a ``RowModel`` gave are finite."""
    first = rows[:, 0]
    if rows.dtype == np.int8:
        found: np.ndarray = first != _NOT_FINITE
    elif rows.dtype == np.uint16:
        found = (first & 0x7F80) != 0x7F80
    else:
        found = np.isfinite(first)
    return found


def _marked(rows: Tensor, finite: Tensor) -> Tensor:
    """Rows whose first number says whether they are finite: else it is one that no row has."""
    rows[:, 0].masked_fill_(~finite, _NOT_FINITE if rows.dtype is torch.int8 else torch.nan)
    return rows.view(torch.uint16) if rows.dtype is torch.bfloat16 else rows
