"""One night, from one YAML file: encode what changed, score, ask an LLM, evaluate, compare with the last night.

Input: what ``flipkd-batch score`` reads (``nightly.yaml`` beside this file is a commented example).
Output: OUTPUT/2026-11-25/ with ``scores/`` (and ``rescored/``), Parquet as ``score`` writes it: ``score`` (float32,
cosine of the two vectors, -1 to 1; null with a ``reason``), ``truncated``; ``evaluation/``; and ``report/`` with
``night.json`` and ``night.html``: gates, distributions, counts per reason, a time line; no text or id of a record.

    python jobs/nightly.py nightly.yaml --date 2026-11-25
    ray job submit --working-dir jobs -- python nightly.py /shared/nightly.yaml --date 2026-11-25 --ray auto

The date says which night it is, in UTC; nothing looks at a clock to choose a folder. Run again, a night that was broken
off goes on, and a finished one does nothing and ends with the same exit code.

Exit codes: 0 released; 3 a gate tripped, and the night lies in OUTPUT/_held/ with its report; 1 failed; 2 wrong usage.
A consumer reads OUTPUT/current.json, which names the newest released night, or OUTPUT/2026-11-25/, which is there only
once all gates have passed. ``--accept REASON`` releases a held night.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import fields

import click

from flipkd.cli.guard import GuardedCommand
from flipkd.cli.help import with_help
from flipkd.cli.options import log_options, say, set_up_logging
from flipkd.config import RunOptions, ScoreConfig
from flipkd.errors import ConfigError, FlipkdError
from flipkd.nightly.config import read_config
from flipkd.nightly.folders import NIGHT_PAGE, REPORT
from flipkd.nightly.night import Night, accept_night, run_night
from flipkd.report.config import EvaluateConfig
from flipkd.run.rescore_config import RescoreConfig

# The sections of the YAML file, for an error that names an option of the command line.
_SECTIONS = {"score": ScoreConfig, "rescore": RescoreConfig, "evaluate": EvaluateConfig, "run": RunOptions}


class _Nightly(GuardedCommand):
    """Errors of the stages name options of ``flipkd-batch``; here they are keys of the YAML file."""

    def told(self, error: FlipkdError) -> str:
        text = str(error)
        own = {flag for parameter in self.params for flag in parameter.opts}
        hints = []
        for flag in dict.fromkeys(re.findall(r"--[a-z][a-z-]*[a-z]", text)):
            key = flag[2:].replace("-", "_")
            sections = [name for name, kind in _SECTIONS.items() if key in {field.name for field in fields(kind)}]
            if sections and flag not in own and key != "output":
                hints.append(f"{flag} is {key} of {' or '.join(sections)}")
        return f"{text} (in the YAML file {', '.join(hints)})" if hints else text


@with_help
@click.command(
    cls=_Nightly,
    help=__doc__.split("\n\n")[0],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("config")
@click.option("--date", required=True, metavar="YYYY-MM-DD", help="Which night: {date} in the YAML file, in UTC.")
@click.option("--ray", metavar="ADDRESS", help="local, auto or an address; in place of `run: ray` of the YAML file.")
@click.option("--accept", metavar="REASON", help="Release a night that a gate holds back; the reason is kept with it.")
@click.option("--overwrite", is_flag=True, help="Remove what there is of this night, and run it from its beginning.")
@click.option("--progress/--no-progress", default=True, help="Show progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print the gates as JSON.")
@log_options
def nightly(
    config: str,
    date: str,
    ray: str | None,
    accept: str | None,
    overwrite: bool,
    progress: bool,
    as_json: bool,
    log_level: str,
) -> None:
    set_up_logging(log_level)
    if accept is not None and overwrite:
        raise ConfigError("--accept releases a night as it is, and --overwrite removes it; give one of them")
    night_config = read_config(config, date, ray=ray, progress=progress)
    night = run_night(night_config, overwrite=overwrite) if accept is None else accept_night(night_config, accept)
    _print(night, as_json)
    sys.exit(night.exit_code)


def _print(night: Night, as_json: bool) -> None:
    gates, page = night.facts["gates"], str(night.folder / REPORT / NIGHT_PAGE)
    if as_json:
        told = {"date": night.facts["date"], "released": night.released, "current": night.current, "report": page}
        click.echo(json.dumps({**told, "gates": gates}, sort_keys=True))
        return
    state = "released" if night.released else "held back"
    click.echo(f"night {night.facts['date']}: {state}; {night.facts['pairs']['rows_in']} pairs; report in {page}")
    for gate in gates:
        if gate["verdict"] == "tripped":
            value = "cannot be measured" if gate["value"] is None else f"{gate['value']:.6g}"
            say(f"gate {gate['name']}: {value}, limit {gate['limit']}", logging.WARNING)


if __name__ == "__main__":
    nightly()
