"""``flipkd-batch``: parses, calls the library, reports."""

from __future__ import annotations

import click

from flipkd.cli import batch, demo, evaluate, export, rescore, teach, train
from flipkd.cli.guard import GuardedGroup
from flipkd.cli.help import COMPLETION, preformatted, with_help


@click.group(
    cls=GuardedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=preformatted("Completion of commands, options and paths in bash (zsh and fish likewise)", COMPLETION),
)
@click.version_option(package_name="flipkd", prog_name="flipkd-batch")
def main() -> None:
    """Distil an encoder from a teacher, and score candidate pairs of records with it, Parquet to Parquet."""


for _command in (
    batch.encode,
    batch.score,
    rescore.rescore,
    evaluate.evaluate,
    batch.status,
    teach.teach,
    train.train,
    export.export,
    demo.demo,
):
    main.add_command(with_help(_command))
