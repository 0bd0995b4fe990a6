"""The transformer below the pooling: token ids of packed texts to token vectors.

Importing this imports torch; transformers' model code is imported when a model is loaded that we do not compute
ourselves (``plain``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flipkd.errors import ModelError
from flipkd.kernels.encoder_ops import Texts
from flipkd.models.bert import load_bert
from flipkd.models.decoder import load_decoder
from flipkd.models.folder import ModelFolder, TransformerFolder
from flipkd.models.linear import EXACT_ROWS
from flipkd.models.plain import NotPlainError
from flipkd.models.settings import read_json
from flipkd.models.weights import check_finite

logger = logging.getLogger(__name__)

# Encoder-decoder families of which the encoder alone can be loaded; sentence-transformers does the same.
_ENCODER_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}


@dataclass(frozen=True)
class Backbone:
    """A loaded transformer.

    ``states`` maps texts packed end to end, ids int64 [T] and where each text lies, to token vectors [T, width], from
    any thread. ``width`` is the size of a token vector.
    ``position_limit`` is the longest input of a model with a table of learned positions, None for others.
    ``mixes_lengths``: whether texts of different lengths may stand in one call.
    """

    states: Callable[[Tensor, Texts], Tensor]
    width: int
    position_limit: int | None
    mixes_lengths: bool


def load_backbone(folder: ModelFolder, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Backbone:
    """Loads the transformer of a folder, without dropout, without a key-value cache, from safetensors only.

    Raises:
        ModelError: transformers cannot load it, or it needs code of its own and that was not allowed, or int8 was asked
            of a model that is neither plain BERT nor plain Llama or Qwen2.
    """
    try:
        return _own_forward(folder, dtype, device)
    except NotPlainError as error:
        reason = str(error)
    if dtype is torch.int8:
        raise ModelError(
            f"{folder.transformer_path}: int8 arithmetic is there for plain BERT, Llama and Qwen2 models in one "
            f"safetensors file only ({reason}); use bf16 or float32"
        )
    _tell_once(folder.transformer_path, reason)
    model = load_pretrained(folder, dtype, trust_remote_code).to(device).eval()

    def states(ids: Tensor, texts: Texts) -> Tensor:
        # No mask: nothing is padded, so every token counts. Causal models still mask the future by themselves.
        rows, count = ids.view(len(texts.lengths), -1), len(texts.lengths)
        if 0 < ids.numel() < EXACT_ROWS:  # see there: a text's vector must not depend on its neighbours
            rows = rows.repeat(-(-EXACT_ROWS // ids.numel()), 1)
        output: Tensor = model(input_ids=rows).last_hidden_state
        return output[:count].flatten(0, 1)

    return Backbone(states, int(model.config.get_text_config().hidden_size), position_limit(model), mixes_lengths=False)


def _own_forward(folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> Backbone:
    """The transformer in a forward of our own.

    Raises:
        NotPlainError: none computes it.
        ModelError: a weight is not finite.
    """
    settings = {*folder.config_settings, *folder.model_settings} - {"add_pooling_layer"}
    if settings:
        raise NotPlainError(f"its sentence_*_config.json sets {min(settings)}")
    if read_json(folder.transformer_path / "config.json").get("model_type") == "bert":
        bert = load_bert(folder.transformer_path, dtype, device)
        return Backbone(bert, bert.width, bert.position_limit, mixes_lengths=True)
    decoder = load_decoder(folder.transformer_path, dtype, device)
    return Backbone(decoder, decoder.width, None, mixes_lengths=True)


@cache  # an encoder may be loaded many times in one process
def _tell_once(path: Path, reason: str) -> None:
    logger.info("%s: transformers computes this model, slower than a forward of our own would: %s", path, reason)


def load_pretrained(
    folder: TransformerFolder, dtype: torch.dtype, trust_remote_code: bool, auto_class: str = "AutoModel"
) -> Any:
    """Loads the transformer of a folder with transformers, on the CPU, from safetensors only, without a cache.

    Args:
        folder: where it is.
        dtype: of its weights and arithmetic.
        trust_remote_code: whether Python code in the folder may run.
        auto_class: transformers' class that knows the class of the model.

    Raises:
        ModelError: transformers cannot load it, weights are missing or not finite, or it needs code of its own and may
            not run it.
    """
    import transformers
    from transformers.utils import logging as transformers_logging

    path = str(folder.transformer_path)
    shows_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one bar per worker in a log file helps nobody
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True, **folder.config_settings
        )
        if hasattr(config, "use_cache"):
            config.use_cache = False
        name = auto_class
        if auto_class == "AutoModel" and config.model_type in _ENCODER_CLASSES:
            # Whatever is_encoder_decoder says: it is false in the configuration of an encoder that was saved alone.
            name = _ENCODER_CLASSES[config.model_type]
        elif getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{path}: encoder-decoder model {config.model_type} is not supported")
        settings: dict[str, Any] = dict(folder.model_settings)
        if name.startswith("Auto"):
            settings["trust_remote_code"] = trust_remote_code
        model, report = getattr(transformers, name).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **settings,
        )
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever it meets: OSError, ValueError, KeyError, SafetensorError
        hint = "" if trust_remote_code else " (a model that needs code of its own loads only with trust_remote_code)"
        raise ModelError(
            f"{path}: transformers cannot load this model{hint}: {type(error).__name__}: {error}"
        ) from error
    finally:
        if shows_bar:
            transformers_logging.enable_progress_bar()
    # A head that pooling never reads may be absent; anything else absent would be random numbers in the vectors.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing or report.get("mismatched_keys"):
        raise ModelError(
            f"{path}: weights are missing or of the wrong shape, first {(missing or report['mismatched_keys'])[0]}"
        )
    check_finite(model.named_parameters(), path)
    return model


def position_limit(model: nn.Module) -> int | None:
    """Longest input that a table of learned positions allows."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None) or getattr(module, "wpe", None)
        if isinstance(table, nn.Embedding):
            # The RoBERTa family counts positions from padding_idx + 1.
            padding = getattr(module, "padding_idx", None)
            return table.num_embeddings - (padding + 1 if isinstance(padding, int) else 0)
    return None
