"""What is told of a run of ``train``: what it was made of, and how it ended."""

from __future__ import annotations

import math
from typing import Any

from flipkd.distill.config import TrainConfig
from flipkd.distill.run_folder import RunFolder
from flipkd.distill.training_data import TrainingData
from flipkd.distill.validation import deciding_value
from flipkd.models.adapter import base_fingerprint
from flipkd.run.manifest import versions
from flipkd.run.units import fingerprint


def run_facts(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """What ``run.json`` holds."""
    pairs, unlabelled, validation = data.pairs, data.unlabelled, data.validation
    deciding = {
        **config.deciding(),
        "pairs": pairs.fingerprint,
        "unlabelled": None if unlabelled is None else unlabelled.fingerprint,
        "validation": None if validation is None else validation.fingerprint,
        "base": base_fingerprint(config.student.folder),
    }
    return {
        "format": 1,
        "fingerprint": fingerprint(deciding),
        "config": config.recorded(),
        "base_fingerprint": deciding["base"],
        "pairs": len(pairs),
        "texts": len(pairs.texts),
        "unlabelled_pairs": 0 if unlabelled is None else len(unlabelled),
        "validation_pairs": 0 if validation is None else len(validation),
        "skipped": pairs.skipped,
        "teacher": None if pairs.facts is None else vars(pairs.facts),
        "versions": versions(),
    }


def summary(config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    """What a finished run is told by."""
    lines = folder.metrics()
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
