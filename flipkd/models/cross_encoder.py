"""Pairs of texts to scores: a transformer that reads both texts of a pair together, without sentence-transformers.

Scores equal ``sentence_transformers.CrossEncoder(folder).predict(pairs)``, and of two logits the softmax's second
probability, but for two things, both wanted: special tokens inside a text are plain text here, and nothing is ever
padded, so that a pair's score does not depend on its neighbours, and no padding token is needed. The order in a pair
matters: (a, b) and (b, a) are different inputs and score differently. A folder is read as plain text pairs: a chat
template beside a plain Hugging Face model is not applied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flipkd.errors import ConfigError, ModelError
from flipkd.models.batches import equal_length_batches, tokenized_chunks
from flipkd.models.device import MAX_TOKENS, check_options, find_device
from flipkd.models.pair_tokens import PairTokenizer
from flipkd.models.parallel import loaded_at_first_use, not_finite, run_batches
from flipkd.models.progress import tell
from flipkd.models.teacher import CrossEncoderFolder, Scale, read_cross_encoder
from flipkd.models.tokenizer import load_tokenizer, longest_input
from flipkd.models.tokens import TokenizedTexts, distinct_of
from flipkd.models.trust import check_code

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoredPairs:
    """Scores of N pairs, in their order.

    ``scores`` float32 [N] on the cross-encoder's scale; ``truncated`` bool [N], whether a text was cut; ``tokens``
    int32 [N], tokens that the model saw; ``distinct``, how many different pairs there were.
    """

    scores: np.ndarray
    truncated: np.ndarray
    tokens: np.ndarray
    distinct: int


class CrossEncoder:
    """A loaded cross-encoder. Use ``load_cross_encoder`` to get one.

    Args:
        tokenizer: pairs to token ids.
        model: ids int64 [pairs, tokens] (and, if ``uses_types``, type ids of the same shape) to logits float32
            [pairs, 1 or 2], all on ``device``.
        exact_model: gives the same in float32; called only when ``model`` gives a number that is not finite.
        uses_types: whether the model tells the texts of a pair apart by token type ids.
        activation: ``Sigmoid``, ``Identity`` or ``Softmax``; see ``CrossEncoderFolder``.
        scale: of the scores.
        max_length: most tokens per pair, special tokens included; None for no limit.
        device: where ``model`` runs.
        threads: how many batches run at once.
    """

    def __init__(
        self,
        *,
        tokenizer: PairTokenizer,
        model: Callable[..., torch.Tensor],
        exact_model: Callable[..., torch.Tensor] | None,
        uses_types: bool,
        activation: str,
        scale: Scale,
        max_length: int | None,
        device: torch.device,
        threads: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._exact_model = exact_model
        self._uses_types = uses_types
        self.activation = activation
        self.scale = scale
        self.max_length = max_length
        self.device = device
        self.threads = threads

    def score_pairs(self, left: Sequence[str], right: Sequence[str], *, max_tokens: int | None = None) -> ScoredPairs:
        """Scores pairs; each distinct pair once.

        Args:
            left: N texts, normalised by the caller; they are taken as they are.
            right: the N texts that they are compared with.
            max_tokens: most tokens per batch (a longer pair has a batch of its own); by default what suits the device.

        Raises:
            ConfigError: ``max_tokens`` is not positive.
            ModelError: the model gives numbers that are not finite, in float32 too, or a pair has no token at all;
                names the places of the pairs.
        """
        if max_tokens is None:
            max_tokens = MAX_TOKENS[self.device.type]
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
        distinct, rows = distinct_of(list(zip(left, right, strict=True)))
        logits: np.ndarray | None = None
        truncated = np.zeros(len(distinct), dtype=np.bool_)
        tokens = np.zeros(len(distinct), dtype=np.int32)
        left_tokens = np.zeros(len(distinct), dtype=np.int32)

        def noted() -> Iterator[tuple[int, TokenizedTexts]]:
            for start, chunk in tokenized_chunks(self._tokenizer, distinct):
                stop = start + len(chunk.left_tokens)
                truncated[start:stop] = chunk.tokens.truncated
                tokens[start:stop] = chunk.tokens.lengths
                left_tokens[start:stop] = chunk.left_tokens
                yield start, chunk.tokens

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            for places, ids in equal_length_batches(noted(), max_tokens):
                if self._uses_types:
                    yield places, ids, self._tokenizer.type_ids(left_tokens[places].tolist(), ids.shape[1])
                else:
                    yield places, ids

        done = 0
        with closing(run_batches(batches(), self._model, self._exact_model, self.device, self.threads)) as results:
            for places, found, finite in results:
                if not finite.all():
                    raise not_finite("cross-encoder", "pairs", rows, places[~finite])
                if logits is None:
                    logits = np.full((len(distinct), found.shape[1]), np.nan, np.float32)
                logits[places] = found
                done += len(places)
                tell(done, len(distinct))
        if (tokens == 0).any():
            raise ModelError("the cross-encoder's tokenizer makes no token at all of some pairs; they cannot be scored")
        scores = np.empty(0, np.float32) if logits is None else self._activate(logits)
        return ScoredPairs(scores[rows], truncated[rows], tokens[rows], len(distinct))

    def _activate(self, logits: np.ndarray) -> np.ndarray:
        """Scores float32 [N] of logits float32 [N, 1 or 2]."""
        import torch

        numbers = torch.from_numpy(logits)
        if self.activation == "Softmax":
            scores: np.ndarray = torch.softmax(numbers, dim=1)[:, 1].numpy()
        elif self.activation == "Sigmoid":
            scores = torch.sigmoid(numbers)[:, 0].numpy()
        else:
            scores = logits[:, 0]
        return scores


def load_cross_encoder(
    folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    max_length: int | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
) -> CrossEncoder:
    """Loads a cross-encoder from safetensors; see ``read_cross_encoder`` for which.

    Args:
        folder: a local folder, or the name of a model on the hub (owner/name) where no such folder exists.
        dtype: "float32" or "bf16".
        device: "cpu", "cuda", or "auto" (CUDA if there is a device).
        max_length: most tokens per pair, special tokens included; by default what the folder says.
        trust_remote_code: allow the folder to bring Python code for its transformer or tokenizer.
        threads: CPU threads, one batch each; by default as many as torch would use. A GPU takes one batch at a time.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: the folder cannot be loaded; the message names the file and the way out.
    """
    check_options(dtype, device, max_length, threads)
    if dtype == "int8":
        raise ConfigError("dtype 'int8' is for bi-encoders; a cross-encoder takes float32 or bf16")
    settings = read_cross_encoder(folder)  # before torch is imported, so that a wrong folder is reported at once
    check_code(settings.transformer_path, trust_remote_code)

    import torch

    from flipkd.models.backbone import position_limit

    place = find_device(device)
    transformers_tokenizer = load_tokenizer(settings, trust_remote_code)
    model = _load(settings, torch.bfloat16 if dtype == "bf16" else torch.float32, place, trust_remote_code)
    uses_types = (
        "token_type_ids" in transformers_tokenizer.model_input_names
        and "token_type_ids" in inspect.signature(model.forward).parameters
    )
    limit = longest_input(settings, transformers_tokenizer, position_limit(model), max_length)
    try:
        tokenizer = PairTokenizer(
            transformers_tokenizer.backend_tokenizer,
            max_length=limit,
            lower_case=settings.lower_case,
            cuts_left=transformers_tokenizer.truncation_side == "left",
            unknown=transformers_tokenizer.unk_token_id,
        )
    except ModelError as error:
        raise ModelError(f"{settings.transformer_path}: {error}") from error

    def exact() -> Callable[..., torch.Tensor]:
        return _logits(_load(settings, torch.float32, place, trust_remote_code))

    return CrossEncoder(
        tokenizer=tokenizer,
        model=_logits(model),
        exact_model=loaded_at_first_use(exact) if dtype == "bf16" else None,
        uses_types=uses_types,
        activation=settings.activation,
        scale=settings.scale,
        max_length=limit,
        device=place,
        threads=1 if place.type == "cuda" else threads or torch.get_num_threads(),
    )


def _load(settings: CrossEncoderFolder, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    """The transformer with its head.

    Raises:
        ModelError: it cannot be loaded, or has not the number of logits that its config.json tells.
    """
    from flipkd.models.backbone import load_pretrained

    model = load_pretrained(settings, dtype, trust_remote_code, "AutoModelForSequenceClassification").to(device).eval()
    if model.config.num_labels != settings.logits:
        raise ModelError(
            f"{settings.transformer_path}: gives {model.config.num_labels} logits, not {settings.logits} as its "
            "config.json says"
        )
    # A decoder's head reads the last token that is not padding, and without a padding token refuses batches, though
    # nothing is padded here. No token has the number -1: then it is the last one.
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = -1
    return model


def _logits(model: Any) -> Callable[..., torch.Tensor]:
    def logits(ids: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        # No mask: nothing is padded, so every token counts. Causal models still mask the future by themselves.
        found: torch.Tensor = model(input_ids=ids, **({} if types is None else {"token_type_ids": types})).logits
        return found.float()

    return logits
