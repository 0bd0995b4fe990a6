"""Where the projection A of layer k starts.

Our choice: not LoRA's random matrix but the whitening of the texts at hand (Su et al. 2021, arXiv 2103.15316): rows are
principal directions of x over some training texts, each divided by its standard deviation. A decoder's hidden states
share a few strong directions that say little about meaning; whitened, they weigh no more than the rest. It costs one
pass over some texts, and training goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flipkd.distill.gradients import Workers
from flipkd.models.student import Student, token_chunks

_TEXTS = 2048


def whiten_projection(
    student: Student, ids: Sequence[Sequence[int]], workers: Workers, max_tokens: int, seed: int
) -> None:
    """Sets A to the whitening of x over at most 2,048 of the texts; its entries keep the size that LoRA gave them.

    Directions that the texts do not fill (fewer texts than dimensions) keep LoRA's random start.

    Args:
        student: with B = 0, so that x is the base's.
        ids: token ids of the training texts.
        workers: rank 0 computes, the others take it over.
        max_tokens: tokens in one pass.
        seed: of the choice of texts.
    """
    projection = student.projection
    found = torch.zeros_like(projection)
    if workers.leads:
        count = min(len(ids), _TEXTS)
        chosen = [ids[place] for place in np.random.default_rng([seed, 3]).choice(len(ids), count, replace=False)]
        student.eval()
        with torch.no_grad():
            states = torch.cat(
                [student.states([chosen[place] for place in part]) for part in token_chunks(chosen, max_tokens)]
            ).double()
            centred = states - states.mean(0)
            _, deviations, directions = torch.linalg.svd(centred, full_matrices=False)
            rank = min(int((deviations > 1e-6 * deviations.max()).sum()), len(projection))
            found.copy_(projection)
            if rank:
                white = directions[:rank] / deviations[:rank, None]
                found[:rank] = white * (projection[:rank].norm() / white.norm())
    with torch.no_grad():
        projection.copy_(workers.sum(found))
