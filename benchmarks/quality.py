"""Does the method work? Scores of every method against labels, on splits in which nothing leaks.

    python -m benchmarks.quality [--quick] [--datasets icd9,sec_names] [--methods flip,cosent] [--steps N] [--seed N]
                                 [--work FOLDER] [--results FILE]

Data sets (``flipkd.demo.pair_sets``, ``flipkd.demo.names``): long and short descriptions of ICD-9-CM codes, split by
category; company names of two lists, split by company. The split is the same for every seed.

- *token_set_ratio*: rapidfuzz, no model.
- *minilm*: all-MiniLM-L6-v2 as it is.
- *teacher*: the same, fine-tuned on the training pairs by sentence-transformers' trainer.
- *untrained*: SmolLM2's lower blocks and A where every student starts: the whitening of training texts.
- *cosent*: the student, trained on labels alone.
- *flip*: the student, trained by flipped distillation from the teacher's scores and vectors, and the labels.
- *flip_without_mcl*, *flip_without_dist*: the same without one part of the loss.

SmolLM2's weights are dequantised 4-bit weights. All students have the same base, options, batches, steps and learning
rate (the trainer's defaults, which were chosen for flip), and each keeps its checkpoint with the best validation AUC.

A row is ``dataset, method, split, seed, f1, auc, ap, seconds, steps``: F1 on the test pairs at the threshold that is
best on the validation pairs, area under the ROC curve, average precision; seconds of training plus scoring the test
pairs. Each row is written as soon as it is there, and one that is there is not computed again. Ratios (above 1: flip is
better) are of means over data sets and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from benchmarks.common import machine, report, versions
from flipkd import teach
from flipkd.assets import minilm_folder, smollm2_folder
from flipkd.config import EncoderOptions, RunOptions, TeachConfig
from flipkd.demo.evaluation import quality, string_similarity
from flipkd.demo.names import sec_name_pairs
from flipkd.demo.pair_sets import PairSet, PairSplits, icd9_pairs, write_pairs
from flipkd.demo.teacher import FineTuning, fine_tune_teacher
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.models.options import StudentOptions

Encode = Callable[[list[str]], npt.NDArray[Any]]

DATASETS: dict[str, Callable[[], PairSplits]] = {"icd9": icd9_pairs, "sec_names": sec_name_pairs}
LOSSES = {
    "cosent": LossOptions(objective="cosent"),
    "flip": LossOptions(),
    "flip_without_mcl": LossOptions(weight_mcl=0.0),
    "flip_without_dist": LossOptions(weight_pairs=0.0, weight_matrix=0.0),
}
METHODS = ("token_set_ratio", "minilm", "teacher", "untrained", *LOSSES)
_COMPARED = ("cosent", "flip_without_mcl", "flip_without_dist", "untrained", "teacher", "minilm", "token_set_ratio")
_RESULTS = Path(__file__).parent / "results" / "quality.json"


@dataclass(frozen=True)
class Settings:
    """What decides a row besides data set, method and seed. Rows of different settings do not share a file.

    Args:
        steps: of each student.
        teacher_steps: of the teacher's fine-tuning.
        batch_pairs: pairs in a step, of teacher and students.
        layer: k; None for the default.
        dtype: what the students' blocks compute in.
        pairs: of each split, the first ones; None for all.
    """

    steps: int = 600
    teacher_steps: int = 400
    batch_pairs: int = 64
    layer: int | None = None
    dtype: str = "float32"
    pairs: int | None = None


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


class Trial:
    """One data set and seed: what several methods need is made once.

    Args:
        dataset: a name of ``DATASETS``.
        seed: of the trainings.
        settings: of the trainings.
        work: folder for models and scores.
    """

    def __init__(self, dataset: str, seed: int, settings: Settings, work: Path) -> None:
        self._seed, self._settings = seed, settings
        steps = f"{settings.teacher_steps}-{settings.steps}-{settings.dtype}"
        self._work = work / f"{dataset}-seed-{seed}-steps-{steps}"
        splits = DATASETS[dataset]()
        count = settings.pairs
        self._splits = splits if count is None else PairSplits(*(some_pairs(each, count) for each in _each(splits)))
        self._run = RunOptions(progress=True)

    def row(self, method: str) -> dict[str, Any]:
        """``f1, auc, ap, seconds, steps`` of a method."""
        steps, seconds, score = self._prepared(method)
        validation = score(self._splits.validation)
        started = time.perf_counter()
        test = score(self._splits.test)
        seconds += time.perf_counter() - started
        found = quality(self._splits.validation.label, validation, self._splits.test.label, test)
        figures = {name: round(getattr(found, name), 5) for name in ("f1", "auc", "ap")}
        return {**figures, "seconds": round(seconds, 2), "steps": steps}

    def _prepared(self, method: str) -> tuple[int, float, Callable[[PairSet], npt.NDArray[Any]]]:
        """Steps and seconds of a method's training, and the function that scores pairs."""
        if method == "token_set_ratio":
            return 0, 0.0, string_similarity
        if method == "minilm":
            return 0, 0.0, _cosines(_encoder(minilm_folder()))
        if method == "teacher":
            seconds = self._teacher()["seconds"]
            return self._settings.teacher_steps, seconds, _cosines(_encoder(self._work / "teacher"))
        from flipkd.distill.gradients import Workers
        from flipkd.distill.start import whiten_projection
        from flipkd.models.adapter import load_student, new_student

        if method == "untrained":
            student = new_student(self._student(), seed=self._seed)
            train = self._splits.train
            ids = student.tokenize(list(dict.fromkeys([*train.left_text, *train.right_text]))).ids
            whiten_projection(student, ids, Workers(), TrainConfig.max_tokens, self._seed)
            return 0, 0.0, _cosines(student.encode)
        summary = self._train(method)
        student = load_student(Path(summary["output"]) / "adapter")
        return self._settings.steps, summary["seconds"], _cosines(student.encode)

    def _student(self) -> StudentOptions:
        dtype: Any = self._settings.dtype
        return StudentOptions(str(smollm2_folder()), layer=self._settings.layer, dtype=dtype)

    def _pairs(self) -> Path:
        folder = self._work / "pairs"
        for name in ("train", "validation"):
            write_pairs(getattr(self._splits, name), folder / name / "part-0.parquet")
        return folder

    def _teacher(self) -> dict[str, Any]:
        settings = self._settings
        options = FineTuning(steps=settings.teacher_steps, batch_size=settings.batch_pairs, seed=self._seed)
        pairs = self._pairs() / "train"
        return fine_tune_teacher(minilm_folder(), pairs, self._work / "teacher", options, progress=True)

    def _scores(self) -> Path:
        self._teacher()
        teacher, scores = EncoderOptions(str(self._work / "teacher")), self._work / "teacher_scores"
        for name in ("train", "validation"):
            pairs, output = str(self._pairs() / name), str(scores / name)
            teach(TeachConfig(teacher=teacher, pairs=pairs, output=output, run=self._run))
        return scores

    def _train(self, method: str) -> dict[str, Any]:
        from flipkd.distill.train import train

        scores, steps = self._scores(), self._settings.steps
        return train(
            TrainConfig(
                pairs=str(scores / "train"),
                validation=str(scores / "validation"),
                output=str(self._work / "runs" / method),
                student=self._student(),
                loss=LOSSES[method],
                steps=steps,
                batch_pairs=self._settings.batch_pairs,
                evaluate_every=max(1, steps // 6),
                checkpoint_every=max(1, steps // 12),
                seed=self._seed,
                device="cpu",
                run=self._run,
            )
        )


def _each(splits: PairSplits) -> tuple[PairSet, PairSet, PairSet]:
    return splits.train, splits.validation, splits.test


def some_pairs(pairs: PairSet, count: int) -> PairSet:
    """Some pairs of both classes, whatever their order."""
    return pairs.take(np.random.default_rng(0).permutation(len(pairs))[:count])


def _encoder(folder: Path) -> Encode:
    from flipkd.models.encoder import load_encoder

    return load_encoder(folder).encode


def _cosines(encode: Encode) -> Callable[[PairSet], npt.NDArray[Any]]:
    """Scores pairs by the cosine of their texts' unit vectors; each distinct text is encoded once."""

    def score(pairs: PairSet) -> npt.NDArray[Any]:
        texts = list(dict.fromkeys([*pairs.left_text, *pairs.right_text]))
        vectors, places = encode(texts), {text: place for place, text in enumerate(texts)}
        left, right = ([places[text] for text in side] for side in (pairs.left_text, pairs.right_text))
        scores: npt.NDArray[Any] = np.einsum("pd,pd->p", vectors[left], vectors[right])
        return scores

    return score


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
