"""The torch engine: prompts through a decoder, what they have in common computed once.

Keys and values of the instruction are computed once per engine, and those of instruction and first text once for all
pairs with that text. What is left of the prompts runs in batches sorted by length. A batch is padded on the right, by a
few tokens at most: a causal model's earlier tokens do not see it, so that is not masked; where the first texts of a
batch differ in length, their keys and values are (``flipkd.models.llm_states``). A pair's answer does not depend on its
neighbours beyond rounding.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipkd.models.adapter import load_merged
from flipkd.models.backbone import load_pretrained
from flipkd.models.device import check_options, find_device
from flipkd.models.llm import LlmFolder
from flipkd.models.llm_options import LlmOptions
from flipkd.models.llm_prompt import PairPrompt, PromptedPairs
from flipkd.models.llm_states import Beginnings, States, filled_cache, joined, repeated
from flipkd.models.progress import tell

# Tokens of a batch, keys and values of its prefixes included: what bounds memory. Our guesses, not measured.
MAX_TOKENS = {"cpu": 4096, "cuda": 65536}
# Tokens by which the texts of a batch differ at most: the head gives logits at so many places for every one of them.
_MOST_PADDING = 4


@dataclass(frozen=True)
class _DecoderFolder:
    """A plain decoder's folder, as ``load_pretrained`` wants it described: with no settings of its own."""

    transformer_path: Any
    max_length: None = None
    truncates: bool = False
    model_settings: Any = None
    tokenizer_settings: Any = None
    config_settings: Any = None


@dataclass(frozen=True)
class _Row:
    """What is left of a prompt after its prefix, with the first tokens of a label.

    Args:
        place: of the prompt in the input.
        extra: number of the label tokens in ``TorchEngine``'s list.
        prefix: number of the prefix among those of its task.
        ids: tokens.
        answer: place in ``ids`` of the token that the answer follows.
    """

    place: int
    extra: int
    prefix: int
    ids: list[int]
    answer: int


@dataclass(frozen=True)
class _Task:
    """Prompts that run together: ``prefixes`` are token ids without the instruction's, the shortest first."""

    prefixes: list[tuple[int, ...]]
    rows: list[_Row]


def load_torch_engine(folder: LlmFolder, options: LlmOptions, prompt: PairPrompt, threads: int | None) -> TorchEngine:
    """Loads the model; a run's adapter is merged into it.

    Raises:
        ConfigError: an option cannot be used here.
        ModelError: the model cannot be loaded.
    """
    check_options(options.dtype, options.device, options.max_length, threads)
    device = find_device(options.device)

    def load(dtype: torch.dtype) -> Any:
        if folder.adapter is not None:
            return load_merged(folder.adapter, str(folder.base), dtype, options.trust_remote_code)[0].to(device)
        settings = _DecoderFolder(folder.base, model_settings={}, tokenizer_settings={}, config_settings={})
        return load_pretrained(settings, dtype, options.trust_remote_code, "AutoModelForCausalLM").to(device).eval()

    is_bf16 = options.dtype == "bf16"
    return TorchEngine(
        load(torch.bfloat16 if is_bf16 else torch.float32),
        prompt,
        exact=cache(partial(load, torch.float32)) if is_bf16 else None,
        device=device,
        threads=1 if device.type == "cuda" else threads or torch.get_num_threads(),
        max_tokens=options.max_tokens or MAX_TOKENS[device.type],
        share_prefixes=options.share_prefixes,
    )


