"""How the texts of a record table are made where the caller does not say: as the encoder records it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from flipkd.config import EncodeConfig, ScoreConfig

logger = logging.getLogger(__name__)


def with_recorded_template(config: EncodeConfig) -> tuple[EncodeConfig, Path | None]:
    """The config with the template that its encoder records, if neither a template nor a text column is given.

    Returns:
        The config, and the file that the template is from; the same config and None where it is not from one.

    Raises:
        ModelError: there is no such encoder, or what it records cannot be used.
    """
    from flipkd.models.folder import recorded_template

    if config.template is not None or config.text_column is not None:
        return config, None
    found = recorded_template(config.encoder.folder)
    if found is None:
        return config, None
    template, file = found
    logger.info("the records' texts are made with the template %r of %s", template, file)
    return replace(config, template=template), file


def template_of_scores(score: ScoreConfig) -> str | None:
    """How the texts of pairs of ids were made that ``score`` has scored: an LLM reads what the encoder has read.

    None where one text column is the text.
    """
    from flipkd.models.folder import recorded_template

    if score.template is not None or score.text_column is not None or score.encoder is None or score.is_inline:
        return score.template
    recorded = recorded_template(score.encoder.folder)
    return None if recorded is None else recorded[0]
