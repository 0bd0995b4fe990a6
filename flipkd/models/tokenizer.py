"""Loads a folder's tokenizer as transformers does, with the prompt or chat template that the folder asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flipkd.errors import ConfigError, ModelError
from flipkd.models.folder import ModelFolder, TransformerFolder
from flipkd.models.settings import read_json
from flipkd.models.tokens import PROBES, Frame, TextTokenizer


def load_tokenizer(settings: TransformerFolder, trust_remote_code: bool) -> Any:
    """The folder's tokenizer as a transformers object.

    Raises:
        ModelError: transformers cannot load it, it is not a fast one, or it has no vocabulary.
    """
    from transformers import AutoTokenizer

    path = str(settings.transformer_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True, **settings.tokenizer_settings
        )
    except Exception as error:  # transformers raises whatever it meets
        raise ModelError(f"{path}: transformers cannot load the tokenizer: {type(error).__name__}: {error}") from error
    check_tokenizer(tokenizer, path)
    return tokenizer


def check_tokenizer(tokenizer: Any, path: str | Path) -> None:
    """Refuses a tokenizer that cannot be used.

    Raises:
        ModelError: it is not a fast one, or it has no vocabulary.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{path}: has no fast tokenizer (tokenizer.json); save it with a fast one")
    # Where the folder has no vocabulary, transformers makes one of the special tokens: all texts would be the same.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(f"{path}: its tokenizer knows no word; tokenizer.json (or vocab.txt and the like) is missing")


def longest_input(
    settings: TransformerFolder, tokenizer: Any, position_limit: int | None, wanted: int | None
) -> int | None:
    """The effective maximum length: what was asked for, else what the folder says, at most what the model can take.

    Where the folder names none, it is what the model's configuration declares, as in sentence-transformers.

    Raises:
        ConfigError: what was asked for is more than the model can take.
    """
    if wanted is not None:
        if position_limit is not None and wanted > position_limit:
            raise ConfigError(f"max_length {wanted} is more than the {position_limit} positions of this model")
        return wanted
    limit = settings.max_length
    if limit is None and settings.truncates:
        # transformers writes a huge number where a tokenizer has no limit.
        declared = read_json(settings.transformer_path / "config.json").get("max_position_embeddings")
        known = [number for number in (tokenizer.model_max_length, declared) if isinstance(number, int)]
        limit = min((number for number in known if 0 < number < 1e9), default=None)
    if position_limit is not None:
        limit = min(limit or position_limit, position_limit)
    return limit


def text_tokenizer(settings: ModelFolder, tokenizer: Any, max_length: int | None) -> TextTokenizer:
    """The tokenizer for records: with the folder's prompt or chat template, and at most ``max_length`` tokens.

    Raises:
        ModelError: the tokenizer or the chat template does what we cannot do, or the maximum length leaves no room.
    """
    frame = Frame(prefix=settings.prompt)
    chat = dict(settings.chat_settings)
    restores_suffix = bool(chat.pop("restore_suffix", True)) and settings.message_format is not None
    if settings.message_format is not None:
        frame = _chat_frame(tokenizer, settings.message_format, settings.prompt, chat)
    try:
        return TextTokenizer(
            tokenizer.backend_tokenizer,
            max_length=max_length,
            frame=frame,
            # A chat template writes its own special tokens.
            adds_special_tokens=settings.adds_special_tokens and settings.message_format is None,
            lower_case=settings.lower_case,
            cuts_left=tokenizer.truncation_side == "left",
            restores_suffix=restores_suffix,
            unknown=tokenizer.unk_token_id,
        )
    except ModelError as error:
        raise ModelError(f"{settings.transformer_path}: {error}") from error


def _chat_frame(tokenizer: Any, message_format: str, prompt: str, settings: dict[str, Any]) -> Frame:
    """The text that a tokenizer's chat template puts around one user message.

    Raises:
        ModelError: the template is missing, or changes the text beyond adding something before and after.
    """

    def render(text: str) -> str:
        turns = [("system", prompt)] if prompt else []
        turns.append(("user", text))
        messages = [
            {"role": role, "content": content if message_format == "flat" else [{"type": "text", "text": content}]}
            for role, content in turns
        ]
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        return rendered

    try:
        parts = render(PROBES[0]).split(PROBES[0])
        same = len(parts) == 2 and render(PROBES[1]) == PROBES[1].join(parts)
    except Exception as error:  # a template is a program; whatever it raises means that it cannot be used
        raise ModelError(
            f"the folder asks for its chat template, which fails ({type(error).__name__}); if the model was trained on "
            "plain text, delete 'message' from modality_config in sentence_bert_config.json"
        ) from error
    if not same:
        raise ModelError(
            "the folder asks for its chat template, which does more than put something before and after a text; if the "
            "model was trained on plain text, delete 'message' from modality_config in sentence_bert_config.json"
        )
    return Frame(*parts)
