"""Whether the weights of a model are numbers at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from flipkd.errors import ModelError

_SUMMED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_finite(weights: Iterable[tuple[str, Tensor]], path: str | Path) -> None:
    """Refuses weights that are NaN or infinite: attention can make plausible numbers of them.

    PyTorch's attention on a CPU gives a query of NaN the weight 0 everywhere, so what is wrong does not show in the
    vectors. Tables of embeddings are left out: a token that is not a number shows in the texts that hold it.

    Args:
        weights: by name.
        path: of the folder, for the message.

    Raises:
        ModelError: names the folder and the weight.
    """
    for name, weight in weights:
        if not weight.is_floating_point() or not weight.numel() or "embed" in name:
            continue
        # One pass in the rule: a sum is finite only where all numbers are; it may also be too large for its type.
        found = weight.detach()
        found = found if found.dtype in _SUMMED else found.float()
        if not bool(found.sum().isfinite()) and not bool(found.isfinite().all()):
            raise ModelError(f"{path}: the weight {name} holds NaN or infinite numbers; get the model's files again")
