"""Which kind of teacher a folder is, and what a cross-encoder folder says about itself. Loads nothing.

A *cross-encoder* reads both texts of a pair together and gives one or two logits: a plain Hugging Face folder of a
``...ForSequenceClassification`` model, or a folder that sentence-transformers' CrossEncoder saved. Whatever we do not
know is refused by name, since a setting that is silently ignored gives wrong scores that look right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flipkd.errors import ModelError
from flipkd.models.folder import files_fingerprint, find_folder, read_modules
from flipkd.models.settings import read_json, read_transformer
from flipkd.models.trust import check_weights, known_form

TeacherKind = Literal["bi-encoder", "cross-encoder"]
Scale = Literal["cosine", "probability", "logit"]

_MAIN_FILE = "config_sentence_transformers.json"
# What is done with the one logit, and the scale that it gives. The names are those of torch.nn.
_SCALES: dict[str, Scale] = {"Sigmoid": "probability", "Identity": "logit"}


@dataclass(frozen=True)
class CrossEncoderFolder:
    """What a cross-encoder folder asks for.

    Args:
        path: the folder.
        transformer_path: where in it the transformer is.
        logits: 1 or 2 numbers per pair.
        activation: what makes the score of them: ``Sigmoid`` or ``Identity`` of one logit; ``Softmax`` of two, of which
            the second (class 1) is taken.
        scale: of the score: ``probability`` (0 to 1), or ``logit`` (any number).
        max_length, truncates, lower_case, model_settings, tokenizer_settings, config_settings: as in ``ModelFolder``.
    """

    path: Path
    transformer_path: Path
    logits: int
    activation: str
    scale: Scale
    max_length: int | None
    truncates: bool
    lower_case: bool
    model_settings: Mapping[str, Any]
    tokenizer_settings: Mapping[str, Any]
    config_settings: Mapping[str, Any]

    def fingerprint(self, max_length: int | None) -> str:
        """Hex hash over the files that decide its scores, and over the maximum length that was asked for."""
        return files_fingerprint(self.path, {self.path, self.transformer_path}, repr(max_length))


def teacher_kind(folder: str | Path) -> TeacherKind:
    """Whether a folder is a bi-encoder (one vector per text) or a cross-encoder (one score per pair).

    Raises:
        ModelError: it is neither, or there is no such folder.
    """
    path = find_folder(folder)
    with known_form(path):
        return _kind(path)


def _kind(path: Path) -> TeacherKind:
    main = read_json(path / _MAIN_FILE)
    if not (path / "modules.json").exists():
        _architecture(path)  # a plain folder can be a cross-encoder only
        return "cross-encoder"
    kind = main.get("model_type", "SentenceTransformer")
    if kind not in ("SentenceTransformer", "CrossEncoder"):
        raise ModelError(f"{path}: a {kind} model cannot be a teacher; give a bi-encoder or a cross-encoder")
    return "bi-encoder" if kind == "SentenceTransformer" else "cross-encoder"


def read_cross_encoder(folder: str | Path) -> CrossEncoderFolder:
    """Reads the configuration of a cross-encoder folder; loads no weights.

    Raises:
        ModelError: the folder is no cross-encoder, or asks for something that is not supported; named in the message.
    """
    path = find_folder(folder)
    with known_form(path):
        return _read_cross_encoder(path)


def _read_cross_encoder(path: Path) -> CrossEncoderFolder:
    main = read_json(path / _MAIN_FILE)
    transformer_path = path
    if (path / "modules.json").exists():
        modules = read_modules(path)
        if [name for name, _ in modules] != ["Transformer"]:
            raise ModelError(
                f"{path}/modules.json: a cross-encoder of {', '.join(name for name, _ in modules)} is not supported; "
                "only a Transformer alone, with its own classification head, is"
            )
        transformer_path = modules[0][1]
    if (main.get("prompts") or {}).get(main.get("default_prompt_name")):
        raise ModelError(f"{path}/{_MAIN_FILE}: a default prompt is not supported for a cross-encoder; remove it")
    if main.get("keep_in_fp32_modules"):
        raise ModelError(f"{path}/{_MAIN_FILE}: keep_in_fp32_modules is not supported; remove it")
    config = _architecture(transformer_path)
    check_weights(transformer_path)
    settings = read_transformer(transformer_path, "sequence-classification")
    for name in ("message_format", "chat_settings"):
        if settings.pop(name):
            raise ModelError(f"{path}: a chat template is not supported for a cross-encoder; pairs are plain text")
    if not settings.pop("adds_special_tokens"):
        raise ModelError(f"{path}: add_special_tokens false is not supported for a cross-encoder")
    logits, activation = _head(path, main, config)
    return CrossEncoderFolder(
        path=path,
        transformer_path=transformer_path,
        logits=logits,
        activation=activation,
        scale=_SCALES.get(activation, "probability"),
        **settings,
    )


def _architecture(path: Path) -> dict[str, Any]:
    """The folder's config.json, if it is that of a model for pairs.

    Raises:
        ModelError: it is not; says what the folder holds.
    """
    config = read_json(path / "config.json")
    if not config:
        raise ModelError(f"{path}: has no config.json and no modules.json, so it is not a model folder")
    architecture = (config.get("architectures") or ["no architecture"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{path}: {architecture} cannot be a teacher; give a sentence-transformers bi-encoder (Transformer and "
            "Pooling), or a cross-encoder (a ...ForSequenceClassification model)"
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{path}: encoder-decoder model {config.get('model_type')} is not supported")
    return config


def _head(path: Path, main: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, str]:
    """Number of logits, and the activation; looked up where sentence-transformers 3 to 6 keep it, newest first."""
    logits = len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels", 2))
    named = (
        main.get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
    )
    if named is None:
        named = "torch.nn.Sigmoid" if logits == 1 else "torch.nn.Identity"
    name = str(named).rpartition(".")[2]
    if not str(named).startswith("torch.nn.") or name not in _SCALES:
        raise ModelError(f"{path}: activation {named} is not supported; known are {', '.join(_SCALES)} of torch.nn")
    if logits == 1:
        return 1, name
    if logits != 2:
        raise ModelError(f"{path}: gives {logits} logits for a pair; a teacher has one, or two (no match, match)")
    if name != "Identity" or config.get("problem_type") == "multi_label_classification":
        raise ModelError(
            f"{path}: two logits that are not alternatives (activation {name}, problem_type "
            f"{config.get('problem_type')}) are not supported; of two, the softmax's second is the score"
        )
    return 2, "Softmax"
