"""What is told of a run of ``train``: what it was made of, and how it ended."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flipkd.distill.config import TrainConfig
from flipkd.distill.run_folder import read_metrics
from flipkd.distill.training_data import TrainingData
from flipkd.distill.validation import deciding_value
from flipkd.run.manifest import versions
from flipkd.run.units import fingerprint


def run_facts(config: TrainConfig, data: TrainingData, base_fingerprint: str) -> dict[str, Any]:
    """What ``run.json`` holds; ``base_fingerprint`` is that of the student's base."""
    pairs, unlabelled, validation = data.pairs, data.unlabelled, data.validation
    deciding = {
        **config.deciding(),
        "pairs": pairs.fingerprint,
        "unlabelled": None if unlabelled is None else unlabelled.fingerprint,
        "validation": None if validation is None else validation.fingerprint,
        "base": base_fingerprint,
    }
    return {
        "format": 1,
        "fingerprint": fingerprint(deciding),
        "config": config.recorded(),
        "base_fingerprint": base_fingerprint,
        "pairs": len(pairs),
        "texts": len(pairs.texts),
        "unlabelled_pairs": 0 if unlabelled is None else len(unlabelled),
        "validation_pairs": 0 if validation is None else len(validation),
        "skipped": pairs.skipped,
        "teacher": None if pairs.facts is None else vars(pairs.facts),
        "versions": versions(),
    }


def summary(config: TrainConfig, run: Path) -> dict[str, Any]:
    """What a finished run, in the folder ``run``, is told by."""
    lines = read_metrics(run)
    validations = [line for line in lines if "validation" in line]
    best = max(validations, key=lambda line: deciding_value(line["validation"]) or -math.inf, default=None)
    return {
        "kind": "train",
        "output": config.output,
        "steps": max((line["step"] for line in lines), default=0),
        "best_step": None if best is None else best["step"],
        "validation": None if best is None else best["validation"],
        "seconds": max((line.get("seconds", 0.0) for line in lines), default=0.0),
    }
