"""The decoder's own view of a pair: one prompt with both texts, and the label as what follows it.

L_LM is the cross entropy of the label's tokens over the whole vocabulary. The prompt is that of
``flipkd.models.llm_prompt``, which scoring uses too. Prompts of a batch are packed like texts, so nothing is padded and
nothing has to be masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flipkd.distill.gradients import seed_dropout
from flipkd.distill.losses import language_model_loss
from flipkd.models.llm_prompt import PairPrompt
from flipkd.models.packed import pack, pool_texts
from flipkd.models.student import Student, token_chunks


def answer_logits(student: Student, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the token after each prompt, float32 [P, vocabulary]. Runs the whole tower."""
    packed = pack(prompts, student.device)
    with student.autocast():
        states = student.decoder(**packed.arguments).last_hidden_state
        base = student.model.get_base_model()
        head = base.lm_head
        logits: Tensor = head(pool_texts(states, packed, "last").to(head.weight.dtype)).float()
    cap = getattr(base.config, "final_logit_softcapping", None)  # of Gemma 2; the head alone does not apply it
    return logits if cap is None else cap * torch.tanh(logits / cap)


def answer_log_odds(
    student: Student, prompt: PairPrompt, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_tokens: int
) -> npt.NDArray[np.float64]:
    """Log-odds of a match in the student's own answers, float64 [P]; without gradients and dropout.

    Args:
        student, prompt, max_tokens: as in ``backward_language_model``.
        pairs: P pairs as token ids without special tokens.
    """
    # One prompt for each beginning of a label: () alone where both labels are one token.
    begins = sorted({label[:place] for label in prompt.labels for place in range(len(label))})
    prompts = [[*prompt.ids(left, right), *begun] for left, right in pairs for begun in begins]
    training = student.training
    student.eval()
    odds = torch.zeros(len(pairs), dtype=torch.float64, device=student.device)
    with torch.no_grad():
        for places in token_chunks(prompts, max_tokens):
            logs = answer_logits(student, [prompts[place] for place in places]).log_softmax(-1).double()
            for row, place in enumerate(places):
                pair, begun = place // len(begins), begins[place % len(begins)]
                for sign, label in zip((-1, 1), prompt.labels, strict=True):
                    if len(label) > len(begun) and label[: len(begun)] == begun:
                        odds[pair] += sign * logs[row, label[len(begun)]]
    student.train(training)
    return odds.cpu().numpy()


def backward_language_model(
    student: Student,
    prompt: PairPrompt,
    pairs: Sequence[tuple[Sequence[int], Sequence[int], int]],
    weight: float,
    count: int,
    max_tokens: int,
    seed: Sequence[int],
) -> Tensor:
    """Adds the gradients of weight * L_LM; one pass of at most ``max_tokens`` tokens after the other.

    Args:
        student: with its whole tower.
        prompt: in its tokens.
        pairs: this worker's pairs as token ids without special tokens, with label 0 or 1.
        weight: of the loss.
        count: pairs of the whole batch, over which the loss is a mean.
        max_tokens: tokens in one pass.
        seed: of this batch and worker, for dropout.

    Returns:
        This worker's part of L_LM, without the weight.
    """
    # A label of several tokens is as many prompts: each ends before one of them. Nearly all labels are one token.
    prompts, targets = [], []
    for left, right, label in pairs:
        tokens = prompt.labels[label]
        for place, token in enumerate(tokens):
            prompts.append([*prompt.ids(left, right), *tokens[:place]])
            targets.append(token)
    total = torch.zeros((), device=student.device)
    for number, places in enumerate(token_chunks(prompts, max_tokens)):
        seed_dropout([*seed, number])
        logits = answer_logits(student, [prompts[place] for place in places])
        wanted = torch.tensor([targets[place] for place in places], device=student.device)
        loss = language_model_loss(logits, wanted) * (len(places) / count)
        torch.autograd.backward(weight * loss)
        total = total + loss.detach()
    return total
