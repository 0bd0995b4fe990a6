"""The decoder's own view of a pair: one prompt with both texts, and the label as its next token.

L_LM is the cross entropy of that token over the whole vocabulary. The paper names the term; prompt and label words are
our choice. Prompts of a batch are packed like texts, so nothing is padded and nothing has to be masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flipkd.distill.losses import language_model_loss
from flipkd.models.packed import pack, pool_packed
from flipkd.models.student import Student, token_chunks

PROMPT = ("First record: ", "\nSecond record: ", "\nDo both name the same thing, yes or no? Answer:")
ANSWERS = (" no", " yes")


@dataclass(frozen=True)
class JointPrompt:
    """Token ids of the prompt's fixed parts, and the first token of each answer (label 0, label 1)."""

    head: list[int]
    parts: tuple[list[int], list[int], list[int]]
    answers: tuple[int, int]

    @staticmethod
    def of(student: Student) -> JointPrompt:
        """The prompt in a student's tokens."""
        pieces = [student.body(ids) for ids in student.tokenize([*PROMPT, *ANSWERS]).ids]
        return JointPrompt(student.frame[0], (pieces[0], pieces[1], pieces[2]), (pieces[3][0], pieces[4][0]))

    def ids(self, left: Sequence[int], right: Sequence[int]) -> list[int]:
        """The prompt around two texts, given without special tokens (``Student.body``)."""
        first, second, question = self.parts
        return [*self.head, *first, *left, *second, *right, *question]


def answer_logits(student: Student, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the token after each prompt, float32 [P, vocabulary]. Runs the whole tower."""
    packed = pack(prompts, student.device)
    with student.autocast():
        states = student.decoder(
            input_ids=packed.ids, position_ids=packed.positions, use_cache=False, groups=packed.groups
        ).last_hidden_state
        head = student.model.get_base_model().lm_head
        logits: Tensor = head(pool_packed(states, packed, "last").to(head.weight.dtype)).float()
    return logits


def backward_language_model(
    student: Student,
    prompt: JointPrompt,
    pairs: Sequence[tuple[Sequence[int], Sequence[int], int]],
    weight: float,
    count: int,
    max_tokens: int,
) -> Tensor:
    """Adds the gradients of weight * L_LM; one pass of at most ``max_tokens`` tokens after the other.

    Args:
        student: with its whole tower.
        prompt: in its tokens.
        pairs: this worker's pairs as token ids without special tokens, with label 0 or 1.
        weight: of the loss.
        count: pairs of the whole batch, over which the loss is a mean.
        max_tokens: tokens in one pass.

    Returns:
        This worker's part of L_LM, without the weight.
    """
    prompts = [prompt.ids(left, right) for left, right, _ in pairs]
    total = torch.zeros((), device=student.device)
    for places in token_chunks(prompts, max_tokens):
        logits = answer_logits(student, [prompts[place] for place in places])
        targets = torch.tensor([prompt.answers[pairs[place][2]] for place in places], device=student.device)
        loss = language_model_loss(logits, targets) * (len(places) / count)
        torch.autograd.backward(weight * loss)
        total = total + loss.detach()
    return total
