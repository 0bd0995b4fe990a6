"""Keys and values of common beginnings of prompts, of different lengths, as a decoder takes them up.

A cache of transformers has one length. So the beginnings of a batch are padded *on the left*, and those places are
masked: what follows stands right behind every beginning, and distances between tokens (sliding windows) are true.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Per layer: keys, values [rows, heads, tokens, width].
States = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Beginnings:
    """Keys and values of B beginnings, each padded on the right.

    Args:
        states: rows are the beginnings; positions from a beginning's length on mean nothing.
        lengths: int64 [B] tokens of each.
    """

    states: States
    lengths: Tensor

    def taken_up(self, rows: Tensor, tokens: int) -> dict[str, Any]:
        """Arguments of a decoder's forward pass over what follows.

        Args:
            rows: int64 [R], the beginning of each row.
            tokens: of each row, padding on the right included.

        Returns:
            The filled cache, positions and, where the beginnings differ in length, a mask of tokens.
        """
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        shift = (longest - lengths)[:, None]
        positions = lengths[:, None] + torch.arange(tokens, device=rows.device)
        found: dict[str, Any] = {"position_ids": positions, "use_cache": True}
        if not bool(shift.any()):
            states = [(keys[rows, :, :longest], values[rows, :, :longest]) for keys, values in self.states]
            return {**found, "cache": filled_cache(states)}
        places = torch.arange(longest, device=rows.device) - shift  # [R, longest], negative where there is padding
        chosen = (rows[:, None], places.clamp(min=0))
        states = [
            (keys.transpose(1, 2)[chosen].transpose(1, 2), values.transpose(1, 2)[chosen].transpose(1, 2))
            for keys, values in self.states
        ]
        mask = torch.cat([(places >= 0).long(), torch.ones_like(positions)], dim=1)
        return {**found, "cache": filled_cache(states), "attention_mask": mask}


def repeated(states: States, count: int) -> States:
    """One row of keys and values, ``count`` times; a view."""
    return [(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in states]


def filled_cache(states: States | None) -> Any:
    """A cache of transformers that holds keys and values already."""
    from transformers import DynamicCache

    filled = DynamicCache()
    for number, (keys, values) in enumerate(states or ()):
        filled.update(keys, values, number)
    return filled


def joined(parts: list[States]) -> States:
    """Several beginnings' keys and values as one, padded on the right to the longest."""
    longest = max(part[0][0].shape[2] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        more = longest - tensor.shape[2]
        return torch.nn.functional.pad(tensor, (0, 0, 0, more)) if more else tensor

    return [
        (torch.cat([padded(keys) for keys, _ in layer]), torch.cat([padded(values) for _, values in layer]))
        for layer in zip(*parts, strict=True)
    ]
