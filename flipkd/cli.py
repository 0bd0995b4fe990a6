"""``flipkd-batch``: parses, calls the library, reports."""

from __future__ import annotations

import json
import logging
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig
from flipkd.errors import FlipkdError

F = TypeVar("F", bound=Callable[..., Any])
_RUN = (
    "ray", "workers", "min_workers", "threads", "gpus", "on_bad_shard", "max_retries", "max_failed_units",
    "stall_timeout_s", "start_timeout_s", "overwrite", "progress",
)  # fmt: skip


class _Group(click.Group):
    """Errors that flipkd raises on purpose end in one line and their exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FlipkdError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


def _load_config(ctx: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Values of a YAML or TOML file become the defaults of the options; a flag still wins."""
    if path is None:
        return None
    try:
        values = _parse_config(Path(path))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    known = {parameter.name: parameter for parameter in ctx.command.params}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known or name == "config":
            names = ", ".join(sorted(str(name).replace("_", "-") for name in known))
            raise click.BadParameter(f"{path}: unknown option {key!r}; known are {names}")
        defaults[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _parse_config(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".toml":
        return tomllib.loads(path.read_text())
    import yaml

    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError("must hold options and their values")
    return values


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_common = _options(
    click.option("--config", type=click.Path(dir_okay=False), is_eager=True, expose_value=False, callback=_load_config,
                 help="YAML or TOML file with any of these options."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("--log-level", default="warning", show_default=True,
                 type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False)),
)  # fmt: skip

_run = _options(
    click.option("--ray", metavar="ADDRESS", help="Run on Ray: local, auto, or an address. Default: in process."),
    click.option("--workers", type=int, help="Units in flight (in process: threads; on Ray: at most so many workers)."),
    click.option("--min-workers", type=int, default=1, show_default=True, help="Ray workers that must start."),
    click.option("--threads", type=int, help="Cores to use in process; on Ray the CPUs of one worker."),
    click.option("--gpus", type=float, help="GPUs of one Ray worker. Default: 1 where a model runs and there are any."),
    click.option("--on-bad-shard", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
                 help="What to do with an input file that cannot be read; skip ends with exit code 3."),
    click.option("--max-retries", type=int, default=3, show_default=True, help="Tries of a unit whose worker died."),
    click.option("--max-failed-units", type=int, default=1000, show_default=True, help="Error budget."),
    click.option("--stall-timeout-s", type=float, default=1800.0, show_default=True,
                 help="Seconds without a finished unit after which a Ray job fails."),
    click.option("--start-timeout-s", type=float, default=600.0, show_default=True,
                 help="Seconds to wait for the first Ray workers."),
    click.option("--overwrite", is_flag=True, help="Delete another run's output first."),
    click.option("--progress/--no-progress", default=True, help="Show progress on stderr."),
)  # fmt: skip

_encoder = _options(
    click.option("--encoder-dtype", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True,
                 help="The model's own arithmetic."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto."),
    click.option("--max-length", type=int, help="Longest text in tokens. Default: what the encoder's folder says."),
    click.option("--max-tokens", type=int, help="Tokens in one forward pass. Default: what suits the device."),
    click.option("--trust-remote-code", is_flag=True, help="Let Python code in the encoder's folder run."),
)  # fmt: skip

_records = _options(
    click.option("--id-column", default="id", show_default=True, help="Column of the records' ids."),
    click.option("--text-column", default="text", show_default=True, help="Column of the records' texts."),
    click.option("--template", help="Several columns as one text, as in '{name} | {address}'."),
    click.option("--dtype", type=click.Choice(["int8", "bf16", "float32"]), default="int8", show_default=True,
                 help="Number format of stored vectors."),
)  # fmt: skip


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="flipkd")
def main() -> None:
    """Score candidate pairs of records, Parquet to Parquet."""


@main.command()
@click.option("--encoder", required=True, help="A sentence-transformers bi-encoder folder.")
@click.option("--records", required=True, help="Parquet file or folder.")
@click.option("--output", required=True, help="Folder of the vector store (local).")
@_records
@_encoder
@_run
@_common
def encode(as_json: bool, log_level: str, **options: Any) -> None:
    """Turn a record table into a memory-mapped vector store."""
    _logging(log_level)
    from flipkd.run.encode import encode as run

    config = EncodeConfig(encoder=_take_encoder(options), run=_take_run(options), **options)
    _report(run(config), config.output, as_json)


@main.command()
@click.option("--pairs", required=True, help="Parquet file or folder.")
@click.option("--output", required=True, help="Folder for the scores.")
@click.option("--left-column", default="left_id", show_default=True, help="Column of left ids.")
@click.option("--right-column", default="right_id", show_default=True, help="Column of right ids.")
@click.option("--left-text", default="left_text", show_default=True, help="Column of left texts, for inline pairs.")
@click.option("--right-text", default="right_text", show_default=True, help="Column of right texts, for inline pairs.")
@click.option("--store", help="Vector store of the left (and right) records.")
@click.option("--right-store", help="Vector store of the right records.")
@click.option("--encoder", help="Encoder for --records, or for inline texts.")
@click.option("--records", help="Record table of the left (and right) records.")
@click.option("--right-records", help="Record table of the right records.")
@click.option("--cache", help="Folder that keeps the stores made from --records.")
@click.option("--threshold", type=float, help="Add the column match: at least this probability (or score).")
@click.option("--min-score", type=float, help="Write only pairs with at least this score.")
@click.option("--top-k", type=int, help="Write only the K best pairs of each left record.")
@click.option(
    "--columns", metavar="NAME,...", help="Columns to write. Default: all input columns and the score columns."
)
@click.option("--calibration", help="JSON file with slope and intercept of the match probability.")
@click.option("--rows-per-unit", type=int, default=4_000_000, show_default=True, help="Pairs in one work unit.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@_records
@_encoder
@_run
@_common
def score(as_json: bool, log_level: str, dry_run: bool, **options: Any) -> None:
    """Score pairs: ids into a store, ids into record tables, or inline texts."""
    _logging(log_level)
    encoder = _take_encoder(options)
    columns = options.pop("columns")
    config = ScoreConfig(
        encoder=encoder if encoder.folder else None,
        run=_take_run(options),
        columns=None if columns is None else tuple(name.strip() for name in columns.split(",") if name.strip()),
        **options,
    )
    from flipkd.run import pipeline

    if dry_run:
        _print(pipeline.dry_run(config), as_json)
        return
    _report(pipeline.score(config), config.output, as_json)


@main.command()
@click.argument("folder")
@_common
def status(folder: str, as_json: bool, log_level: str) -> None:
    """Say how far the job of an output FOLDER is."""
    _logging(log_level)
    from flipkd.run.status import status as read_status

    _print(read_status(folder), as_json)


@main.command()
@click.option(
    "--output",
    default="flipkd-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for tables, stores and scores.",
)
@click.option("--quick", is_flag=True, help="A tenth of the records.")
@_common
def demo(output: Path, quick: bool, as_json: bool, log_level: str) -> None:
    """Match real ICD-9 long and short descriptions with a real encoder."""
    _logging(log_level)
    from flipkd.demo import run_demo

    result = run_demo(output, quick, echo=None if as_json else click.echo)
    if as_json:
        _print(result, as_json)


def _take_run(options: dict[str, Any]) -> RunOptions:
    return RunOptions(**{name: options.pop(name) for name in _RUN})


def _take_encoder(options: dict[str, Any]) -> EncoderOptions:
    return EncoderOptions(
        folder=options.pop("encoder") or "",
        dtype=options.pop("encoder_dtype"),
        **{name: options.pop(name) for name in ("device", "max_length", "max_tokens", "trust_remote_code")},
    )


def _logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def _report(manifest: dict[str, Any], output: str, as_json: bool) -> None:
    """Prints a finished job; a partial one ends with exit code 3."""
    if as_json:
        _print(manifest, as_json)
    else:
        reasons = "".join(f", {count} {reason}" for reason, count in manifest["reasons"].items())
        click.echo(
            f"{manifest['kind']}: {manifest['rows_in']} rows in, {manifest['rows_out']} out{reasons}; "
            f"{manifest['rows_per_second']:.0f} rows/s; in {output}"
        )
    if not manifest["complete"]:
        skipped = len(manifest["skipped_shards"]) + len(manifest["skipped_units"])
        click.echo(f"partial: {skipped} files or units were skipped; see _manifest.json in {output}", err=True)
        sys.exit(3)


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(values, sort_keys=True))
        return
    for key, value in values.items():
        click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict | list) else value}")


if __name__ == "__main__":
    main()
