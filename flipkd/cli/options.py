"""What commands share: groups of options, the configuration file, and how results are printed."""

from __future__ import annotations

import difflib
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from flipkd.cli.config_file import read_config_file
from flipkd.config import EncoderOptions, RunOptions, ScoreConfig
from flipkd.logs import COMMAND_LOGGER, LOG_FORMATS, LogFormat, LogOptions, current_options, logging_to_stderr
from flipkd.record_sides import RecordSides
from flipkd.urls import hide_secrets, without_secrets

F = TypeVar("F", bound=Callable[..., Any])
# Options that take several values with commas between them; in a configuration file these may be a list.
COMMA_SEPARATED = ("columns", "key", "labels", "rescore_labels", "target_modules")
_RUN = (
    "ray", "workers", "min_workers", "threads", "gpus", "on_bad_shard", "max_retries", "max_failed_units",
    "stall_timeout_s", "start_timeout_s", "overwrite", "progress", "metrics_file",
)  # fmt: skip


def _load_config(ctx: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Values of a YAML or TOML file become the defaults of the options; a flag still wins."""
    if path is None:
        return None
    try:
        values = read_config_file(Path(path))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    own = {flag.lstrip("-"): parameter for parameter in ctx.command.params for flag in parameter.opts}
    own = {flag: parameter for flag, parameter in own.items() if len(flag) > 1 and flag != "config"}
    # The names that the configuration classes use are taken too: slices beside slice.
    known = {**{str(parameter.name).replace("_", "-"): parameter for parameter in own.values()}, **own}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        flag = str(key).replace("_", "-")
        if flag not in known:
            close = difflib.get_close_matches(flag, own, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise click.BadParameter(f"{path}: unknown option {key!r}; {hint}known are {', '.join(sorted(own))}")
        name = str(known[flag].name)
        if name in defaults:  # once with - and once with _, or by both of its names
            raise click.BadParameter(f"{path}: option {key!r} stands twice")
        try:
            defaults[name] = _value_of(known[flag], value)
            known[flag].type_cast_value(ctx, defaults[name])
        except click.BadParameter as error:
            raise click.BadParameter(f"{path}: {key}: {error.message}") from error
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _value_of(parameter: click.Parameter, value: Any) -> Any:
    """A value of a configuration file as the option takes it; click itself would make 1 of 1.9, and text of anything.

    Raises:
        click.BadParameter: it is of another type.
    """
    if getattr(parameter, "multiple", False):
        return [_text(one) for one in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        if parameter.name not in COMMA_SEPARATED:
            raise click.BadParameter("takes one value, not a list")
        return ",".join(map(_text, value))
    if value is None:
        return None
    kind = parameter.type
    if isinstance(kind, click.types.BoolParamType):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(kind, click.types.IntParamType):
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif isinstance(kind, click.types.FloatParamType):
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        return _text(value)
    if not fits:
        raise click.BadParameter(f"must be {wanted}, not {value!r}")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:  # YAML takes yes, no and ~ for such
        raise click.BadParameter(f"must be text, not {value!r}; put it in quotes")
    return str(value)


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_LOG_FORMAT = "flipkd.log_format"


def _take_log_format(ctx: click.Context, _: click.Parameter, value: LogFormat) -> None:
    ctx.meta[_LOG_FORMAT] = value


log_options = _options(
    click.option("--log-level", default="warning", show_default=True,
                 type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
                 help="What is told on stderr beside the result: this and what is graver."),
    click.option("--log-format", type=click.Choice(LOG_FORMATS), default="text", show_default=True, expose_value=False,
                 callback=_take_log_format, help="Of what stands on stderr; json: one object a line, progress too."),
)  # fmt: skip

common_options = _options(
    click.option("--config", type=click.Path(dir_okay=False), is_eager=True, expose_value=False, callback=_load_config,
                 help="YAML or TOML file with any of these options."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    log_options,
)  # fmt: skip

run_options = _options(
    click.option("--ray", metavar="ADDRESS", help="Run on Ray: local, auto, or an address. Default: in process."),
    click.option("--workers", type=int, help="On Ray at most so many workers; in process the units that score has in "
                                             "flight (where a model runs, one at a time on all cores)."),
    click.option("--threads", type=int, help="Cores to use in process; on Ray the CPUs of one worker."),
    click.option("--gpus", type=float, help="GPUs of one Ray worker. Default: 1 where a model runs and there are any."),
    click.option("--max-retries", type=int, default=3, show_default=True,
                 help="Tries after a failed read, and after a Ray worker has died."),
    click.option("--overwrite", is_flag=True, help="Delete another run's output first."),
    click.option("--progress/--no-progress", default=True, help="Show progress on stderr."),
)  # fmt: skip

# Of jobs that work on units, beside ``run_options``.
unit_options = _options(
    click.option("--min-workers", type=int, default=1, show_default=True, help="Ray workers that must start."),
    click.option("--on-bad-shard", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
                 help="What to do with an input file that cannot be read; skip ends with exit code 3."),
    click.option("--max-failed-units", type=int, default=1000, show_default=True, help="Error budget."),
    click.option("--stall-timeout-s", type=float, default=1800.0, show_default=True,
                 help="Seconds without a finished unit after which a Ray job fails."),
    click.option("--start-timeout-s", type=float, default=600.0, show_default=True,
                 help="Seconds to wait for the first Ray workers."),
)  # fmt: skip

metrics_options = _options(
    click.option("--metrics-file", metavar="FILE.prom",
                 help="Write metrics for Prometheus there (node_exporter's textfile collector), again and again."),
)  # fmt: skip

encoder_options = _options(
    click.option("--encoder-dtype", type=click.Choice(["float32", "bf16", "int8"]), default="float32",
                 show_default=True, help="The model's own arithmetic."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto."),
    click.option("--max-length", type=int, help="Longest text in tokens. Default: what the encoder's folder says."),
    click.option("--max-tokens", type=int, help="Tokens in one forward pass. Default: what suits the device."),
    click.option("--trust-remote-code", is_flag=True, help="Let Python code in the encoder's folder run."),
)  # fmt: skip

_id_column = click.option("--id-column", default="id", show_default=True, help="Column of the records' ids.")
_template = click.option("--template", help="Several columns as one text, as in '{name} | {address}'.")

record_text_options = _options(
    _id_column,
    click.option("--text-column", default="text", show_default=True, help="Column of the records' texts."),
    _template,
)

right_records_options = _options(
    click.option("--right-id-column", metavar="TEXT", help="Of --right-records. Default: --id-column."),
    click.option("--right-text-column", metavar="TEXT", help="Of --right-records. Default: as for the left records."),
    click.option("--right-template", metavar="TEXT", help="Of --right-records. Default: as for the left records."),
)  # fmt: skip

records_options = _options(
    _id_column,
    click.option("--text-column", help="Column of the records' texts. Default: the template that an exported encoder "
                                       "records, else text."),
    _template,
    click.option("--dtype", type=click.Choice(["int8", "bf16", "float32"]), default="int8", show_default=True,
                 help="Number format of stored vectors."),
)  # fmt: skip


def _parse_bytes(_: click.Context, parameter: click.Parameter, value: str | int | None) -> int | None:
    """``10GB``, ``500MB``, ``2TB`` (powers of 1000), or ``1000B``. A number alone may be meant as any of them."""
    if value is None:
        return None
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B|[KMGT])\s*", str(value), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size with a unit; write it like 10GB", param=parameter)
    return int(float(found[1]) * 1000 ** "BKMGT".index(found[2][0].upper()))


cache_options = _options(
    click.option("--cache", help="Folder that keeps vectors of texts: the next run encodes only what has changed."),
    click.option("--cache-limit", "cache_limit_bytes", metavar="SIZE", callback=_parse_bytes,
                 help="Size of the text cache at most, such as 10GB. Default: no limit."),
)  # fmt: skip


def take_run(options: dict[str, Any]) -> RunOptions:
    return RunOptions(**{name: options.pop(name) for name in _RUN if name in options})


def take_encoder(options: dict[str, Any]) -> EncoderOptions:
    return EncoderOptions(
        folder=options.pop("encoder") or "",
        dtype=options.pop("encoder_dtype"),
        **{name: options.pop(name) for name in ("device", "max_length", "max_tokens", "trust_remote_code")},
    )


def set_up_logging(level: str) -> None:
    """Until the command ends, logs and Python's warnings go to stderr, as --log-level and --log-format say."""
    context = click.get_current_context()
    # Of the whole program: what goes wrong is told when the command's own context has ended.
    context.find_root().with_resource(logging_to_stderr(LogOptions(level, context.meta.get(_LOG_FORMAT, "text"))))


def say(message: str, level: int = logging.ERROR) -> None:
    """The last word of a command on stderr: a line, or in a JSON log an object. Keys in URLs are left out."""
    message = hide_secrets(message)
    options = current_options()
    if options is not None and options.form == "json":
        logging.getLogger(COMMAND_LOGGER).log(level, "%s", message)
    else:
        click.echo(message, err=True)


def forgotten_option(config: RecordSides) -> str | None:
    """The option for the right side's records that a job was not given; None where it was."""
    if isinstance(config, ScoreConfig) and config.store is not None:
        return None if config.right_store is not None else "--right-store"
    return None if config.right_records is not None else "--right-records"


def report_job(manifest: dict[str, Any], output: str, as_json: bool, forgotten: str | None = None) -> None:
    """Prints a finished job; a partial one ends with exit code 3.

    Args:
        manifest: of the job.
        output: its folder.
        as_json: whether the manifest is printed.
        forgotten: see ``forgotten_option``.
    """
    missing = manifest["reasons"].get("missing_record", 0)
    if missing * 2 > manifest["rows_in"]:
        guess = f"was {forgotten} forgotten" if forgotten else "were left and right swapped"
        say(
            f"warning: {missing} of {manifest['rows_in']} pairs name a record that is not in the tables; {guess}, do "
            "the ids come from another table, or are they written otherwise there (a UUID as bytes, case, zeros)?",
            logging.WARNING,
        )
    if as_json:
        print_values(manifest, as_json)
    else:
        reasons = "".join(f", {count} {reason}" for reason, count in manifest["reasons"].items())
        rate = manifest["rows_per_second"]
        speed = f"{rate:.0f} rows/s" if rate else "nothing was left to do"
        click.echo(
            f"{manifest['kind']}: {manifest['rows_in']} rows in, {manifest['rows_out']} out{reasons}; {speed}; "
            f"in {without_secrets(output)}"
        )
    if not manifest["complete"]:
        # A stage has read other files (records), or the same ones: each is counted once.
        parts = [manifest, *manifest.get("stages", {}).values()]
        skipped = {
            json.dumps(entry)
            for part in parts
            for key in ("skipped_shards", "skipped_units")
            for entry in part.get(key, ())
        }
        say(f"partial: {len(skipped)} files or units were skipped; see _manifest.json in {output}", logging.WARNING)
        sys.exit(3)


def print_values(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(values, sort_keys=True))
        return
    for key, value in values.items():
        click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
