"""One data set and seed of ``benchmarks.quality``: trains what a method needs, and scores the pairs with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality_sets import DATASETS, Encode, unlabelled_pairs, with_nearest
from flipkd import teach
from flipkd.assets import minilm_folder, smollm2_folder
from flipkd.config import EncoderOptions, RunOptions, TeachConfig
from flipkd.demo.evaluation import quality, string_similarity
from flipkd.demo.pair_sets import PairSet, PairSplits, write_pairs
from flipkd.demo.teacher import FineTuning, fine_tune_teacher
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.models.options import StudentOptions

Scores = npt.NDArray[Any]
Score = Callable[[PairSet], Scores]


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
        negatives: which ones the data sets hold; to be changed when they change.
    """

    steps: int = 600
    teacher_steps: int = 400
    batch_pairs: int = 64
    layer: int | None = None
    dtype: str = "float32"
    pairs: int | None = None
    negatives: str = "siblings or similar names, and nearest neighbours"


@dataclass(frozen=True)
class Student:
    """How a student is trained.

    Args:
        loss: what is minimised.
        unlabelled: whether unlabelled pairs stand beside the labelled ones in every batch.
        answers: whether the decoder's answer is the score, in place of the encoder's cosine.
        run: the training it shares with another row; None for its own.
    """

    loss: LossOptions = field(default_factory=LossOptions)
    unlabelled: bool = False
    answers: bool = False
    run: str | None = None


_WITH_LM = LossOptions(weight_lm=0.1)
STUDENTS = {
    "lm": Student(LossOptions(objective="lm"), answers=True),
    "cosent": Student(LossOptions(objective="cosent")),
    "margin_mse": Student(LossOptions(objective="margin_mse")),
    "kl": Student(LossOptions(objective="kl")),
    "flip": Student(),
    "flip_without_mcl": Student(LossOptions(weight_mcl=0.0)),
    "flip_without_dist": Student(LossOptions(weight_pairs=0.0, weight_matrix=0.0)),
    "flip_without_filter": Student(LossOptions(positive_threshold=-np.inf, negative_threshold=np.inf)),
    "flip_unlabelled": Student(unlabelled=True),
    "flip_lm": Student(_WITH_LM),
    "flip_decoder": Student(_WITH_LM, answers=True, run="flip_lm"),
}
METHODS = ("token_set_ratio", "minilm", "teacher", "untrained", *STUDENTS)


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