class TorchEngine:
    """Runs prompts through a transformers decoder. On a CPU each thread runs batches of its own.

    Args:
        model: a causal language model on ``device``.
        prompt: in its tokens.
        exact: gives the same model in float32; called where ``model`` gives a number that is not finite.
        device: where it runs.
        threads: how many tasks run at once.
        max_tokens: tokens of a batch.
        share_prefixes: whether common beginnings are computed once.
    """

    def __init__(
        self,
        model: Any,
        prompt: PairPrompt,
        *,
        exact: Callable[[], Any] | None = None,
        device: torch.device,
        threads: int,
        max_tokens: int,
        share_prefixes: bool,
    ) -> None:
        self._model, self._prompt, self._exact = model, prompt, exact
        self._device, self._threads, self._max_tokens = device, threads, max_tokens
        self._shares = share_prefixes
        # transformers 5 has renamed the argument.
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._takes_positions = "position_ids" in names
        # A label's tokens but the last are fed after the prompt. What begins another such list is read from that one.
        begins = {label[:-1] for label in prompt.labels}
        self._extras = sorted(
            one for one in begins if not any(one != other and other[: len(one)] == one for other in begins)
        )
        self._extra_of = [
            next(place for place, extra in enumerate(self._extras) if extra[: len(label) - 1] == label[:-1])
            for label in prompt.labels
        ]
        self._instruction: States | None = None
        self._lock = Lock()

    def label_log_probabilities(self, prompts: PromptedPairs) -> np.ndarray:
        """See ``flipkd.models.llm.Engine``."""
        sums = self._run(prompts)
        bad = np.flatnonzero(~np.isfinite(sums).all(axis=1)).tolist()
        if bad and self._exact is not None:
            exact = TorchEngine(
                self._exact(),
                self._prompt,
                device=self._device,
                threads=self._threads,
                max_tokens=self._max_tokens,
                share_prefixes=False,
            )
            chosen = PromptedPairs(
                [prompts.shared[place] for place in bad],
                [prompts.own[place] for place in bad],
                [prompts.truncated[place] for place in bad],
            )
            sums[bad] = exact.label_log_probabilities(chosen)
        return np.where(np.isfinite(sums), sums, np.nan)

    def _run(self, prompts: PromptedPairs) -> np.ndarray:
        sums = np.full((len(prompts.own), 2), np.nan)
        own_threads = torch.get_num_threads()
        starts = partial(torch.set_num_threads, 1) if self._device.type == "cpu" else None
        try:
            with ThreadPoolExecutor(self._threads, "flipkd-llm", starts) as pool:
                done = 0
                for places, found in pool.map(self._work, self._tasks(prompts)):
                    done += len(np.unique(places[:, 0]))
                    tell(done, len(prompts.own))
                    for label in range(2):
                        is_own = places[:, 1] == self._extra_of[label]
                        sums[places[is_own, 0], label] = found[is_own, label]
        finally:
            torch.set_num_threads(own_threads)  # what threads that start later take over
        return sums

    def _tasks(self, prompts: PromptedPairs) -> Iterator[_Task]:
        """Prompts by prefix. A first text that one pair alone has is no prefix: two passes would cost more than one."""
        instruction = len(self._prompt.before) if self._shares else 0
        counts = Counter(map(tuple, prompts.shared)) if self._shares else Counter()
        by_prefix: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for place, (shared, own) in enumerate(zip(prompts.shared, prompts.own, strict=True)):
            key = tuple(shared)
            prefix = key[instruction:] if counts[key] > 1 else ()
            rest = own if prefix else [*shared[instruction:], *own]
            by_prefix.setdefault(prefix, []).append((place, rest))
        prefixes: list[tuple[int, ...]] = []
        rows: list[_Row] = []
        tokens = 0
        # By length (of equal ones in the order of the input), so that the prefixes of a task are padded little.
        for prefix in sorted(by_prefix, key=len):
            # Shortest first, so that the texts of a task, and so of its batches, are of about one length.
            for place, rest in sorted(by_prefix[prefix], key=lambda item: len(item[1])):
                is_new = not prefixes or prefixes[-1] != prefix
                # What has no prefix but the instruction stands apart: it needs no mask.
                if rows and (tokens > 4 * self._max_tokens or (is_new and not prefixes[-1])):
                    yield _Task(prefixes, rows)
                    prefixes, rows, tokens, is_new = [], [], 0, True
                if is_new:
                    prefixes.append(prefix)
                for number, extra in enumerate(self._extras):
                    rows.append(_Row(place, number, len(prefixes) - 1, [*rest, *extra], len(rest) - 1))
                    tokens += len(rows[-1].ids)
        if rows:
            yield _Task(prefixes, rows)

    @torch.inference_mode()
    def _work(self, task: _Task) -> tuple[np.ndarray, np.ndarray]:
        """Places and extras int64 [rows, 2] of a task's rows, and log-probabilities float64 [rows, 2]."""
        beginnings = self._beginnings(task.prefixes)
        longest = 0 if beginnings is None else int(beginnings.lengths[-1])
        places, found = [], []
        for rows in _batches(task.rows, longest, self._max_tokens):
            places += [(row.place, row.extra) for row in rows]
            found.append(self._batch(rows, beginnings))
        return np.array(places, np.int64), np.concatenate(found)

    def _beginnings(self, prefixes: Sequence[tuple[int, ...]]) -> Beginnings | None:
        """Keys and values of instruction and prefixes, one row for each prefix; None for no token at all."""
        if not self._shares:
            return None
        with self._lock:
            if self._instruction is None:
                before = torch.tensor([self._prompt.before], device=self._device)
                self._instruction = self._pass(before, None) if self._prompt.before else []
        instruction = self._instruction or None
        known = len(self._prompt.before)
        lengths = torch.tensor([known + len(prefix) for prefix in prefixes], device=self._device)
        if not prefixes[-1]:
            return None if instruction is None else Beginnings(instruction, lengths)
        parts: list[States] = []
        step = max(1, self._max_tokens // int(lengths[-1]))
        for start in range(0, len(prefixes), step):
            some = prefixes[start : start + step]
            # Padded on the right: what a causal model's earlier tokens do not see.
            padded = [[*prefix, *[0] * (len(some[-1]) - len(prefix))] for prefix in some]
            ids = torch.tensor(padded, device=self._device)
            parts.append(self._pass(ids, None if instruction is None else repeated(instruction, len(ids))))
        return Beginnings(joined(parts), lengths)

    def _pass(self, ids: Tensor, before: States | None) -> States:
        """Keys and values of ids int64 [rows, tokens], with those of what stands before them."""
        filled = filled_cache(before)
        self._model.base_model(input_ids=ids, use_cache=True, **{self._cache_name: filled})
        return [(layer.keys, layer.values) for layer in filled.layers]

    def _batch(self, rows: Sequence[_Row], beginnings: Beginnings | None) -> np.ndarray:
        """Log-probability of each label, float64 [rows, 2]; of use only for labels of a row's extra."""
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=self._device)
        steps = max(map(len, self._extras)) + 1
        # Where each label token is predicted; the last place again for a shorter label.
        places = np.array([[min(row.answer + step, len(row.ids) - 1) for step in range(steps)] for row in rows])
        kept, found = np.unique(places, return_inverse=True)
        index = torch.from_numpy(found.reshape(places.shape)).to(self._device)
        more: dict[str, Any] = {"use_cache": False}
        if beginnings is not None:
            more = beginnings.taken_up(torch.tensor([row.prefix for row in rows], device=self._device), width)
            more[self._cache_name] = more.pop("cache")
            if not self._takes_positions:
                del more["position_ids"]  # such a model counts them from the mask
        logits = self._model(input_ids=ids, logits_to_keep=torch.from_numpy(kept).to(self._device), **more).logits
        numbers = torch.arange(len(rows), device=self._device)[:, None]
        logs = logits[numbers, index].float().log_softmax(-1)  # [rows, steps, vocabulary]
        sums = [sum(logs[:, step, token].double() for step, token in enumerate(label)) for label in self._prompt.labels]
        return torch.stack(sums, dim=1).cpu().numpy()


def _batches(rows: Sequence[_Row], prefix_tokens: int, max_tokens: int) -> Iterator[list[_Row]]:
    """Rows by length, in batches of at most ``max_tokens`` tokens (a longer row has a batch of its own)."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        tokens = (len(batch) + 1) * (prefix_tokens + len(row.ids))
        if batch and (tokens > max_tokens or len(row.ids) - len(batch[0].ids) > _MOST_PADDING):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
