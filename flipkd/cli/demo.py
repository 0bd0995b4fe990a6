"""``demo``."""

from __future__ import annotations

from pathlib import Path

import click

from flipkd.cli.options import common_options, print_values, set_up_logging


@click.command()
@click.option(
    "--output",
    default="flipkd-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for tables, stores and scores.",
)
@click.option("--quick", is_flag=True, help="A tenth of the records.")
@common_options
def demo(output: Path, quick: bool, as_json: bool, log_level: str) -> None:
    """Match real ICD-9 long and short descriptions with a real encoder."""
    set_up_logging(log_level)
    from flipkd.demo import run_demo

    result = run_demo(output, quick, echo=None if as_json else click.echo)
    if as_json:
        print_values(result, as_json)
