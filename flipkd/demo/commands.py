"""The demo's jobs: as configurations, and as the commands that do the same for somebody's own data."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig, TeachConfig
from flipkd.distill.config import TrainConfig
from flipkd.models.options import StudentOptions

Config = TeachConfig | TrainConfig | EncodeConfig | ScoreConfig
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def teach_config(output: Path, split: str, run: RunOptions) -> TeachConfig:
    """Teacher scores of the labelled pairs of one split."""
    teacher, scores = EncoderOptions(str(output / "teacher")), output / "teacher_scores" / split
    return TeachConfig(teacher=teacher, pairs=str(output / "labelled" / split), output=str(scores), run=run)


def train_config(output: Path, base: Path, steps: int, run: RunOptions) -> TrainConfig:
    """The student's training; validated a few times, since each validation encodes all its texts."""
    scores = output / "teacher_scores"
    return TrainConfig(
        pairs=str(scores / "train"),
        validation=str(scores / "validation"),
        output=str(output / "student_run"),
        student=StudentOptions(str(base)),
        steps=steps,
        evaluate_every=max(1, steps // 3),
        checkpoint_every=max(1, steps // 6),
        device="cpu",
        run=run,
    )


def encode_config(output: Path, encoder: Path, results: Path, side: str, run: RunOptions) -> EncodeConfig:
    """Vectors of the records of one side."""
    records, store = str(output / "records" / side), str(results / "stores" / side)
    return EncodeConfig(encoder=EncoderOptions(str(encoder)), records=records, output=store, run=run)


def score_config(output: Path, results: Path, run: RunOptions) -> ScoreConfig:
    """Scores of the candidate pairs, from the two stores."""
    left, right = (str(results / "stores" / side) for side in SIDES)
    scores = str(results / "scores")
    return ScoreConfig(pairs=str(output / "pairs"), output=scores, store=left, right_store=right, run=run)


def validation_config(output: Path, encoder: Path, results: Path, run: RunOptions) -> ScoreConfig:
    """Scores of the labelled validation pairs, for the threshold; these pairs hold their texts."""
    pairs, scores = str(output / "labelled" / "validation"), str(results / "validation_scores")
    return ScoreConfig(pairs=pairs, output=scores, encoder=EncoderOptions(str(encoder)), run=run)


def command_lines(configs: Iterable[Config], output: Path) -> list[str]:
    """``flipkd-batch`` commands that do the same jobs, and find them done; to be run in the folder ``output``."""
    return [_line(output, *_words(config)) for config in configs]


def export_line(output: Path) -> str:
    """The command that exports the student; to be run in the folder ``output``."""
    return _line(output, "export", ("run", output / "student_run"), ("output", output / "encoder"))


def _words(config: Config) -> tuple[Any, ...]:
    """The command and its options."""
    pairs_or_records = ("records", config.records) if isinstance(config, EncodeConfig) else ("pairs", config.pairs)
    places = (pairs_or_records, ("output", config.output))
    match config:
        case TeachConfig():
            return "teach", ("teacher", config.teacher.folder), *places
        case EncodeConfig():
            return "encode", ("encoder", config.encoder.folder), *places
        case ScoreConfig(encoder=EncoderOptions() as encoder):
            return "score", ("encoder", encoder.folder), *places
        case ScoreConfig():
            return "score", ("store", config.store), ("right-store", config.right_store), *places
        case TrainConfig():
            names = ("steps", "evaluate_every", "checkpoint_every", "device")
            values = [(name.replace("_", "-"), getattr(config, name)) for name in names]
            return "train", ("student", config.student.folder), ("validation", config.validation), *places, *values


def _line(output: Path, command: str, *options: tuple[str, object]) -> str:
    words = ["flipkd-batch", command]
    for name, value in options:
        path = Path(str(value))
        words += [f"--{name}", str(path.relative_to(output)) if path.is_relative_to(output) else str(value)]
    return shlex.join(words)