class Trial:
    """What several methods need is made once.

    Args:
        dataset: a name of ``DATASETS``.
        seed: of the trainings.
        settings: of the trainings.
        work: folder for models and scores.
    """

    def __init__(self, dataset: str, seed: int, settings: Settings, work: Path) -> None:
        self._data, self._seed, self._settings = DATASETS[dataset], seed, settings
        self._trained_on = self._data.trained_on or dataset
        steps = f"{settings.teacher_steps}-{settings.steps}-{settings.dtype}"
        self._work = work / f"{self._trained_on}-seed-{seed}-steps-{steps}"
        self._run = RunOptions(progress=True)

    def row(self, method: str) -> dict[str, Any]:
        """``f1, auc, ap, seconds, steps, texts_per_second, parameters`` of a method."""
        ready, splits = self._prepared(method), self._splits
        validation = ready.score(splits.validation)
        started = time.perf_counter()
        test = ready.score(splits.test)
        seconds = time.perf_counter() - started
        found = quality(splits.validation.label, validation, splits.test.label, test)
        texts = len({*splits.test.left_text, *splits.test.right_text})
        return {
            **{name: round(getattr(found, name), 5) for name in ("f1", "auc", "ap")},
            "seconds": round(ready.seconds + seconds, 2),
            "steps": ready.steps,
            "texts_per_second": round(texts / seconds, 1),
            "parameters": ready.parameters,
        }

    @cached_property
    def _splits(self) -> PairSplits:
        """With nearest neighbours among the negatives."""
        encode = _encoder(minilm_folder())
        splits, count = self._data.splits(), self._settings.pairs
        if count is not None:
            splits = PairSplits(*(some_pairs(each, count) for each in _each(splits)))
        return PairSplits(*(with_nearest(each, encode) for each in _each(splits)))

    @cached_property
    def _training(self) -> PairSplits:
        """Those that the models learned from: the data set's own, unless it is tested out of domain."""
        if self._data.trained_on is None:
            return self._splits
        return Trial(self._trained_on, self._seed, self._settings, self._work.parent)._splits

    def _prepared(self, method: str) -> Method:
        if method == "token_set_ratio":
            return Method(string_similarity)
        if method == "minilm":
            return self._small(minilm_folder())
        if method == "teacher":
            seconds = self._teacher()["seconds"]
            return replace(self._small(self._work / "teacher"), steps=self._settings.teacher_steps, seconds=seconds)
        from flipkd.models.adapter import load_student

        if method == "untrained":
            student = self._untrained()
            return Method(_cosines(student.encode), parameters=parameters_run(student))
        wanted = STUDENTS[method]
        summary = self._train(wanted.run or method, wanted)
        trained: dict[str, Any] = {"steps": self._settings.steps, "seconds": summary["seconds"]}
        student = load_student(Path(summary["output"]) / "adapter")
        if wanted.answers:
            return Method(_answers(summary["output"]), parameters=_block_parameters(student), **trained)
        return Method(_cosines(student.encode), parameters=parameters_run(student), **trained)

    def _small(self, folder: Path) -> Method:
        from flipkd.models.encoder import load_encoder

        return Method(_cosines(load_encoder(folder).encode), parameters=_saved_parameters(folder))

    def _untrained(self) -> Any:
        from flipkd.distill.gradients import Workers
        from flipkd.distill.start import whiten_projection
        from flipkd.models.adapter import new_student

        student = new_student(self._student(), seed=self._seed)
        train = self._training.train
        ids = student.tokenize(list(dict.fromkeys([*train.left_text, *train.right_text]))).ids
        whiten_projection(student, ids, Workers(), TrainConfig.max_tokens, self._seed)
        return student

    def _student(self, whole_tower: bool = False) -> StudentOptions:
        settings: Any = self._settings
        return StudentOptions(
            str(smollm2_folder()), layer=settings.layer, dtype=settings.dtype, whole_tower=whole_tower
        )

    def _pairs(self) -> Path:
        folder = self._work / "pairs"
        for name in ("train", "validation"):
            write_pairs(getattr(self._training, name), folder / name / "part-0.parquet")
        return folder

    def _unlabelled(self) -> Path:
        """Scored by the teacher."""
        data = DATASETS[self._trained_on]
        pairs = unlabelled_pairs(data.unlabelled_texts(), self._training, _encoder(minilm_folder()), self._seed)
        path = self._work / "pairs" / "unlabelled" / "part-0.parquet"
        write_pairs(pairs if self._settings.pairs is None else pairs.first(self._settings.pairs), path)
        return self._teach("unlabelled")

    def _teacher(self) -> dict[str, Any]:
        settings = self._settings
        options = FineTuning(steps=settings.teacher_steps, batch_size=settings.batch_pairs, seed=self._seed)
        pairs = self._pairs() / "train"
        return fine_tune_teacher(minilm_folder(), pairs, self._work / "teacher", options, progress=True)

    def _teach(self, name: str) -> Path:
        self._teacher()
        teacher, output = EncoderOptions(str(self._work / "teacher")), self._work / "teacher_scores" / name
        teach(TeachConfig(teacher, str(self._work / "pairs" / name), str(output), run=self._run))
        return output

    def _train(self, run: str, student: Student) -> dict[str, Any]:
        from flipkd.distill.train import train

        steps = self._settings.steps
        return train(
            TrainConfig(
                pairs=str(self._teach("train")),
                validation=str(self._teach("validation")),
                unlabelled=str(self._unlabelled()) if student.unlabelled else None,
                output=str(self._work / "runs" / run),
                student=self._student(student.loss.trains_language_model),
                loss=student.loss,
                steps=steps,
                batch_pairs=self._settings.batch_pairs,
                unlabelled_batch_pairs=self._settings.batch_pairs,
                evaluate_every=max(1, steps // 6),
                checkpoint_every=max(1, steps // 12),
                seed=self._seed,
                device="cpu",
                run=self._run,
            )
        )


def parameters_run(student: Any) -> int:
    """Weights that are run for a text: those of blocks 0..k-1 (LoRA merged) and A."""
    return _block_parameters(student, student.layer) + int(student.projection.numel())


def _block_parameters(student: Any, layers: int | None = None) -> int:
    blocks = list(student.decoder.layers)[:layers]
    named = (each for block in blocks for each in block.named_parameters())
    return sum(weight.numel() for name, weight in named if "lora_" not in name)


def _saved_parameters(folder: Path) -> int:
    """Weights of a saved BERT, but for its embeddings."""
    from safetensors import safe_open

    with safe_open(next(folder.rglob("model.safetensors")), "np") as file:
        names = [name for name in file.keys() if "embeddings" not in name]  # noqa: SIM118
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)


def _each(splits: PairSplits) -> tuple[PairSet, PairSet, PairSet]:
    return splits.train, splits.validation, splits.test


def some_pairs(pairs: PairSet, count: int) -> PairSet:
    """Some pairs of both classes, whatever their order."""
    return pairs.take(np.random.default_rng(0).permutation(len(pairs))[:count])


def _encoder(folder: Path) -> Encode:
    from flipkd.models.encoder import load_encoder

    return load_encoder(folder).encode


def _cosines(encode: Encode) -> Score:
    """Scores pairs by the cosine of their texts' unit vectors; each distinct text is encoded once."""

    def score(pairs: PairSet) -> Scores:
        texts = list(dict.fromkeys([*pairs.left_text, *pairs.right_text]))
        vectors, places = encode(texts), {text: place for place, text in enumerate(texts)}
        left, right = ([places[text] for text in side] for side in (pairs.left_text, pairs.right_text))
        scores: Scores = np.einsum("pd,pd->p", vectors[left], vectors[right])
        return scores

    return score


def _answers(run: str) -> Score:
    """Scores pairs by the decoder's P(match)."""
    from flipkd.models.llm import load_llm
    from flipkd.models.llm_options import LlmOptions

    llm = load_llm(LlmOptions(run, device="cpu"))

    def score(pairs: PairSet) -> Scores:
        return llm.score_pairs(list(pairs.left_text), list(pairs.right_text)).probabilities

    return score
