"""``evaluate``."""

from __future__ import annotations

import logging
from typing import Any

import click

from flipkd.cli.guard import OneValueCommand
from flipkd.cli.options import common_options, print_values, say, set_up_logging
from flipkd.report.config import EvaluateConfig
from flipkd.urls import without_secrets


@click.command(cls=OneValueCommand)
@click.option("--scores", required=True, help="Output of score: Parquet file or folder.")
@click.option("--output", required=True, help="Folder of the report; with --sample a .parquet file (local).")
@click.option("--labels", help="Table of labels with the key columns, or a labelled sample. Default: in the scores.")
@click.option("--label-column", default="label", show_default=True, help="1 or 0; null is unlabelled.")
@click.option(
    "--key",
    default="left_id,right_id",
    show_default=True,
    metavar="NAME,...",
    help="Columns of ids that scores and labels share.",
)
@click.option("--score-column", default="score", show_default=True, help="What is evaluated; high speaks for a match.")
@click.option("--weight-column", help="How many pairs a labelled pair stands for.")
@click.option("--slice", "slices", multiple=True, metavar="COLUMN", help="Metrics by this column too; may be repeated.")
@click.option("--precision", type=float, help="Choose a threshold for this precision.")
@click.option("--cost-ratio", type=float, help="Choose a threshold: a false match costs so many missed ones.")
@click.option("--sample", type=int, metavar="N", help="Draw N pairs to label in place of evaluating.")
@click.option("--bootstrap", type=int, default=1000, show_default=True, help="Resamples for the intervals.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random choice.")
@click.option(
    "--show-examples",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Show the N worst errors of each kind with all columns: ids and texts of records.",
)
@click.option("--overwrite", is_flag=True, help="Replace an older report or sample.")
@click.option("--progress/--no-progress", default=True, help="Show progress on stderr.")
@common_options
def evaluate(as_json: bool, log_level: str, **options: Any) -> None:
    """Say how good scores are, or draw a sample to label.

    Writes metrics with intervals, a calibration, thresholds, and an HTML report.
    """
    set_up_logging(log_level)
    options["key"] = tuple(name.strip() for name in options["key"].split(",") if name.strip())
    config = EvaluateConfig(**{**options, "slices": tuple(options["slices"])})
    from flipkd.report.evaluate import evaluate as run

    facts = run(config)
    if as_json:
        print_values(facts, as_json)
    elif config.sample is not None:
        click.echo(
            f"sample: {facts['pairs']} of {facts['scored']} scored pairs from {facts['strata']} strata; fill in column "
            f"{facts['label_column']!r} of {facts['output']}, then: flipkd-batch evaluate --scores "
            f"{without_secrets(config.scores)} --labels {facts['output']} --output REPORT"
        )
    else:
        _print_report(facts, config.output)


def _print_report(facts: dict[str, Any], output: str) -> None:
    labelled = facts["labelled"]
    click.echo(f"evaluate: {labelled['pairs']} labelled pairs, {labelled['matches']} matches; in {output}")
    for name in ("roc_auc", "average_precision", "best_f1") if facts["metrics"] else ():
        figure = facts["metrics"][name]
        interval = "" if figure["low"] is None else f" ({figure['low']:.4f} to {figure['high']:.4f})"
        click.echo(f"  {name}: {figure['value']:.4f}{interval}")
    for scale, thresholds in facts["thresholds"].items():
        wanted, cost = thresholds.get("precision"), thresholds.get("cost_ratio")
        for kind in ("estimate", "cautious") if wanted else ():
            click.echo(f"  {scale} for precision {wanted['wanted']:g} ({kind}): {_threshold(wanted[kind])}")
        if cost:
            click.echo(f"  {scale} of least cost at {cost['ratio']:g} to 1: {_threshold(cost)}")
    for warning in facts["warnings"]:
        say(f"warning: {warning}", logging.WARNING)


def _threshold(row: dict[str, Any] | None) -> str:
    if row is None or row["threshold"] is None:
        return "none"
    return (
        f"{row['threshold']:.6g}, precision {row['precision']:.4f} (at least {row['precision_lower_bound']:.4f}), "
        f"recall {row['recall']:.4f}"
    )
