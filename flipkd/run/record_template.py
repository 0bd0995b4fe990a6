"""How the texts of a record table are made where the caller does not say: as the encoder records it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from flipkd.config import EncodeConfig, ScoreConfig
from flipkd.data.location import Location
from flipkd.data.shards import Shard, ShardReader
from flipkd.data.template import template_fields
from flipkd.errors import ConfigError
from flipkd.vectors.id_types import check_id_type

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


def check_record_columns(records: Location, shard: Shard, config: EncodeConfig, told_by: Path | None) -> None:
    """Looks in one record file for the id column and those of the template.

    Args:
        records: root of the record table.
        shard: one of its files.
        config: with the template that is used.
        told_by: the file that the template is from, if it is the encoder's.

    Raises:
        ConfigError: a column is missing (says where the template is from, and the way out), or cannot hold ids.
    """
    with ShardReader(records, shard) as reader:
        reader.check_columns([config.id_column], "name the ids' column with --id-column")
        check_id_type(reader.column_type(config.id_column), config.id_column)
        try:
            reader.check_columns(
                template_fields(config.text_template),
                "" if told_by else "name the texts' column with --text-column, or several with --template",
            )
        except ConfigError as error:
            if told_by is None:
                raise
            raise ConfigError(
                f"{error}. The template {config.template!r} comes from {told_by}, where export has recorded how the "
                "texts were made that the encoder was trained with; pass --template or --text-column to make others"
            ) from error
