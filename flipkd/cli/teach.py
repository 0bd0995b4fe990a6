"""``teach``."""

from __future__ import annotations

from typing import Any

import click

from flipkd.cli.guard import OneValueCommand
from flipkd.cli.options import (
    cache_options,
    common_options,
    encoder_options,
    forgotten_option,
    metrics_options,
    record_text_options,
    report_job,
    right_records_options,
    run_options,
    set_up_logging,
    take_encoder,
    take_run,
    unit_options,
)
from flipkd.cli.unused import refuse_unused
from flipkd.config import DEFAULT_LABEL_COLUMN, TeachConfig


@click.command(cls=OneValueCommand)
@click.option("--teacher", required=True, help="A bi-encoder or cross-encoder: folder or hub name.")
@click.option("--pairs", required=True, help="Parquet file or folder.")
@click.option("--output", required=True, help="Folder for the pairs with teacher scores.")
@click.option("--left-text", default="left_text", show_default=True, help="Column of left texts; for ids it is added.")
@click.option("--right-text", default="right_text", show_default=True, help="Column of right texts; likewise.")
@click.option("--left-column", default="left_id", show_default=True, help="Column of left ids, with --records.")
@click.option("--right-column", default="right_id", show_default=True, help="Column of right ids, with --records.")
@click.option("--records", help="Record table of the left (and right) records, for pairs of ids.")
@click.option("--right-records", help="Record table of the right records.")
@click.option("--label-column", default=DEFAULT_LABEL_COLUMN, show_default=True, help="Labels, checked if there.")
@click.option("--rows-per-unit", type=int, default=20_000, show_default=True, help="Pairs in one work unit.")
@cache_options
@record_text_options
@right_records_options
@encoder_options
@run_options
@unit_options
@metrics_options
@common_options
def teach(as_json: bool, log_level: str, **options: Any) -> None:
    """Score pairs with a teacher: what train learns from."""
    set_up_logging(log_level)
    options["encoder"] = options.pop("teacher")
    from flipkd.run.teach import teach as run

    config = TeachConfig(teacher=take_encoder(options), run=take_run(options), **options)
    refuse_unused(config)
    report_job(run(config), config.output, as_json, forgotten_option(config))
