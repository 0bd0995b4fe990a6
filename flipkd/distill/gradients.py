"""One batch forwards and backwards, whatever memory allows, on one worker or many.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): the loss needs the vectors of the whole batch, but the blocks need
only the texts of one pass. So vectors are computed without a graph, the loss gives the gradient of each vector, and
then pass after pass is run again with a graph and sent that gradient. Memory is that of one pass, and the gradient is
the same but for rounding.

Workers share the texts of a batch, not its pairs: each encodes some of the distinct texts, the vectors are gathered,
and every worker computes the same loss over all pairs. Gradients of LoRA's weights are then summed. So the result is
that of one worker, in-batch matrix and all, and no text is encoded by two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flipkd.models.student import Student, token_chunks

LossOfVectors = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Workers:
    """This process among those that train together; torch.distributed is set up when there are several."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums in place over the workers."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def told(self, numbers: Sequence[int], device: str | torch.device) -> list[int]:
        """What rank 0 says: its integers of 64 bits; the others pass as many of any value, and wait."""
        own = torch.tensor(numbers if self.leads else [0] * len(numbers), dtype=torch.int64, device=device)
        found: list[int] = self.sum(own).tolist()
        return found

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over the workers, in one message."""
        if self.count == 1:
            return
        # A worker whose share of texts is empty has no gradients; the message must be of one size all the same.
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        message = self.sum(torch.cat([gradient.reshape(-1) for gradient in found]))
        parts = torch.split(message, [parameter.numel() for parameter in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def share_of_texts(ids: Sequence[Sequence[int]], workers: Workers) -> list[int]:
    """Places of this worker's texts: every ``count``-th in order of length, so that all have about as many tokens."""
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    return order[workers.rank :: workers.count]


def seed_dropout(numbers: Sequence[int]) -> None:
    """Makes dropout of the pass to come a function of these numbers: in a resumed run it is what it would have been."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def backward_vectors(
    student: Student,
    ids: Sequence[Sequence[int]],
    loss_of_vectors: LossOfVectors,
    workers: Workers,
    max_tokens: int,
    seed: Sequence[int],
) -> dict[str, Tensor]:
    """Adds the gradients of a batch's loss to LoRA's weights; those of this worker's texts alone.

    Args:
        student: in training mode.
        ids: token ids of the N texts of the whole batch.
        loss_of_vectors: from float32 [N, d] to the loss and metrics.
        workers: who shares the work.
        max_tokens: tokens in one pass.
        seed: of this batch, for dropout.

    Returns:
        The metrics, with ``loss``.
    """
    own = share_of_texts(ids, workers)
    chunks = [[own[place] for place in chunk] for chunk in token_chunks([ids[place] for place in own], max_tokens)]

    def encode(number: int) -> Tensor:
        seed_dropout([*seed, workers.rank, number])
        return student.encode_ids([ids[place] for place in chunks[number]])

    at_once = len(chunks) <= 1
    with torch.set_grad_enabled(at_once):
        found = [encode(number) for number in range(len(chunks))]
    vectors = torch.zeros(len(ids), student.options.dimension, device=student.device)
    for chunk, part in zip(chunks, found, strict=True):
        vectors[chunk] = part.detach()
    vectors = workers.sum(vectors).requires_grad_()
    loss, metrics = loss_of_vectors(vectors)
    torch.autograd.backward(loss)
    assert vectors.grad is not None
    for number, chunk in enumerate(chunks):
        part = found[number] if at_once else encode(number)
        torch.autograd.backward(part, vectors.grad[chunk])
    return {"loss": loss.detach(), **metrics}
