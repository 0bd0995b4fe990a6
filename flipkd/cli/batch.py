"""``encode``, ``score`` and ``status``."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from flipkd.cli.guard import OneValueCommand
from flipkd.cli.options import (
    cache_options,
    common_options,
    encoder_options,
    forgotten_option,
    metrics_options,
    print_values,
    records_options,
    report_job,
    right_records_options,
    run_options,
    say,
    set_up_logging,
    take_encoder,
    take_run,
    unit_options,
)
from flipkd.cli.rescore import stage_options, take_stage
from flipkd.cli.unused import refuse_encoder_options, refuse_unused
from flipkd.config import EncodeConfig, ScoreConfig
from flipkd.errors import ConfigError


@click.command(cls=OneValueCommand)
@click.option("--encoder", required=True, help="A sentence-transformers bi-encoder: folder or hub name (owner/name).")
@click.option("--records", required=True, help="Parquet file or folder.")
@click.option("--output", required=True, help="Folder of the vector store (local).")
@click.option("--forget", metavar="IDS", help="Delete what was made of these records (a file of ids), and stop.")
@cache_options
@records_options
@encoder_options
@run_options
@unit_options
@metrics_options
@common_options
def encode(as_json: bool, log_level: str, forget: str | None, **options: Any) -> None:
    """Turn a record table into a memory-mapped vector store."""
    set_up_logging(log_level)
    config = EncodeConfig(encoder=take_encoder(options), run=take_run(options), **options)
    if forget is not None:
        from flipkd.run.forget import forget as run_forget

        found = run_forget(config, forget)
        print_values(found, as_json)
        if found["ids_not_found"]:
            say("partial: some ids are not in the records; the cache may hold vectors of their texts", logging.WARNING)
            sys.exit(3)
        if config.cache is not None and found["texts"] and not found["deleted_vectors"]:
            say(
                "partial: the cache holds no vector of these records' texts; unless it was deleted before, name the "
                "--cache, --template (or --text-column) and --records that the jobs used",
                logging.WARNING,
            )
            sys.exit(3)
        return
    from flipkd.run.encode import encode as run

    report_job(run(config), config.output, as_json)


@click.command(cls=OneValueCommand)
@click.option("--pairs", required=True, help="Parquet file or folder.")
@click.option("--output", required=True, help="Folder for the scores.")
@click.option("--left-column", default="left_id", show_default=True, help="Column of left ids.")
@click.option("--right-column", default="right_id", show_default=True, help="Column of right ids.")
@click.option("--left-text", default="left_text", show_default=True, help="Column of left texts, for inline pairs.")
@click.option("--right-text", default="right_text", show_default=True, help="Column of right texts, for inline pairs.")
@click.option("--store", help="Vector store of the left (and right) records.")
@click.option("--right-store", help="Vector store of the right records.")
@click.option("--encoder", help="Encoder for --records, or for inline texts: folder or hub name.")
@click.option("--records", help="Record table of the left (and right) records.")
@click.option("--right-records", help="Record table of the right records.")
@click.option("--threshold", type=float, help="Add the column match: at least this probability (or score).")
@click.option("--min-score", type=float, help="Write only pairs with at least this score.")
@click.option("--top-k", type=int, help="Write only the K best pairs of each left record.")
@click.option(
    "--columns", metavar="NAME,...", help="Columns to write. Default: all input columns and the score columns."
)
@click.option("--calibration", help="calibration.json of evaluate: add the column probability.")
@click.option("--rows-per-unit", type=int, default=4_000_000, show_default=True, help="Pairs in one work unit.")
@click.option("--rescore-scores", metavar="FOLDER", help="Keep the scores from before the LLM. Default: deleted.")
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and stop; with --rescore-llm also the time, from a measured sample."
)
@cache_options
@records_options
@right_records_options
@encoder_options
@run_options
@unit_options
@metrics_options
@common_options
def score(as_json: bool, log_level: str, dry_run: bool, rescore_scores: str | None, **options: Any) -> None:
    """Score candidate pairs.

    They hold ids into a store, ids into record tables, or the texts themselves.

    With --rescore-llm an LLM answers for the uncertain pairs in the same job (see rescore): OUTPUT holds the copy with
    its answers.
    """
    set_up_logging(log_level)
    encoder, run = take_encoder(options), take_run(options)
    second = take_stage(options, run)
    if second is None and rescore_scores is not None:
        raise ConfigError("--rescore-scores needs --rescore-llm")
    columns = options.pop("columns")
    config = ScoreConfig(
        encoder=encoder if encoder.folder else None,
        run=run,
        columns=None if columns is None else tuple(name.strip() for name in columns.split(",") if name.strip()),
        **options,
    )
    if config.encoder is None:
        refuse_encoder_options(encoder)
    if second is not None:
        from flipkd.run import cascade, cascade_cost

        if dry_run:
            print_values(cascade_cost.dry_run(config, second), as_json)
            return
        manifest = cascade.score_and_rescore(config, second, rescore_scores)
        report_job(manifest, config.output, as_json, forgotten_option(config))
        return
    refuse_unused(config)  # the LLM of a cascade may read records and texts that scoring does not
    from flipkd.run import score as score_job

    if dry_run:
        print_values(score_job.dry_run(config), as_json)
        return
    report_job(score_job.score(config), config.output, as_json, forgotten_option(config))


score.params += stage_options()


@click.command(cls=OneValueCommand)
@click.argument("folder")
@click.option("--watch", is_flag=True, help="Follow the job to its end; the exit code is then the job's, 1 if it died.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Between two looks of --watch. Default: 2 on a terminal, 30 elsewhere.",
)
@common_options
def status(folder: str, watch: bool, interval: float | None, as_json: bool, log_level: str) -> None:
    """Say how far the job of an output folder is.

    FOLDER is the output of encode, score, teach, train, rescore or evaluate, or the folder of nights or of one night.
    """
    set_up_logging(log_level)
    if interval is not None and not watch:
        raise ConfigError("--interval needs --watch")
    from flipkd.nightly.status import night_status
    from flipkd.run.status import status as read_status

    night = night_status(folder)
    if not watch:
        print_values(night or read_status(folder), as_json)
        return
    if night is not None:
        raise ConfigError(
            f"{folder}: --watch follows one job, not nights; name the output of one, or leave --watch out"
        )
    from flipkd.run.watch import watch as follow

    sys.exit(follow(folder, interval_s=interval, as_json=as_json))
