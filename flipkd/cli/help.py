"""What ``--help`` shows below the options, and which options a shell completes as paths."""

from __future__ import annotations

import click

# Each is a command line as it stands; a backslash at the end of a line continues it.
EXAMPLES: dict[str, str] = {
    "encode": r"""
flipkd-batch encode --encoder encoder/ --records records/ --output store/
flipkd-batch encode --encoder encoder/ --records customers.parquet --id-column customer \
    --template '{name} | {city}' --output store/ --cache cache/
flipkd-batch encode --encoder encoder/ --records records/ --output store/ --cache cache/ --forget ids.txt
""",
    "score": r"""
flipkd-batch score --store store/ --pairs pairs/ --output scores/
flipkd-batch score --encoder encoder/ --records customers/ --right-records sanctions/ \
    --template '{name} | {city}' --pairs pairs/ --output scores/ --cache cache/
flipkd-batch score --encoder encoder/ --records crm/ --id-column customer --template '{name} | {city}' \
    --right-records billing/ --right-id-column account --right-template '{payer} | {town}' --pairs pairs/ \
    --output scores/
flipkd-batch score --encoder encoder/ --pairs pairs-of-texts/ --top-k 3 --output scores/
flipkd-batch score --store store/ --pairs pairs/ --output scores/ --columns left_id,right_id,probability,match \
    --calibration report/calibration.json --threshold 0.9
flipkd-batch score --encoder encoder/ --pairs pairs-of-texts/ --output scores/ \
    --calibration report/calibration.json --rescore-llm run/ --rescore-budget 1%
flipkd-batch score --ray auto --workers 64 --store store/ --pairs s3://BUCKET/pairs --output s3://BUCKET/scores
""",
    "rescore": r"""
flipkd-batch rescore --scores scores/ --llm run/ --budget 1% --output rescored/ --dry-run
flipkd-batch rescore --scores scores/ --llm run/ --band 0.4:0.6 --output rescored/
flipkd-batch rescore --scores scores/ --records records/ --llm Qwen/Qwen2.5-0.5B-Instruct \
    --prompt-file prompt.txt --labels ' yes, no' --budget 10000 --output rescored/
""",
    "evaluate": r"""
flipkd-batch evaluate --scores scores/ --labels gold.parquet --precision 0.99 --slice country --output report/
flipkd-batch evaluate --scores scores/ --sample 2000 --output sample.parquet
flipkd-batch evaluate --scores scores/ --labels sample.parquet --output report/
""",
    "status": r"""
flipkd-batch status scores/
flipkd-batch status --watch s3://BUCKET/scores
""",
    "teach": r"""
flipkd-batch teach --teacher teacher/ --pairs pairs-of-texts/ --output taught/
flipkd-batch teach --teacher teacher/ --records records/ --pairs pairs/ --output taught/ --cache cache/
""",
    "train": r"""
flipkd-batch train --student Qwen/Qwen2.5-0.5B --pairs taught/ --validation taught-validation/ --output run/
flipkd-batch train --student student/ --pairs taught/ --output run/ --layer 8 --steps 300 --dtype bf16
flipkd-batch train --student student/ --pairs taught/ --output run/ --ray auto --workers 8
""",
    "export": r"""
flipkd-batch export --run run/ --output encoder/
flipkd-batch export --run run/ --output encoder/ --template '{name} | {city}'
""",
    "demo": r"""
flipkd-batch demo --quick
flipkd-batch demo --output demo/
""",
    "nightly": r"""
python jobs/nightly.py nightly.yaml --date 2026-11-25
python jobs/nightly.py nightly.yaml --date 2026-11-25 --ray auto --log-format json --no-progress
python jobs/nightly.py nightly.yaml --date 2026-11-25 --accept 'new customers, seen by the data team'
python jobs/nightly.py nightly.yaml --date 2026-11-25 --overwrite
""",
}

_PATH = click.Path()

COMPLETION = 'eval "$(_FLIPKD_BATCH_COMPLETE=bash_source flipkd-batch)"'

_RESCORE = ("llm", "prompt_file", "records", "right_records", "combine")
# Parameters whose value is a file or folder (some also take a URL or the name of a model).
PATHS: dict[str, tuple[str, ...]] = {
    "encode": ("encoder", "records", "output", "forget", "cache", "metrics_file"),
    "score": (
        *("pairs", "output", "store", "right_store", "encoder", "records", "right_records"),
        *("calibration", "cache", "metrics_file", "rescore_scores"),
        *(f"rescore_{name}" for name in _RESCORE),
    ),
    "rescore": ("scores", "output", "metrics_file", *_RESCORE),
    "evaluate": ("scores", "output", "labels"),
    "status": ("folder",),
    "teach": ("teacher", "pairs", "output", "records", "right_records", "cache", "metrics_file"),
    "train": ("student", "pairs", "output", "validation", "unlabelled"),
    "export": ("run", "output", "student"),
    "nightly": ("config",),
}


def with_help(command: click.Command) -> click.Command:
    """Adds the command's examples to its ``--help``, and lets a shell complete its paths.

    The value of a path stays the text that was given, so a URL passes; whether it is there, the command itself looks.
    """
    assert command.name is not None
    command.epilog = preformatted("Examples", EXAMPLES[command.name])
    for parameter in command.params:
        if parameter.name in PATHS.get(command.name, ()):
            parameter.type = _PATH
    return command


def preformatted(title: str, text: str) -> str:
    """An epilog whose lines click leaves as they are."""
    lines = "\n".join(f"  {line}" for line in text.strip().splitlines())
    return f"\b\n{title}:\n{lines}"
