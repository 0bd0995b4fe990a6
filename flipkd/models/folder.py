"""Reads what a sentence-transformers folder says about itself, without importing sentence-transformers.

Such a folder has a ``modules.json`` that lists its steps. We take bi-encoders of the form Transformer, Pooling, then
any row of Dense and Normalize, and do what the folder's own configuration says: maximum length, lower-casing, default
prompt, chat template (if, and only if, ``modality_config`` names "message"), truncated dimension. Whatever we do not
know is refused by name, since a setting that is silently ignored gives wrong vectors that look right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flipkd.data.template import template_fields
from flipkd.errors import ConfigError, ModelError
from flipkd.models.settings import (
    TRANSFORMER_CONFIGS,
    DenseSettings,
    NormalizeSettings,
    check_names,
    pooling_modes,
    read_dense,
    read_json,
    read_transformer,
)
from flipkd.models.trust import check_weights, known_form

# What ``export`` says of an encoder, in its folder.
FLIPKD_FILE = "flipkd.json"
# The files of a model folder that decide its vectors; anything else (README, flipkd.json, licences) does not.
_DECIDING_NAMES = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "config_sentence_transformers.json",
    "merges.txt",
    "modules.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    *TRANSFORMER_CONFIGS,
}
_DECIDING_SUFFIXES = (".safetensors", ".safetensors.index.json", ".model", ".py")


class TransformerFolder(Protocol):
    """What loading the transformer and the tokenizer of a folder needs to know; see ``ModelFolder``."""

    @property
    def transformer_path(self) -> Path: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def truncates(self) -> bool: ...
    @property
    def model_settings(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer_settings(self) -> Mapping[str, Any]: ...
    @property
    def config_settings(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class ModelFolder:
    """What a bi-encoder folder asks for.

    ``max_length`` counts tokens, special tokens included; None means that the folder does not say. ``prompt`` stands
    before every text ("" for none). ``message_format`` is "flat" or "structured" where the folder wants each text
    wrapped by the tokenizer's chat template, else None.
    """

    path: Path
    transformer_path: Path
    max_length: int | None
    lower_case: bool
    prompt: str
    message_format: str | None
    chat_settings: Mapping[str, Any]
    truncates: bool
    adds_special_tokens: bool
    model_settings: Mapping[str, Any]
    tokenizer_settings: Mapping[str, Any]
    config_settings: Mapping[str, Any]
    pooling_modes: tuple[str, ...]
    pools_prompt: bool
    steps: tuple[DenseSettings | NormalizeSettings, ...]
    truncate_dim: int | None
    module_paths: tuple[Path, ...] = field(default=())


def absolute_model(folder: str) -> str:
    """A model's folder as a process with another working directory finds it; the name of one on a hub as it is."""
    path = Path(folder).expanduser()
    return os.path.abspath(path) if path.is_dir() else folder


