"""One data set and seed of ``benchmarks.quality``: trains what a method needs, and scores the pairs with it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.quality_methods import STUDENTS, TEACHERS, Student
from benchmarks.quality_scores import (
    Score,
    answers,
    block_parameters,
    cosines,
    cross_scores,
    encode_with,
    parameters_run,
    saved_parameters,
)
from benchmarks.quality_sets import (
    DATASETS,
    Encode,
    read_pairs,
    some_groups,
    some_pairs,
    unlabelled_pairs,
    with_nearest,
)
from benchmarks.quality_teachers import fine_tune_cross_encoder
from benchmarks.splink_model import splink_scores
from flipkd import teach
from flipkd.assets import minilm_folder, smollm2_folder
from flipkd.config import EncoderOptions, RunOptions, TeachConfig
from flipkd.demo.evaluation import quality, string_similarity
from flipkd.demo.pair_sets import PairSplits, write_pairs
from flipkd.demo.teacher import FineTuning, fine_tune_teacher
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.models.options import StudentOptions
from flipkd.run.units import fingerprint


@dataclass(frozen=True)
class Settings:
    """What decides a row besides data set, method and seed. Rows of different settings do not share a file.

    Args:
        steps: of each student.
        teacher_steps: of the teacher's fine-tuning.
        batch_pairs: pairs in a step, of teacher and students.
        layer: k; None for the default.
        dtype: what the students' blocks compute in.
        device: ``cpu`` or ``cuda``.
        pairs: of each split, the first ones; None for all.
        options: of ``StudentOptions`` (``student``), ``LossOptions`` (``loss``) and ``TrainConfig`` (``train``), in
            place of the defaults, where a method does not say otherwise.
        negatives: which ones the data sets hold; to be changed when they change.
    """

    steps: int = 600
    teacher_steps: int = 400
    batch_pairs: int = 64
    layer: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    pairs: int | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    negatives: str = "siblings or similar names, and nearest neighbours"


@dataclass(frozen=True)
class Method:
    """A method that is ready to score.

    Args:
        score: pairs to scores, higher for a match.
        steps, seconds: of its training.
        parameters: that are run for each text (or, for a decoder's answer, each pair); embeddings are not counted.
    """

    score: Score
    steps: int = 0
    seconds: float = 0.0
    parameters: int = 0


def pairs_folder(work: Path, settings: Settings) -> Path:
    """Where the pairs of all data sets lie, in a folder each: ``train.parquet``, and so on."""
    return work / f"pairs-{fingerprint({'pairs': settings.pairs, 'negatives': settings.negatives})[:8]}"


class Trial:
    """What several methods need is made once, on disk too: several processes may work on one trial.

    Args:
        dataset: a name of ``DATASETS``.
        seed: of the trainings.
        settings: of the trainings.
        work: folder for models and scores.
        labels: share of the groups of the training split whose labels are known.
        threads: CPU threads; None for all.
    """

    def __init__(
        self, dataset: str, seed: int, settings: Settings, work: Path, labels: float = 1.0, threads: int | None = None
    ) -> None:
        self._data, self._seed, self._settings, self._labels = DATASETS[dataset], seed, settings, labels
        self._trained_on = self._data.trained_on or dataset
        self._dataset, self._root, self._sets = dataset, work, pairs_folder(work, settings)
        kind = fingerprint(asdict(settings))[:8]
        self._work = work / f"{self._trained_on}-labels-{labels:g}-seed-{seed}-{kind}"
        self._run = RunOptions(progress=threads is None, threads=threads)

    def row(self, method: str, split: str = "test") -> dict[str, Any]:
        """``f1, auc, ap, seconds, steps, texts_per_second, parameters`` of a method.

        On the validation split the threshold is chosen on the pairs that it is tried on.
        """
        ready, splits = self._prepared(method), self._splits
        tried = getattr(splits, split)
        validation = ready.score(splits.validation)
        started = time.perf_counter()
        scores = ready.score(tried)
        seconds = time.perf_counter() - started
        found = quality(splits.validation.label, validation, tried.label, scores)
        texts = len({*tried.left_text, *tried.right_text})
        return {
            **{name: round(getattr(found, name), 5) for name in ("f1", "auc", "ap")},
            "seconds": round(ready.seconds + seconds, 2),
            "steps": ready.steps,
            "texts_per_second": round(texts / seconds, 1),
            "parameters": ready.parameters,
        }

    def prepare(self, unlabelled: bool = False) -> None:
        """Makes the pairs of the data set, as far as they are not there; no model is trained."""
        _ = self._splits, self._training
        if unlabelled:
            self._unlabelled_pairs()

    @cached_property
    def _splits(self) -> PairSplits:
        return self._read_splits(self._dataset)

    @cached_property
    def _training(self) -> PairSplits:
        """Those that the models learn from: the data set's own, unless it is tested out of domain."""
        splits = self._splits if self._data.trained_on is None else self._read_splits(self._trained_on)
        return replace(splits, train=some_groups(splits.train, self._labels))

    def _read_splits(self, dataset: str) -> PairSplits:
        """With nearest neighbours among the negatives."""
        folder, count = self._sets / dataset, self._settings.pairs
        names = ("train", "validation", "test")
        with FileLock(_beside(folder)):
            if not (folder / "test.parquet").exists():
                splits, encode = DATASETS[dataset].splits(), self._minilm()
                for name in names:
                    part = getattr(splits, name)
                    part = part if count is None else some_pairs(part, count)
                    write_pairs(with_nearest(part, encode), folder / f"{name}.parquet")
        return PairSplits(*(read_pairs(folder / f"{name}.parquet") for name in names))

    def _unlabelled_pairs(self) -> Path:
        """One choice for all seeds; the texts of all training pairs are among them, whoever knows their labels."""
        folder = self._sets / f"{self._trained_on}-unlabelled"
        path = folder / "part-0.parquet"
        with FileLock(_beside(folder)):
            if not path.exists():
                texts, splits = DATASETS[self._trained_on].unlabelled_texts(), self._read_splits(self._trained_on)
                pairs = unlabelled_pairs(texts, splits, self._minilm(), seed=0)
                write_pairs(pairs if self._settings.pairs is None else pairs.first(self._settings.pairs), path)
        return folder

    def _minilm(self) -> Encode:
        return encode_with(minilm_folder(), self._settings.device)

    def _prepared(self, method: str) -> Method:
        if method == "token_set_ratio":
            return Method(string_similarity)
        if method == "splink":
            started = time.perf_counter()
            score = splink_scores(self._training.train, self._data.columns, self._seed, self._run.threads)
            return Method(score, seconds=time.perf_counter() - started)
        if method == "minilm":
            return self._small(minilm_folder())
        if method in TEACHERS:
            kind = "encoder" if method == "teacher" else method.split("_")[0]
            folder, seconds = self._teacher(kind)
            if kind == "cross":
                score = cross_scores(folder, self._settings.device)
                ready = Method(score, parameters=saved_parameters(folder))
            else:
                ready = self._small(folder)
            return replace(ready, seconds=seconds, steps=self._settings.teacher_steps)
        from flipkd.models.adapter import load_student

        if method == "untrained":
            student = self._untrained()
            return Method(cosines(student.encode), parameters=parameters_run(student))
        wanted = STUDENTS[method]
        summary = self._train(wanted.run or method, wanted)
        trained: dict[str, Any] = {"steps": summary["steps"], "seconds": summary["seconds"]}
        student = load_student(Path(summary["output"]) / "adapter", device=self._settings.device)
        if wanted.answers:
            score = answers(summary["output"], self._settings.device)
            return Method(score, parameters=block_parameters(student), **trained)
        return Method(cosines(student.encode), parameters=parameters_run(student), **trained)

    def _small(self, folder: Path) -> Method:
        return Method(cosines(encode_with(folder, self._settings.device)), parameters=saved_parameters(folder))

    def _untrained(self) -> Any:
        from flipkd.distill.gradients import Workers
        from flipkd.distill.whitening import whiten_projection
        from flipkd.models.adapter import new_student

        student = new_student(self._student(), self._settings.device, self._seed)
        train = self._training.train
        ids = student.tokenize(list(dict.fromkeys([*train.left_text, *train.right_text]))).ids
        whiten_projection(student, ids, Workers(), TrainConfig.max_tokens, self._seed)
        return student

    def _student(self, **changed: Any) -> StudentOptions:
        settings = self._settings
        values = {"layer": settings.layer, "dtype": settings.dtype, **settings.options.get("student", {}), **changed}
        return StudentOptions(str(smollm2_folder()), **values)

    def _teacher(self, kind: str = "encoder") -> tuple[Path, float]:
        """Folder of a fine-tuned teacher, and seconds of its training."""
        settings = self._settings
        if kind == "weak":
            few = Trial(self._trained_on, self._seed, settings, self._root, 0.1 * self._labels, self._run.threads)
            return few._teacher()
        options = FineTuning(
            settings.teacher_steps,
            settings.batch_pairs,
            seed=self._seed,
            dtype="bf16" if settings.device == "cuda" else "float32",  # on CPUs rows of several machines stand together
        )
        output = self._work / f"teacher-{kind}"
        with FileLock(_beside(self._work / "pairs")):
            for name in ("train", "validation"):
                write_pairs(getattr(self._training, name), self._work / "pairs" / name / "part-0.parquet")
        pairs = self._work / "pairs" / "train"
        with FileLock(_beside(output)):
            if kind == "cross":
                found = fine_tune_cross_encoder(minilm_folder(), pairs, output, options)
            else:
                found = fine_tune_teacher(minilm_folder(), pairs, output, options, progress=self._run.progress)
        return output, found["seconds"]

    def _teach(self, pairs: Path, kind: str) -> Path:
        """The teacher's scores of some pairs, and its vectors if it has any."""
        teacher = EncoderOptions(str(self._teacher(kind)[0]), device=self._settings.device)
        output = self._work / f"teacher-{kind}-scores" / pairs.name
        with FileLock(_beside(output)):
            teach(TeachConfig(teacher, str(pairs), str(output), run=self._run))
        return output

    def _train(self, run: str, student: Student) -> dict[str, Any]:
        from flipkd.distill.train import train

        settings, pairs = self._settings, self._work / "pairs"
        unlabelled = str(self._teach(self._unlabelled_pairs(), student.teacher)) if student.unlabelled else None
        values = {
            "steps": settings.steps,
            "batch_pairs": settings.batch_pairs,
            "unlabelled_batch_pairs": settings.batch_pairs,
            **settings.options.get("train", {}),
            **student.train,
        }
        usual, own = LossOptions(), student.loss
        changed = settings.options.get("loss", {})
        loss = replace(own, **{name: v for name, v in changed.items() if getattr(own, name) == getattr(usual, name)})
        config = TrainConfig(
            pairs=str(self._teach(pairs / "train", student.teacher)),
            validation=str(self._teach(pairs / "validation", student.teacher)),
            unlabelled=unlabelled,
            output=str(self._work / "runs" / run),
            student=self._student(whole_tower=loss.trains_language_model, **student.student),
            loss=loss,
            evaluate_every=max(1, values["steps"] // 6),
            checkpoint_every=max(1, values["steps"] // 3),
            seed=self._seed,
            device=settings.device,
            run=self._run,
            **values,
        )
        with FileLock(_beside(Path(config.output))):
            return train(config)


def _beside(path: Path) -> Path:
    """The lock of what is made at ``path``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.making")
