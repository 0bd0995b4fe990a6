"""Texts to finished rows in one kernel after the blocks, for encoders of the form that ``export`` writes.

Last norm, pooling, projection, length 1 and the row's dtype are ``flipkd.kernels.pool_project``: one launch in place of
eight, and int8 rows leave the GPU as bytes. On a CPU the same steps in PyTorch are no slower, so ``load_encoder`` takes
this on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flipkd.kernels.pool_project import pool_project
from flipkd.models.backbone import Backbone
from flipkd.models.decoder import Decoder
from flipkd.models.folder import ModelFolder
from flipkd.models.pooling import load_projection

# ids int64 [T], positions int64 [T], lengths int64 [texts], dtype: to rows [texts, dim] float32, int8 or uint16 (bf16).
RowModel = Callable[[Tensor, Tensor, Tensor, str], Tensor]
_POOLINGS = {"mean": "mean", "lasttoken": "last"}


def load_fused_rows(folder: ModelFolder, backbone: Backbone, device: torch.device) -> RowModel | None:
    """The function, or None for a folder of another form. A row that is not finite comes back as zeros."""
    decoder = backbone.states
    projection = load_projection(folder, device)
    modes = folder.pooling_modes
    skips = bool(folder.prompt) and not folder.pools_prompt
    if not isinstance(decoder, Decoder) or projection is None or len(modes) != 1 or modes[0] not in _POOLINGS or skips:
        return None
    norm, pooling = decoder.last_norm, _POOLINGS[modes[0]]

    def rows(ids: Tensor, positions: Tensor, lengths: Tensor, dtype: str) -> Tensor:
        del positions
        states = decoder.before_last_norm(ids, lengths.tolist())
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        made = pool_project(
            states, starts, projection, norm_weight=norm.weight, epsilon=norm.epsilon, pooling=pooling, dtype=dtype
        ).rows
        return made.view(torch.uint16) if dtype == "bf16" else made

    return rows