def find_folder(folder: str | Path) -> Path:
    """Returns the local folder of a model; a name that is not a folder here is taken as a hub name.

    Raises:
        ModelError: there is no such folder, and it is not the name of a model that the hub can give.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    name = str(folder)
    looks_local = (
        isinstance(folder, Path)
        or path.exists()
        or name.startswith((".", "~", os.sep))
        or name.count("/") != 1
        or os.sep * 2 in name
    )
    if looks_local or name.endswith("/"):
        raise ModelError(f"model {name!r}: no such folder; give a folder that is there, or a hub name (owner/name)")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"model {name!r}: there is no such folder, the hub cannot be reached, and its cache here has no model of "
            "this name; copy the model's folder to this machine and name that"
        ) from error
    except Exception as error:  # the hub client raises a dozen unrelated types: no such model, no access, a full disk
        raise ModelError(
            f"model {name!r}: there is no such folder, and the hub did not give a model of this name "
            f"({type(error).__name__}); is the name right, and may you read the model?"
        ) from error


def recorded_template(folder: str | Path) -> tuple[str, Path] | None:
    """The template that ``export`` was told the encoder's records have, and the file that says so; None without one.

    Raises:
        ModelError: the folder is not there, or its file cannot be used.
    """
    file = find_folder(folder) / FLIPKD_FILE
    template = read_json(file).get("template")
    if template is None:
        return None
    try:
        if not isinstance(template, str):
            raise ConfigError("it is not a string")
        template_fields(template)
    except ConfigError as error:
        raise ModelError(f"{file}: its template cannot be used: {error}; mend it, or pass --template") from error
    return template, file


def folder_fingerprint(folder: str | Path, max_length: int | None = None) -> str:
    """Hex hash over the names and contents of the files that decide an encoder's vectors, and over ``max_length``.

    Loads nothing, and keeps nothing: a changed file gives another fingerprint. What the transformer computes in (dtype)
    is not part of it.

    Raises:
        ModelError: the folder is not a bi-encoder that can be loaded.
    """
    settings = read_folder(folder)
    return files_fingerprint(settings.path, {settings.path, *settings.module_paths}, repr(max_length))


def files_fingerprint(folder: Path, folders: Iterable[Path] | None = None, options: str = "") -> str:
    """Hex hash over the names and contents of the files that decide what a model folder computes, and over ``options``.

    Args:
        folder: a plain model folder, or the root of ``folders``.
        folders: where the files lie, when not in ``folder`` itself.
        options: whatever else decides what is computed.
    """
    return _hashed(folder, _deciding_files({folder} if folders is None else folders), options)


def _hashed(root: Path, files: Iterable[Path], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for file in sorted(files):
        digest.update(f"\0{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _deciding_files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        if not folder.is_dir():  # a Normalize step often has no folder of its own
            continue
        for file in folder.iterdir():
            if file.is_file() and (file.name in _DECIDING_NAMES or file.name.endswith(_DECIDING_SUFFIXES)):
                yield file


def read_folder(folder: str | Path) -> ModelFolder:
    """Reads the configuration of a bi-encoder folder; loads no weights.

    Raises:
        ModelError: the folder is not a bi-encoder, or asks for something that is not supported; named in the message.
    """
    path = find_folder(folder)
    with known_form(path):
        return _read_folder(path)


def _read_folder(path: Path) -> ModelFolder:
    main = read_json(path / "config_sentence_transformers.json")
    kind = main.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise ModelError(f"{path}: a {kind} model; only bi-encoders (SentenceTransformer) give one vector per text")
    modules = read_modules(path)
    if not modules or modules[0][0] != "Transformer":
        raise ModelError(
            f"{path}/modules.json: the first module must be Transformer, not {modules[0][0] if modules else 'nothing'}"
        )
    if len(modules) < 2 or modules[1][0] != "Pooling":
        raise ModelError(
            f"{path}/modules.json: the second module must be Pooling; add one to turn token vectors into one vector"
        )
    steps: list[DenseSettings | NormalizeSettings] = []
    for name, module_path in modules[2:]:
        if name == "Dense":
            steps.append(read_dense(module_path))
        elif name == "Normalize":
            check_names(module_path, read_json(module_path / "config.json"))
            steps.append(NormalizeSettings())
        else:
            raise ModelError(f"{path}/modules.json: a second {name} module is not supported")
    pooling = read_json(modules[1][1] / "config.json")
    if not pooling:
        raise ModelError(
            f"{modules[1][1]}/config.json is not there or empty, so how to pool is not known; copy the folder again"
        )
    transformer_path = modules[0][1]
    settings = read_transformer(transformer_path)
    check_weights(transformer_path)
    prompts, default_prompt = main.get("prompts") or {}, main.get("default_prompt_name")
    if default_prompt is not None and default_prompt not in prompts:
        raise ModelError(
            f"{path}/config_sentence_transformers.json: default_prompt_name {default_prompt!r} is not among its prompts"
        )
    return ModelFolder(
        path=path,
        transformer_path=transformer_path,
        prompt=(prompts[default_prompt] or "") if default_prompt is not None else "",
        pooling_modes=pooling_modes(modules[1][1], pooling),
        pools_prompt=bool(pooling.get("include_prompt", True)),
        steps=tuple(steps),
        truncate_dim=main.get("truncate_dim"),
        module_paths=tuple(module_path for _, module_path in modules),
        **settings,
    )


def read_modules(path: Path) -> list[tuple[str, Path]]:
    """Names and folders of the steps in ``modules.json``, in order.

    Raises:
        ModelError: there is none, it cannot be read, or a step is of a kind that we do not know.
    """
    file = path / "modules.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: has no modules.json, so it is not a sentence-transformers bi-encoder; for a plain model "
            "say how to pool: SentenceTransformer(modules=[Transformer(...), Pooling(...)]).save(folder)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "type" in entry for entry in entries):
        raise ModelError(f"{file}: must be a list of modules, each with its type")
    modules = []
    for entry in entries:
        kind, relative = str(entry["type"]), str(entry.get("path", ""))
        name = kind.rpartition(".")[2]
        if not kind.startswith("sentence_transformers.") or name not in (
            "Transformer",
            "Pooling",
            "Dense",
            "Normalize",
        ):
            raise ModelError(
                f"{file}: module {kind} is not supported; known are Transformer, Pooling, Dense and Normalize"
            )
        if Path(relative).is_absolute() or ".." in Path(relative).parts or "\0" in relative:
            raise ModelError(f"{file}: path {relative!r} leaves the model folder")
        modules.append((name, path / relative))
    return modules
