"""``demo``."""

from __future__ import annotations

from pathlib import Path

import click

from flipkd.cli.guard import OneValueCommand
from flipkd.cli.options import common_options, print_values, set_up_logging


@click.command(cls=OneValueCommand)
@click.option(
    "--output",
    default="flipkd-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for data, models and scores.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A fifth of the records and few steps: under 5 minutes on two cores, in place of under 40.",
)
@common_options
def demo(output: Path, quick: bool, as_json: bool, log_level: str) -> None:
    """Do all of it with real ICD-9 descriptions.

    Teach, train, export, encode, score and evaluate; the output folder can be filled with data of your own.
    """
    set_up_logging(log_level)
    from flipkd.demo import run_demo

    result = run_demo(output, quick, echo=None if as_json else click.echo)
    if as_json:
        print_values(result, as_json)
