"""The pairs of a run: labelled ones, unlabelled ones that the teacher scored, and those to validate on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from flipkd.data.teacher_scores import of_one_teacher
from flipkd.distill.config import TrainConfig
from flipkd.distill.training_pairs import TrainingPairs, hold_out, read_training_pairs
from flipkd.errors import ConfigError, InputError
from flipkd.run.units import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What is learned from, and what is validated on.

    Args:
        pairs: with labels, teacher scores, or both.
        unlabelled: with teacher scores, beside them in every batch, without those of ``validation``; None for none.
        validation: held out; None for none.
    """

    pairs: TrainingPairs
    unlabelled: TrainingPairs | None
    validation: TrainingPairs | None


def read_training_data(config: TrainConfig) -> TrainingData:
    """Reads what the options name.

    Raises:
        ConfigError, InputError: see ``read_training_pairs``.
    """
    texts = (config.left_text, config.right_text)
    pairs = read_training_pairs(config.pairs, *texts, config.label_column)
    unlabelled: TrainingPairs | None = None
    validation: TrainingPairs | None
    if config.unlabelled is not None:
        unlabelled = read_training_pairs(config.unlabelled, *texts, ignores_labels=True)
    if config.validation is not None:
        validation = read_training_pairs(config.validation, *texts, config.label_column)
        known = int(np.count_nonzero(validation.is_among(pairs)))
        if known:
            logger.warning(
                "--validation: %d of %d pairs stand in --pairs too, so the student is validated on what it has learned",
                known,
                len(validation),
            )
    else:
        pairs, validation = hold_out(pairs, config.validation_fraction, config.seed)
    if unlabelled is not None and validation is not None:
        unlabelled = _without(unlabelled, validation)
    return TrainingData(pairs, unlabelled, validation)


def _without(unlabelled: TrainingPairs, validation: TrainingPairs) -> TrainingPairs | None:
    """The unlabelled pairs that are not validated on: a night's candidates hold the labelled pairs too."""
    is_held = unlabelled.is_among(validation)
    if not is_held.any():
        return unlabelled
    logger.warning("--unlabelled: pairs left out, since they are validated on: %d", np.count_nonzero(is_held))
    if is_held.all():
        return None
    # A run that trained on them is another one.
    own = fingerprint({"pairs": unlabelled.fingerprint, "without": int(np.count_nonzero(is_held))})
    return replace(unlabelled.subset(np.flatnonzero(~is_held)), fingerprint=own)


def with_unlabelled(pairs: TrainingPairs, more: TrainingPairs) -> TrainingPairs:
    """Both, over the texts of both: the pairs first, then ``more`` with label NaN (where ``pairs`` have labels).

    Raises:
        ConfigError: one of the two has no teacher scores, or only one has teacher vectors.
        InputError: they come from two teachers.
    """
    if pairs.teacher is None or more.teacher is None:
        raise ConfigError("unlabelled pairs need teacher scores in --pairs and --unlabelled: run flipkd-batch teach")
    if not of_one_teacher(pairs.facts, more.facts):
        raise InputError("--pairs and --unlabelled were scored by two teachers; run flipkd-batch teach with one")
    if (pairs.teacher_vectors is None) != (more.teacher_vectors is None):
        raise ConfigError("only one of --pairs and --unlabelled has teacher vectors; run flipkd-batch teach on both")
    places = {text: place for place, text in enumerate(pairs.texts)}
    texts = [text for text in more.texts if text not in places]
    new = np.array([text not in places for text in more.texts], np.bool_)
    places |= {text: place for place, text in enumerate(texts, len(places))}
    moved = np.array([places[text] for text in more.texts], np.int64)
    vectors = None
    if pairs.teacher_vectors is not None and more.teacher_vectors is not None:
        vectors = np.concatenate([pairs.teacher_vectors, more.teacher_vectors[new]])
    labels = pairs.labels
    if labels is not None:
        labels = np.concatenate([labels, np.full(len(more), np.nan, np.float32)])
    return TrainingPairs(
        [*pairs.texts, *texts],
        np.concatenate([pairs.left, moved[more.left]]),
        np.concatenate([pairs.right, moved[more.right]]),
        labels,
        np.concatenate([pairs.teacher, more.teacher]),
        vectors,
        pairs.facts,
        pairs.skipped,
        pairs.fingerprint,
    )
