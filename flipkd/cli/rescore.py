"""``rescore``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from flipkd.cli.guard import OneValueCommand
from flipkd.cli.options import (
    common_options,
    forgotten_option,
    metrics_options,
    print_values,
    record_text_options,
    report_job,
    right_records_options,
    run_options,
    set_up_logging,
    take_run,
    unit_options,
)
from flipkd.cli.unused import refuse_unused
from flipkd.config import RunOptions
from flipkd.errors import ConfigError
from flipkd.models.llm_options import LlmOptions
from flipkd.run.rescore_config import RescoreConfig

_LLM = (
    "engine", "prompt_file", "labels", "chat_template", "both_orders", "device", "max_length", "max_tokens",
    "share_prefixes", "trust_remote_code",
)  # fmt: skip
# What ``score`` takes for its second stage, of the options above: whom to ask, what, and how wide a stage it is. The
# rest is the same for both (columns, Ray, errors, progress), or the job's own.
_OF_THE_STAGE = (
    "llm", "llm_dtype", *_LLM, "band", "budget", "records", "right_records", "threshold", "combine", "fit_labels",
    "rows_per_unit", "workers", "threads", "gpus",
)  # fmt: skip
_PREFIX = "rescore_"


def _band(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    low, separator, high = value.partition(":")
    try:
        if separator:
            return float(low), float(high)
    except ValueError:
        pass
    raise click.BadParameter("write two numbers, as in 0.3:0.7")


def _labels(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, str] | None:
    if value is None:
        return None
    match, separator, no_match = value.partition(",")
    if not separator or not match or not no_match or "," in no_match:
        raise click.BadParameter("write two words, first that of a match, as in yes,no")
    return match, no_match


@click.command(cls=OneValueCommand)
@click.option("--scores", required=True, help="Output folder of score; it must hold the texts, or ids for --records.")
@click.option("--llm", required=True, help="A run of train, or a Hugging Face decoder: folder or hub name.")
@click.option("--output", required=True, help="Folder for the copy.")
@click.option("--band", metavar="LOW:HIGH", callback=_band, help="Probabilities (else scores) of the pairs to ask.")
@click.option(
    "--budget",
    metavar="1%|N",
    help="Or the most uncertain: a share of the scored pairs, or a number. Needs score --calibration.",
)
@click.option("--engine", type=click.Choice(["torch", "vllm"]), default="torch", show_default=True, help="Runs it.")
@click.option("--prompt-file", help="Text file with {left} and {right}. Default: the prompt of train.")
@click.option(
    "--labels",
    metavar="MATCH,NO",
    callback=_labels,
    help="The two answers to the prompt file, as they follow it (with a space in front, if one does).",
)
@click.option("--chat-template", is_flag=True, help="Send the prompt as a message in the model's chat template.")
@click.option("--both-orders", is_flag=True, help="Mean of the answers to (left, right) and (right, left).")
@click.option("--left-text", default="left_text", show_default=True, help="Column of left texts.")
@click.option("--right-text", default="right_text", show_default=True, help="Column of right texts.")
@click.option("--left-column", default="left_id", show_default=True, help="Column of left ids, with --records.")
@click.option("--right-column", default="right_id", show_default=True, help="Column of right ids, with --records.")
@click.option("--records", help="Record table of the left (and right) records, for pairs of ids.")
@click.option("--right-records", help="Record table of the right records.")
@click.option("--threshold", type=float, help="Of the probability, for the column match. Default: what score used.")
@click.option("--combine", help="_combination.json: probability from the LLM's answer and the score together.")
@click.option("--fit-labels", metavar="COLUMN", help="Fit a _combination.json on the answered pairs with a label.")
@click.option(
    "--llm-dtype",
    type=click.Choice(["float32", "bf16"]),
    default="float32",
    show_default=True,
    help="The model's own arithmetic.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto; of the torch engine.")
@click.option("--max-length", type=int, help="Most tokens of a prompt; the longer text is cut first.")
@click.option("--max-tokens", type=int, help="Tokens in one forward pass of the torch engine.")
@click.option("--share-prefixes/--no-share-prefixes", default=True, help="Compute common beginnings of prompts once.")
@click.option("--trust-remote-code", is_flag=True, help="Let Python code in the model's folder run.")
@click.option("--rows-per-unit", type=int, default=20_000, show_default=True, help="Pairs in one work unit.")
@click.option("--dry-run", is_flag=True, help="Print pairs, tokens and time, from a short measurement, and stop.")
@record_text_options
@right_records_options
@run_options
@unit_options
@metrics_options
@common_options
def rescore(as_json: bool, log_level: str, dry_run: bool, **options: Any) -> None:
    """Let an LLM answer for the pairs near the threshold."""
    set_up_logging(log_level)
    config = RescoreConfig(llm=_take_llm(options), run=take_run(options), **options)
    refuse_unused(config)
    from flipkd.run import rescore_cost
    from flipkd.run.rescore import rescore as run

    if dry_run:
        print_values(rescore_cost.dry_run(config), as_json)
        return
    report_job(run(config), config.output, as_json, forgotten_option(config))


def _take_llm(options: dict[str, Any]) -> LlmOptions:
    folder, dtype = options.pop("llm"), options.pop("llm_dtype")
    return LlmOptions(folder=folder, dtype=dtype, **{name: options.pop(name) for name in _LLM})


def stage_options() -> list[click.Parameter]:
    """The options of ``rescore`` that ``score`` has too, as ``--rescore-...``; none is required there."""
    found: list[click.Parameter] = []
    for parameter in rescore.params:
        if parameter.name not in _OF_THE_STAGE:
            continue
        one = copy.copy(parameter)
        one.name, one.required = f"{_PREFIX}{parameter.name}", False
        one.opts = [flag.replace("--", "--rescore-") for flag in parameter.opts]
        one.secondary_opts = [flag.replace("--no-", "--no-rescore-") for flag in parameter.secondary_opts]
        found.append(one)
    return found


def take_stage(options: dict[str, Any], run: RunOptions) -> RescoreConfig | None:
    """Takes what the options of ``stage_options`` say; None where they name no LLM.

    Args:
        options: of ``score``; those of the stage are removed.
        run: how the first stage runs: the second has workers, threads and GPUs of its own.

    Raises:
        ConfigError: an option of the stage is given without ``--rescore-llm``.
    """
    context = click.get_current_context()
    names = [name for name in options if name.startswith(_PREFIX)]
    given = [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    taken = {name.removeprefix(_PREFIX): options.pop(name) for name in names}
    if taken["llm"] is None:
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --rescore-llm")
        return None
    own = replace(
        run, workers=taken.pop("workers"), threads=taken.pop("threads") or run.threads, gpus=taken.pop("gpus")
    )
    try:
        return RescoreConfig(llm=_take_llm(taken), run=own, scores="", output="", **taken)
    except ConfigError as error:
        raise ConfigError(f"second stage (--rescore-...): {error}") from error
