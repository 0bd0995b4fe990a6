"""Does the method work? Scores of every method against labels, on splits in which nothing leaks.

    python -m benchmarks.quality [--quick] [--datasets icd9,sec_names] [--methods flip,cosent] [--steps N] [--seed N]
                                 [--work FOLDER] [--results FILE]

The data sets stand in ``benchmarks.quality_sets``. The split is the same for every seed.

- *token_set_ratio*: rapidfuzz, no model.
- *minilm*: all-MiniLM-L6-v2 as it is.
- *teacher*: the same, fine-tuned on the training pairs by sentence-transformers' trainer.
- *untrained*: SmolLM2's lower blocks and A where every student starts: the whitening of training texts.
- *lm*: all of SmolLM2, its LoRA trained on the language model's loss alone; its answer is the score.
- *cosent*, *margin_mse*, *kl*: the student, trained on labels alone, or by a plain distillation loss.
- *flip*: the student, trained by flipped distillation from the teacher's scores and vectors, and the labels.
- *flip_without_mcl*, *_dist*, *_filter*: the same without one part of the loss.
- *flip_unlabelled*: flip, with as many unlabelled pairs beside the labelled ones in every batch.
- *flip_lm*: flip with the language model's loss (all blocks are trained); *flip_decoder*: the answer of that run.

SmolLM2's weights are dequantised 4-bit weights. All students have the same base, options, batches, steps and learning
rate (the trainer's defaults, which were chosen for flip), and each keeps its checkpoint with the best validation AUC.

A row is ``dataset, method, split, seed, f1, auc, ap, seconds, steps, texts_per_second, parameters``: F1 on the test
pairs at the threshold that is best on the validation pairs, area under the ROC curve, average precision; seconds of
training plus scoring the test pairs; distinct texts of the test pairs over the seconds of scoring them; parameters that
are run for a text (a decoder's answer: for a pair), embeddings not counted. Each row is written as soon as it is there,
and one that is there is not computed again. Ratios (above 1: flip is better) are of means over data sets and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.common import machine, report, versions
from benchmarks.quality_sets import DATASETS
from benchmarks.quality_trial import METHODS, Settings, Trial

_COMPARED = tuple(method for method in METHODS if method != "flip")
_RESULTS = Path(__file__).parent / "results" / "quality.json"


QUICK = Settings(steps=2, teacher_steps=2, batch_pairs=16, layer=2, pairs=60)


class Results:
    """The file of finished rows.

    Args:
        path: the file.
        settings: of the rows to come.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._settings = path, asdict(settings)
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != self._settings:
                raise SystemExit(f"{path} holds rows of other settings ({found['settings']}); name another --results")
            self.rows = found["rows"]

    def has(self, dataset: str, method: str, seed: int) -> bool:
        """Whether the row is there."""
        wanted = {"dataset": dataset, "method": method, "seed": seed}
        return any(wanted.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Writes the file anew with the row, whole or not at all."""
        self.rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        values = {"rows": self.rows, "settings": self._settings, "machine": machine(), "versions": versions()}
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)


def ratios(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean AUC and F1 of flip over those of each other method, over the data sets and seeds that both have."""
    rows = list(rows)
    found = {}
    for other in _COMPARED:
        for figure in ("auc", "f1"):
            values = {
                method: {(row["dataset"], row["seed"]): row[figure] for row in rows if row["method"] == method}
                for method in ("flip", other)
            }
            both = values["flip"].keys() & values[other].keys()
            if both:
                means = [statistics.mean(values[method][key] for key in both) for method in ("flip", other)]
                found[f"flip_over_{other}_{figure}"] = round(means[0] / means[1], 4)
    return found


def run(datasets: list[str], methods: list[str], seed: int, settings: Settings, work: Path, results: Results) -> None:
    """Computes the rows that are missing, one after the other."""
    for dataset in datasets:
        wanted = [method for method in methods if not results.has(dataset, method, seed)]
        if not wanted:
            continue
        trial = Trial(dataset, seed, settings, work)
        for method in wanted:
            row = {"dataset": dataset, "method": method, "split": "test", "seed": seed, **trial.row(method)}
            results.add(row)
            print(json.dumps(row), flush=True)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps on few pairs, in a folder that is deleted")
    parser.add_argument("--datasets", type=names_of(DATASETS), help="default: all; icd9 with --quick")
    parser.add_argument("--methods", type=names_of(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of every student")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default=Settings.dtype, help="of the students' blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build") / "quality", help="models, scores and checkpoints")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="file of the rows")
    arguments = parser.parse_args()
    datasets = arguments.datasets or (["icd9"] if arguments.quick else list(DATASETS))
    with tempfile.TemporaryDirectory() as scratch:
        settings, work, path = QUICK, Path(scratch), Path(scratch) / "quality.json"
        if not arguments.quick:
            settings = Settings(steps=arguments.steps, dtype=arguments.dtype)
            work, path = arguments.work.resolve(), arguments.results
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        results = Results(path, settings)
        try:
            with FileLock(work / "lock", timeout=0):
                run(datasets, arguments.methods, arguments.seed, settings, work, results)
        except Timeout:
            raise SystemExit(f"another run works in {work}; trainings run one at a time") from None
    figures = [row[name] for row in results.rows for name in ("f1", "auc", "ap")]
    correct = bool(figures) and all(0.0 <= value <= 1.0 for value in figures)
    report("quality", results.rows, ratios(results.rows), correct)


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(value: str) -> list[str]:
        names = value.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    main()
