"""Reads the configuration files of single modules: Transformer, Pooling, Dense and Normalize.

Older and newer formats are both read; a setting that we do not know is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipkd.data.json_files import parse_object
from flipkd.errors import ModelError

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Older folders have one boolean per mode; the order is the order of the concatenated output.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Settings of these files that change speed or place, never the vectors.
_HARMLESS_MODEL_SETTINGS = {
    "attn_implementation",
    "cache_dir",
    "code_revision",
    "device_map",
    "dtype",
    "local_files_only",
    "low_cpu_mem_usage",
    "revision",
    "token",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
}
# Arguments that would have transformers read other files than the folder's, or take another class.
_PLACES = ("auto_map", "config", "subfolder", "tokenizer_class", "tokenizer_type")
_PLACE_ENDS = ("_file", "_path", "_dir")
_HARMLESS_TEXT_SETTINGS = {
    "padding",
    "pad_to_multiple_of",
    "return_tensors",
    "return_attention_mask",
    "return_token_type_ids",
}


@dataclass(frozen=True)
class DenseSettings:
    """One Dense step: ``activation(x W^T + b)``, with an optional residual, weights in ``path``."""

    path: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str
    use_residual: bool


@dataclass(frozen=True)
class NormalizeSettings:
    """One Normalize step: divide by the Euclidean length."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    try:
        return parse_object(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error


# What a model of each task gives, and what its step is called: the only settings under which our forward is right.
_TASKS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
}


def read_transformer(path: Path, task: str = "feature-extraction") -> dict[str, Any]:
    """The Transformer step of a bi-encoder, or (task ``sequence-classification``) of a cross-encoder.

    Raises:
        ModelError: a setting that we do not know, by name.
    """
    wanted_output, wanted_name = _TASKS[task]
    file = next((path / name for name in TRANSFORMER_CONFIGS if (path / name).exists()), path / TRANSFORMER_CONFIGS[0])
    config = read_json(file)
    if config.get("transformer_task", task) != task:
        raise ModelError(f"{file}: transformer_task {config['transformer_task']!r} is not supported; expected {task!r}")
    if config.get("tokenizer_name_or_path"):
        raise ModelError(f"{file}: tokenizer_name_or_path is not supported; save the tokenizer in the folder itself")
    # Folders from before modality_config knew only plain text: a chat template in them was never applied.
    modalities = config.get("modality_config") or {"text": {"method": "forward", "method_output_name": wanted_output}}
    modality = "message" if "message" in modalities else "text"
    if modality not in modalities:
        raise ModelError(f"{file}: modality_config has neither text nor message, but {', '.join(modalities)}")
    wanted = modalities[modality]
    output = wanted.get("method_output_name")
    if wanted.get("method") != "forward" or output not in (wanted_output, [wanted_output]):
        raise ModelError(
            f"{file}: modality_config {modality}: only method forward with output {wanted_output} is supported"
        )
    if config.get("module_output_name", wanted_name) != wanted_name:
        raise ModelError(f"{file}: module_output_name {config['module_output_name']!r} is not supported")
    message_format = wanted.get("format") if modality == "message" else None
    if modality == "message" and message_format not in ("flat", "structured"):
        raise ModelError(f"{file}: modality_config message: format must be flat or structured, not {message_format!r}")
    processing = config.get("processing_kwargs") or {}
    text = {**(processing.get("common") or {}), **(processing.get("text") or {})}
    known = {"max_length", "truncation", "add_special_tokens", *_HARMLESS_TEXT_SETTINGS}
    if unknown := sorted(set(text) - known):
        raise ModelError(f"{file}: processing_kwargs {', '.join(unknown)} not supported")
    chat = dict(processing.get("chat_template") or {})
    if unknown := sorted({"padding", "truncation", "max_length", "return_tensors"} & set(chat)):
        raise ModelError(f"{file}: processing_kwargs chat_template {', '.join(unknown)} not supported")
    tokenizer_settings = _settings(file, config, "processor_kwargs", "tokenizer_args")
    model_settings = _settings(file, config, "model_kwargs", "model_args")
    if unknown := sorted(set(model_settings) - {"add_pooling_layer"}):
        raise ModelError(f"{file}: model_kwargs {', '.join(unknown)} not supported")
    max_length = (
        text.get("max_length") or tokenizer_settings.pop("model_max_length", None) or config.get("max_seq_length")
    )
    return {
        "max_length": max_length,
        "lower_case": bool(config.get("do_lower_case", False)),
        "message_format": message_format,
        "chat_settings": chat,
        "truncates": text.get("truncation", True) not in (False, "do_not_truncate"),
        "adds_special_tokens": bool(text.get("add_special_tokens", True)),
        "model_settings": model_settings,
        "tokenizer_settings": tokenizer_settings,
        "config_settings": _settings(file, config, "config_kwargs", "config_args"),
    }


def _settings(file: Path, config: dict[str, Any], name: str, old_name: str) -> dict[str, Any]:
    found = config.get(name) or config.get(old_name) or {}
    kept = {key: value for key, value in found.items() if key not in _HARMLESS_MODEL_SETTINGS}
    if places := sorted(key for key in kept if key in _PLACES or key.endswith(_PLACE_ENDS)):
        raise ModelError(f"{file}: {name} {', '.join(places)} not supported: all files must be the folder's own")
    return kept


def pooling_modes(path: Path, config: dict[str, Any]) -> tuple[str, ...]:
    mode = config.get("pooling_mode")
    if mode is None:
        modes = tuple(name for flag, name in _POOLING_FLAGS.items() if config.get(flag)) or ("mean",)
    else:
        modes = (mode,) if isinstance(mode, str) else tuple(mode)
    for name in modes:
        if name not in POOLING_MODES:
            raise ModelError(
                f"{path}/config.json: pooling mode {name!r} is not supported; known are {', '.join(POOLING_MODES)}"
            )
    return modes


def check_names(path: Path, config: dict[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelError(
                f"{path}/config.json: {key} {config[key]!r} is not supported; only 'sentence_embedding' is"
            )


def read_dense(path: Path) -> DenseSettings:
    config = read_json(path / "config.json")
    check_names(path, config)
    kind = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = kind.rpartition(".")[2]
    if not kind.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise ModelError(
            f"{path}/config.json: activation_function {kind} is not supported; known are {', '.join(ACTIVATIONS)}"
        )
    if not (path / "model.safetensors").exists():
        raise ModelError(f"{path}: has no model.safetensors; save the model again with safe_serialization=True")
    try:
        sizes = int(config["in_features"]), int(config["out_features"])
    except KeyError as error:
        raise ModelError(f"{path}/config.json: has no {error}") from None
    return DenseSettings(
        path, *sizes, bool(config.get("bias", True)), activation, bool(config.get("use_residual", False))
    )
