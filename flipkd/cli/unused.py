"""Options that a job would not read: given by mistake, or without one they go with. None is ignored."""

from __future__ import annotations

from dataclasses import fields

from flipkd.config import EncoderOptions, ScoreConfig, TeachConfig
from flipkd.errors import ConfigError
from flipkd.run.rescore_config import RescoreConfig

_OF_RECORDS = ("id_column", "text_column", "template")
_OF_RIGHT_RECORDS = ("right_id_column", "right_text_column", "right_template")
_OF_IDS = ("left_column", "right_column")
_OF_TEXTS = ("left_text", "right_text")


def refuse_unused(config: ScoreConfig | TeachConfig | RescoreConfig) -> None:
    """Refuses options of records, ids or texts where the pairs hold none.

    Raises:
        ConfigError: names the option and what it is for.
    """
    store = config.store if isinstance(config, ScoreConfig) else None
    has_ids = config.records is not None or store is not None
    if config.records is None:
        _refuse(config, _OF_RECORDS, "says how --records are read, and there are none")
        _refuse(config, _OF_RIGHT_RECORDS, "says how --right-records are read, and there are none")
    if not has_ids:
        _refuse(config, _OF_IDS, "names ids, and without --records the pairs hold the texts themselves")
    elif not isinstance(config, TeachConfig):  # which names the texts that it adds so
        _refuse(config, _OF_TEXTS, "names texts in the pairs, and these hold ids")
    if store is not None:
        _refuse(
            config, ("dtype", "cache", "cache_limit_bytes"), "is for texts that are encoded, and --store holds vectors"
        )


def refuse_encoder_options(encoder: EncoderOptions) -> None:
    """Refuses what is for an encoder where there is none.

    Raises:
        ConfigError: names the option.
    """
    _refuse(encoder, ("dtype", "device", "max_length", "max_tokens", "trust_remote_code"), "needs --encoder")


def _refuse(
    config: EncoderOptions | ScoreConfig | TeachConfig | RescoreConfig, names: tuple[str, ...], why: str
) -> None:
    usual = {field.name: field.default for field in fields(config)}
    for name in names:
        if getattr(config, name) != usual[name]:
            flag = {"cache_limit_bytes": "cache-limit"}.get(name, name.replace("_", "-"))
            if isinstance(config, EncoderOptions) and name == "dtype":
                flag = "encoder-dtype"
            raise ConfigError(f"--{flag} {why}; leave it out")
