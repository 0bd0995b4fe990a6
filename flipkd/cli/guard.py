"""How a command of flipkd runs: its files are private, and an error ends it in one line and its exit code.

For ``flipkd-batch`` and for the scripts of ``jobs/`` alike.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import click

from flipkd.cli.options import COMMA_SEPARATED, say
from flipkd.errors import FlipkdError, told_without_data


class OneValueCommand(click.Command):
    """Refuses an option that takes one value and is given twice; click takes the last one and says nothing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)  # parsing empties the list
        rest = super().parse_args(ctx, args)
        if ctx.resilient_parsing:  # a shell completes
            return rest
        for parameter, times in Counter(self.make_parser(ctx).parse_args(given)[2]).items():
            if times > 1 and isinstance(parameter, click.Option) and not (parameter.is_flag or parameter.multiple):
                way_out = "join them with commas" if parameter.name in COMMA_SEPARATED else "name one"
                raise click.UsageError(f"{parameter.opts[0]} stands {times} times and takes one value; {way_out}", ctx)
        return rest


class GuardedCommand(OneValueCommand):
    """Errors that flipkd raises on purpose end in one line and their exit code, without a traceback.

    Any other exception is a bug. Its message may quote a record, so its kind and its place in the code are shown alone.
    """

    def told(self, error: FlipkdError) -> str:
        """What is said of an error."""
        return str(error)

    def invoke(self, ctx: click.Context) -> Any:
        # flipkd's own files are private whatever the umask; this is for those that libraries make, from their first
        # moment.
        previous = os.umask(0o077)
        ctx.call_on_close(lambda: os.umask(previous))
        try:
            return super().invoke(ctx)
        except FlipkdError as error:
            say(f"Error: {self.told(error)}")
            ctx.exit(error.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            say(f"Error: this should not happen, please report it: {told_without_data(error)}")
            ctx.exit(1)


class GuardedGroup(GuardedCommand, click.Group):
    """The same for a group: what any of its commands raises."""
