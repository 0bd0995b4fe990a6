"""P(match) of pairs of texts from a decoder that reads both: no text is generated, and none is parsed.

For each label the log-probabilities of its tokens after the prompt are added up (so labels of several tokens, also ones
that share their first, are right), and the softmax over the two sums gives P(match). An engine computes these sums:
``torch`` (``flipkd.models.llm_torch``) or ``vllm`` (``flipkd.models.llm_vllm``). Importing this imports neither.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flipkd.data.json_files import parse_object
from flipkd.data.odds import sigmoid
from flipkd.errors import ConfigError, ModelError
from flipkd.models.folder import files_fingerprint, find_folder
from flipkd.models.llm_options import LlmOptions
from flipkd.models.llm_prompt import TRAINED_PROMPTS, PromptedPairs, PromptTokenizer, pair_prompt, read_prompt
from flipkd.models.options import PROMPT_VERSIONS, saved_options
from flipkd.models.parallel import not_finite
from flipkd.models.settings import read_json
from flipkd.models.tokens import distinct_of
from flipkd.models.trust import check_code, check_weights, known_form

logger = logging.getLogger(__name__)

_ADAPTER, _STUDENT_FILE, _RUN_FILE = "adapter", "student.json", "run.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
# Most tokens of a prompt where nobody says: our choice, far above what two records need.
_MAX_LENGTH = 1024


class Engine(Protocol):
    """Runs a decoder."""

    def label_log_probabilities(self, prompts: PromptedPairs) -> np.ndarray:
        """Log-probability of each label after each prompt, float64 [N, 2]; NaN where the model gives no number."""
        ...


@dataclass(frozen=True)
class LlmFolder:
    """A decoder on the disk.

    Args:
        base: folder of the model and its tokenizer.
        adapter: folder of the adapter that ``train`` made; None for a plain model.
        text_tokens: most tokens of a text in the adapter's training.
        prompt_version: what the adapter was asked in its training; a plain model is asked the newest.
    """

    base: Path
    adapter: Path | None = None
    text_tokens: int | None = None
    prompt_version: int = PROMPT_VERSIONS[-1]

    def fingerprint(self) -> str:
        """Hex hash over the files that decide its answers."""
        own = files_fingerprint(self.base)
        if self.adapter is None:
            return own
        # The adapter's own options (layer, alpha) are in its student.json, in the extra value.
        return files_fingerprint(self.adapter, {self.adapter}, own + (self.adapter / _STUDENT_FILE).read_text())


@dataclass(frozen=True)
class LlmAnswers:
    """Answers for N pairs, in their order.

    ``probabilities`` float32 [N] of a match; ``truncated`` bool [N], whether a text was cut; ``tokens`` int32 [N] of a
    pair's prompt; ``distinct``, how many different pairs there were.
    """

    probabilities: np.ndarray
    truncated: np.ndarray
    tokens: np.ndarray
    distinct: int


class PairLlm:
    """A loaded decoder. Use ``load_llm`` to get one.

    Args:
        tokenizer: pairs to prompts.
        engine: runs the prompts.
        both_orders: whether the answers to (left, right) and (right, left) are averaged.
    """

    def __init__(self, tokenizer: PromptTokenizer, engine: Engine, both_orders: bool) -> None:
        self.tokenizer, self.engine, self.both_orders = tokenizer, engine, both_orders

    def score_pairs(self, left: Sequence[str], right: Sequence[str]) -> LlmAnswers:
        """P(match) of pairs; each distinct pair is asked once.

        Args:
            left: N texts, normalised by the caller; they are taken as they are. May be empty texts.
            right: the N texts that they are compared with.

        Raises:
            ModelError: the model gives numbers that are not finite, in float32 too; names the places of the pairs.
        """
        distinct, rows = distinct_of(list(zip(left, right, strict=True)))
        count = len(distinct)
        asked = distinct + [(right, left) for left, right in distinct] if self.both_orders else distinct
        prompts = self.tokenizer.tokenize(asked)
        sums = self.engine.label_log_probabilities(prompts)
        found = sigmoid(sums[:, 1] - sums[:, 0])
        found = found.reshape(-1, count).mean(axis=0) if count else found
        if not np.isfinite(found).all():
            raise not_finite("language model", "pairs", rows, np.flatnonzero(~np.isfinite(found)))
        lengths = [len(shared) + len(own) for shared, own in zip(prompts.shared, prompts.own, strict=True)]
        truncated, tokens = np.array(prompts.truncated[:count], np.bool_), np.array(lengths[:count], np.int32)
        return LlmAnswers(found.astype(np.float32)[rows], truncated[rows], tokens[rows], count)


def load_llm(options: LlmOptions, threads: int | None = None) -> PairLlm:
    """Loads a decoder, as ``options`` say.

    Args:
        options: which, and how it is asked.
        threads: CPU threads of the torch engine, one batch each; by default as many as torch would use.

    Raises:
        ConfigError: an option cannot be used, or the engine is not installed.
        ModelError: the model cannot be loaded.
    """
    folder = read_llm(options)
    prompts = _prompts(options, folder)
    if options.engine == "vllm":
        from flipkd.models.llm_vllm import VllmEngine

        return PairLlm(prompts, VllmEngine(folder, options, prompts), options.both_orders)
    from flipkd.models.llm_torch import load_torch_engine

    return PairLlm(prompts, load_torch_engine(folder, options, prompts.prompt, threads), options.both_orders)


def load_prompts(options: LlmOptions) -> PromptTokenizer:
    """The prompts alone, without the model: to check options, and to count tokens.

    Raises:
        ConfigError: the prompt cannot be used.
        ModelError: the tokenizer cannot be loaded, has no chat template, or the prompt leaves no room for texts.
    """
    return _prompts(options, read_llm(options))


def read_llm(options: LlmOptions) -> LlmFolder:
    """Finds out what a folder is: a finished run of ``train``, its adapter, or a plain decoder. Loads no weights.

    Raises:
        ModelError: it is none of them.
    """
    path = find_folder(options.folder)
    with known_form(path):
        folder = _read_llm(path)
    check_code(folder.base, options.trust_remote_code)
    check_weights(folder.base)
    if folder.adapter is not None and not (folder.adapter / _WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder.adapter} holds no whole student: there is no {_WEIGHTS_FILE}")
    return folder


def _read_llm(path: Path) -> LlmFolder:
    if (path / _ADAPTER / _STUDENT_FILE).exists():
        path = path / _ADAPTER
    elif (path / _RUN_FILE).exists():
        raise ModelError(f"{path}: this training run is not finished; run train again, it goes on where it was")
    if (path / _STUDENT_FILE).exists():
        return _student_folder(path)
    config = read_json(path / "config.json")
    if not config:
        raise ModelError(f"{path}: has no config.json, so it is no decoder; give a run of train or a decoder's folder")
    architecture = (config.get("architectures") or ["no architecture"])[0]
    if not architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise ModelError(
            f"{path}: {architecture} does not predict tokens; give a ...ForCausalLM model or a run of train"
        )
    return LlmFolder(path)


def _student_folder(path: Path) -> LlmFolder:
    try:
        facts = parse_object((path / _STUDENT_FILE).read_bytes())
        options, wanted = saved_options(facts), facts["base_fingerprint"]
        base = find_folder(options["folder"])
        text_tokens, trains_all = int(options["max_length"]), bool(options["whole_tower"])
        version = int(options["prompt_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} holds no whole student: {type(error).__name__}: {error}") from error
    if files_fingerprint(base) != wanted:
        raise ModelError(f"{path}: was trained on another base than {base} is now; restore its files")
    if not trains_all:
        logger.warning(
            "%s was trained without --whole-tower: it never learned to answer, only to encode; expect poor answers",
            path,
        )
    if version not in TRAINED_PROMPTS:
        raise ModelError(f"{path}: was trained with prompt {version}, which this version of flipkd does not know")
    return LlmFolder(base, path, text_tokens, version)


def _prompts(options: LlmOptions, folder: LlmFolder) -> PromptTokenizer:
    from transformers import AutoTokenizer

    if options.prompt_file is None:
        text = TRAINED_PROMPTS[folder.prompt_version]
    else:
        assert options.labels is not None  # LlmOptions says so
        match, no_match = options.labels
        text = read_prompt(options.prompt_file, (no_match, match), options.chat_template)
    path = folder.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=options.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises whatever it meets
        raise ModelError(f"{path}: transformers cannot load the tokenizer: {type(error).__name__}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{path}: has no fast tokenizer (tokenizer.json); save it with a fast one")
    prompt = pair_prompt(text, tokenizer)
    return PromptTokenizer(prompt, tokenizer, _max_length(options, folder, prompt.longest))


def _max_length(options: LlmOptions, folder: LlmFolder, prompt_tokens: int) -> int:
    config = read_json(folder.base / "config.json")
    positions = config.get("max_position_embeddings") or (config.get("text_config") or {}).get(
        "max_position_embeddings"
    )
    wanted = options.max_length
    if wanted is None:
        wanted = _MAX_LENGTH if folder.text_tokens is None else prompt_tokens + 2 * folder.text_tokens
        return min(wanted, positions or wanted)
    if positions is not None and wanted > positions:
        raise ConfigError(f"--max-length {wanted} is more than the {positions} positions of this model")
    return wanted
