"""``flipkd-batch``: parses, calls the library, reports."""

from __future__ import annotations

import os
from typing import Any

import click

from flipkd.cli import batch, demo, evaluate, export, rescore, teach, train
from flipkd.cli.help import COMPLETION, preformatted, with_help
from flipkd.cli.options import say
from flipkd.errors import FlipkdError, told_without_data


class _Group(click.Group):
    """Errors that flipkd raises on purpose end in one line and their exit code, without a traceback.

    Any other exception is a bug. Its message may quote a record, so its kind and its place in the code are shown alone.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FlipkdError as error:
            say(f"Error: {error}")
            ctx.exit(error.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            say(f"Error: this should not happen, please report it: {told_without_data(error)}")
            ctx.exit(1)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=preformatted("Completion of commands, options and paths in bash (zsh and fish likewise)", COMPLETION),
)
@click.version_option(package_name="flipkd", prog_name="flipkd-batch")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Distil an encoder from a teacher, and score candidate pairs of records with it, Parquet to Parquet."""
    # flipkd's own files are private whatever the umask; this is for those that libraries make, from their first moment.
    previous = os.umask(0o077)
    ctx.call_on_close(lambda: os.umask(previous))


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
