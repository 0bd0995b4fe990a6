"""Does the method work? Scores of every method against labels, on splits in which nothing leaks.

    python -m benchmarks.quality [--quick] [--datasets icd9,sec_names] [--methods flip,cosent] [--seeds 0,1,2]
                                 [--labels 1,0.1] [--split test] [--steps N] [--teacher-steps N] [--batch-pairs N]
                                 [--dtype bf16] [--options JSON] [--device cuda] [--jobs N] [--work FOLDER]
                                 [--results FILE]

The data sets stand in ``benchmarks.quality_sets``. The split is the same for every seed.

- *token_set_ratio*: rapidfuzz, no model.
- *splink*: probabilistic record linkage, of sets with more than one column alone.
- *minilm*: all-MiniLM-L6-v2 as it is.
- *teacher*: the same, fine-tuned on the training pairs by sentence-transformers' trainer.
- *weak_teacher*: the same with a tenth of the labels. *cross_encoder*: MiniLM with a head that reads both texts.
- *untrained*: SmolLM2's lower blocks and A where every student starts: the whitening of training texts.
- *lm*: all of SmolLM2, its LoRA trained on the language model's loss alone; its answer is the score.
- *cosent*, *cosent_infonce*: the student, trained on labels alone, without and with in-batch negatives.
- *margin_mse*, *kl*: the student, trained by a plain distillation loss.
- *flip*: the student, trained by flipped distillation from the teacher's scores and vectors, and the labels.
- *flip_without_mcl*, *_dist*, *_infonce*, *_filter*: the same without one part of the loss.
- *flip_unlabelled*: flip, with as many unlabelled pairs beside the labelled ones in every batch; also
  *flip_unlabelled_without_infonce*.
- *flip_weak_teacher*, *flip_cross_encoder*: flip from those teachers.
- *flip_lm*: flip with the language model's loss (all blocks are trained); *flip_decoder*: the answer of that run.
- *sweep* stands for flip with one option changed, each in turn: to choose options, with ``--split validation``.

SmolLM2's weights are dequantised 4-bit weights. All students have the same base, options, batches, steps and learning
rate (the trainer's defaults, which were chosen for flip), and each keeps its checkpoint with the best validation AUC.

``--labels 0.1`` knows the labels of a tenth of the training groups alone; the unlabelled pairs still hold the texts of
all. ``--jobs`` trainings run at a time: one for a CPU, several for a GPU that a small model cannot fill.

A row is ``dataset, method, split, seed, labels, f1, auc, ap, seconds, steps, texts_per_second, parameters``: F1 on the
test pairs at the threshold that is best on the validation pairs, area under the ROC curve, average precision; seconds
of training plus scoring the test pairs; distinct texts of the test pairs over the seconds of scoring them; parameters
that are run for a text (a decoder's answer: for a pair), embeddings not counted. Each row is written to ``--results``
as soon as it is there, and one that is there is not computed again; a file with rows of other settings is refused (the
one that is committed holds 300 steps, ``--dtype bf16``). Ratios (above 1: flip is better) are of means over data sets
and seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from benchmarks.common import machine, report, versions
from benchmarks.quality_methods import METHODS, SEEDED, STUDENTS, SWEPT, TEACHERS
from benchmarks.quality_sets import DATASETS
from benchmarks.quality_trial import Settings, Trial

_COMPARED = tuple(method for method in METHODS if method != "flip")
_RESULTS = Path(__file__).parent / "results" / "quality.json"


class Task(NamedTuple):
    """What a row is of."""

    dataset: str
    method: str
    split: str
    seed: int
    labels: float


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

    def has(self, task: Task) -> bool:
        """Whether the row is there."""
        return any(task._asdict().items() <= row.items() for row in self.rows)

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
                method: {
                    (row["dataset"], row["split"], row["seed"], row["labels"]): row[figure]
                    for row in rows
                    if row["method"] == method
                }
                for method in ("flip", other)
            }
            both = values["flip"].keys() & values[other].keys()
            if both:
                means = [statistics.mean(values[method][key] for key in both) for method in ("flip", other)]
                found[f"flip_over_{other}_{figure}"] = round(means[0] / means[1], 4)
    return found


def run(tasks: Sequence[Task], settings: Settings, work: Path, results: Results, jobs: int = 1) -> list[str]:
    """Computes the rows that are missing, ``jobs`` at a time; returns what failed, each with its reason."""
    wanted = [task for task in tasks if not results.has(task)]
    # Teachers first, which others wait for; then what is run with every seed, then the rest, in the order in which they
    # were named. A set that others' models are tried on comes after those sets.
    named = list(dict.fromkeys(task.method for task in tasks))
    wanted.sort(
        key=lambda task: (
            task.method not in TEACHERS,
            task.method not in SEEDED,
            named.index(task.method),
            DATASETS[task.dataset].trained_on is not None,
        )
    )
    if jobs == 1:
        for task in wanted:
            results.add(_row(task, settings, work, None))
            print(json.dumps(results.rows[-1]), flush=True)
        return []
    failed = []
    for dataset in dict.fromkeys(task.dataset for task in wanted):  # on an idle machine, before there are many at work
        Trial(dataset, 0, settings, work).prepare(any("unlabelled" in task.method for task in wanted))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        found = {pool.submit(_row, task, settings, work, 1): task for task in wanted}
        for done in as_completed(found):
            try:
                results.add(done.result())
            except Exception as error:  # the other rows are still worth having
                failed.append(f"{found[done]}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
            else:
                print(json.dumps(results.rows[-1]), flush=True)
    return failed


def _row(task: Task, settings: Settings, work: Path, threads: int | None) -> dict[str, Any]:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)  # the teacher's trainer would take all cores, beside the other rows' trainings
    trial = Trial(task.dataset, task.seed, settings, work, task.labels, threads)
    return {**task._asdict(), **trial.row(task.method, task.split)}


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps on few pairs, in a folder that is deleted")
    parser.add_argument("--datasets", type=names_of(DATASETS), help="default: all; icd9 with --quick")
    known = {"sweep": list(SWEPT), **{name: [name] for name in STUDENTS}, **{name: [name] for name in METHODS}}
    parser.add_argument("--methods", type=names_of(known), default=list(METHODS))
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of every student")
    parser.add_argument("--teacher-steps", type=int, default=Settings.teacher_steps)
    parser.add_argument("--batch-pairs", type=int, default=Settings.batch_pairs, help="of teachers and students")
    parser.add_argument("--options", type=json.loads, default={}, help="""as in '{"student": {"layer": 10}}'""")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default=Settings.dtype, help="of the students' blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Settings.device)
    parser.add_argument(
        "--seeds",
        type=lambda value: [int(seed) for seed in value.split(",")],
        default=[0],
        help=f"of {', '.join(SEEDED)}; the others take the first",
    )
    parser.add_argument("--labels", type=lambda value: [float(share) for share in value.split(",")], default=[1.0])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, default=Path("build") / "quality", help="models, scores and checkpoints")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="file of the rows")
    arguments = parser.parse_args()
    datasets = arguments.datasets or (["icd9"] if arguments.quick else list(DATASETS))
    methods = [method for name in arguments.methods for method in known[name]]
    tasks = [
        Task(dataset, method, arguments.split, seed, labels)
        for method in methods
        for labels in arguments.labels
        for seed in (arguments.seeds if method in SEEDED else arguments.seeds[:1])
        for dataset in datasets
        if method != "splink" or DATASETS[dataset].columns
    ]
    with tempfile.TemporaryDirectory() as scratch:
        settings, work, path = replace(QUICK, device=arguments.device), Path(scratch), Path(scratch) / "quality.json"
        if not arguments.quick:
            names = ("steps", "teacher_steps", "batch_pairs", "dtype", "device", "options")
            settings = Settings(**{name: getattr(arguments, name) for name in names})
            work, path = arguments.work.resolve(), arguments.results
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        results = Results(path, settings)
        try:
            with FileLock(work / "lock", timeout=0):
                failed = run(tasks, settings, work, results, arguments.jobs)
        except Timeout:
            raise SystemExit(f"another run works in {work}") from None
    figures = [row[name] for row in results.rows for name in ("f1", "auc", "ap")]
    correct = not failed and bool(figures) and all(0.0 <= value <= 1.0 for value in figures)
    report("quality", summary(results.rows), ratios(results.rows), correct)
    if failed:
        raise SystemExit("\n".join(["rows that failed:", *failed]))


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per data set, method and share of labels: means over the seeds, and F1's spread (largest - smallest)."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["split"], row["labels"], row["method"]), []).append(row)
    lines = []
    for (dataset, split, labels, method), found in groups.items():
        line = {"dataset": dataset, "split": split, "labels": labels, "method": method, "seeds": len(found)}
        for name in ("f1", "auc", "ap", "seconds", "texts_per_second"):
            line[name] = round(statistics.mean(row[name] for row in found), 4)
        f1 = [row["f1"] for row in found]
        lines.append({**line, "f1_spread": round(max(f1) - min(f1), 4), "parameters": found[0]["parameters"]})
    return lines


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
