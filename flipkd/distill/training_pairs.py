"""Training pairs: what ``teach`` wrote, as distinct texts and places of them.

The texts are tokenised once, and the teacher's vectors are read, never computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.commit import read_json
from flipkd.data.find import Shard, find_shards
from flipkd.data.labels import read_labels
from flipkd.data.location import Location, open_location
from flipkd.data.odds import sigmoid
from flipkd.data.pairs import distinct_texts
from flipkd.data.records import text_digests
from flipkd.data.shards import ShardReader
from flipkd.data.teacher_scores import TEACHER_SCORE, TEACHER_VECTORS, TeacherFacts, read_teacher_facts
from flipkd.errors import ConfigError, InputError
from flipkd.run.manifest import MANIFEST
from flipkd.run.units import fingerprint
from flipkd.vectors.store import VectorStore

logger = logging.getLogger(__name__)

_BATCH_ROWS = 1 << 16
_LABEL = "label"


@dataclass(frozen=True)
class TrainingPairs:
    """P pairs over N distinct texts.

    Args:
        texts: N normalised texts.
        left: [P] place of the left text.
        right: [P] place of the right text.
        labels: [P] float32 1 or 0, or NaN for an unlabelled pair; None without labels.
        teacher: [P] float32 teacher scores, as similarities (a logit as its sigmoid); None without a teacher.
        teacher_vectors: [N, D] float32 unit rows; None where the teacher gives none.
        facts: of the teacher.
        skipped: pairs left out, per reason.
        fingerprint: of the files.
        places: of the texts among those of the pairs that these are a subset of; None where they are none.
    """

    texts: list[str]
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32] | None
    teacher: npt.NDArray[np.float32] | None
    teacher_vectors: npt.NDArray[np.float32] | None
    facts: TeacherFacts | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    places: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.left)

    def subset(self, pairs: npt.NDArray[Any]) -> TrainingPairs:
        """Some of the pairs, over the texts that they need."""
        left, right = self.left[pairs], self.right[pairs]
        used, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        return TrainingPairs(
            [self.texts[place] for place in used],
            places[: len(left)],
            places[len(left) :],
            None if self.labels is None else self.labels[pairs],
            None if self.teacher is None else self.teacher[pairs],
            None if self.teacher_vectors is None else self.teacher_vectors[used],
            self.facts,
            self.skipped,
            self.fingerprint,
            used,
        )

    def is_among(self, others: TrainingPairs) -> npt.NDArray[np.bool_]:
        """[P] whether ``others`` hold the pair, with its two texts in either order."""
        places = {text: place for place, text in enumerate(others.texts)}
        own = np.array([places.get(text, -1) for text in self.texts], np.int64)
        names = _unordered(own[self.left], own[self.right], len(places))
        return np.isin(names, _unordered(others.left, others.right, len(places)))


def read_training_pairs(
    path: str,
    left_text: str | None = None,
    right_text: str | None = None,
    label_column: str | None = None,
    *,
    ignores_labels: bool = False,
) -> TrainingPairs:
    """Reads pairs with labels, teacher scores, or both.

    Args:
        path: Parquet file or folder; usually the output of ``teach``.
        left_text: column of left texts; None for what ``teach`` recorded, else ``left_text``.
        right_text: column of right texts.
        label_column: None takes what ``teach`` recorded, else ``label``, if there is such a column. A null is an
            unlabelled pair; a column of nothing else is none.
        ignores_labels: whether labels are not read even where there are some.

    Raises:
        ConfigError: a column is missing or of a type that cannot be used, or there is neither label nor teacher score
            (with ``ignores_labels``: no teacher score).
        InputError: a file cannot be read, a label is not 0, 1 or null (named by file and row), or the teacher scores
            of several teachers or scales are mixed.
    """
    location = open_location(path)
    shards = find_shards(location)
    facts = read_teacher_facts(location, shards)
    recorded = facts.text_columns if facts is not None else ("left_text", "right_text")
    names = (left_text or recorded[0], right_text or recorded[1])
    with ShardReader(location, shards[0]) as reader:
        schema = reader.schema
        known = schema.names
    usual = facts.label_column if facts is not None and facts.label_column is not None else _LABEL
    label = label_column if label_column is not None else (usual if usual in known else None)
    label = None if ignores_labels else label
    has_scores = TEACHER_SCORE in known
    if ignores_labels and not has_scores:
        raise ConfigError(
            f"{path} has no column {TEACHER_SCORE!r}, which pairs without labels need: run flipkd-batch teach on them "
            "first"
        )
    if label is None and not has_scores:
        raise ConfigError(
            f"{path} has neither a column {_LABEL!r} nor {TEACHER_SCORE!r}: name the labels with --label-column, or "
            "run flipkd-batch teach on the pairs first"
        )
    if has_scores and not pa.types.is_floating(schema.field(TEACHER_SCORE).type):
        raise ConfigError(
            f"{path}: column {TEACHER_SCORE!r} is of type {schema.field(TEACHER_SCORE).type}, not a floating point "
            "number; run flipkd-batch teach on the pairs"
        )
    columns = list(dict.fromkeys([*names, *([label] if label else []), *([TEACHER_SCORE] if has_scores else [])]))
    places: dict[str, int] = {}
    parts = [_read_shard(location, shard, columns, names, label, has_scores, places) for shard in shards]
    left, right = (np.concatenate([part.sides[side] for part in parts]) for side in (0, 1))
    labels, scores = (np.concatenate([part.values[kind] for part in parts]) for kind in (0, 1))
    missing, unscored = (left < 0) | (right < 0), np.isnan(scores) if has_scores else np.zeros(len(left), np.bool_)
    reasons = {"missing_or_invalid_text": missing, "no_teacher_score": unscored & ~missing}
    skipped = {reason: int(np.count_nonzero(rows)) for reason, rows in reasons.items() if rows.any()}
    kept = np.flatnonzero(~missing & ~unscored)
    if not len(kept):
        raise InputError(f"{path} holds no pair that can be trained on: {skipped or 'it is empty'}")
    if skipped:
        logger.warning("%s: pairs left out: %s", path, skipped)
    unlabelled = int(np.count_nonzero(np.isnan(labels[kept])))
    if label is not None and unlabelled:
        if unlabelled == len(kept) and not has_scores:
            raise InputError(f"{path}: column {label!r} is null in every row, and there are no teacher scores")
        logger.info("%s: pairs whose label is null, so unlabelled: %d of %d", path, unlabelled, len(kept))
    texts = list(places)
    return TrainingPairs(
        texts,
        left[kept],
        right[kept],
        None if unlabelled == len(kept) else labels[kept],
        _similarities(scores[kept], facts) if has_scores else None,
        _teacher_vectors(location, texts),
        facts,
        skipped,
        fingerprint({"shards": [(shard.name, shard.size_bytes, shard.modified_ns) for shard in shards]}),
    )


def hold_out(pairs: TrainingPairs, fraction: float, seed: int) -> tuple[TrainingPairs, TrainingPairs | None]:
    """Training and validation pairs: pairs of one left text go to one side. None for the second where it is empty.

    A right text may stand on both sides; for a split by groups of your own give validation pairs of their own. Of a
    pair that stands in both orders, with its left texts on both sides, the one to train on is left out.
    """
    lefts = np.unique(pairs.left)
    count = round(fraction * len(lefts))
    if not count or count == len(lefts):
        return pairs, None
    held = np.random.default_rng([seed, 1]).choice(lefts, count, replace=False)
    is_held = np.isin(pairs.left, held)
    names = _unordered(pairs.left, pairs.right, len(pairs.texts))
    is_swapped = ~is_held & np.isin(names, names[is_held])
    if is_swapped.any():
        swapped = int(np.count_nonzero(is_swapped))
        logger.warning("pairs left out of training, since they are held out in the other order: %d", swapped)
        if np.all(is_held | is_swapped):
            return pairs, None
        # A run that trained on them is another one.
        pairs = replace(pairs, fingerprint=fingerprint({"pairs": pairs.fingerprint, "swapped": swapped}))
    return pairs.subset(np.flatnonzero(~is_held & ~is_swapped)), pairs.subset(np.flatnonzero(is_held))


def _unordered(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], texts: int) -> npt.NDArray[np.int64]:
    """[P] a number for each pair of two places of ``texts`` texts, whatever their order; negative where one is -1."""
    return np.minimum(left, right) * texts + np.maximum(left, right)


class BatchOrder:
    """Which pairs each batch holds: a function of the seed and the batch's number, so a resumed run needs no state.

    In every epoch the left texts are shuffled, and the pairs of one left text stay together: a batch then encodes that
    text once for all of its pairs, and MCL compares its match with its near misses.

    Args:
        pairs: P pairs.
        size: pairs in a batch; all of them where there are fewer.
        seed: of the order.
    """

    def __init__(self, pairs: TrainingPairs, size: int, seed: int) -> None:
        self._pairs, self._size, self._seed = pairs, min(size, len(pairs)), seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, number: int) -> npt.NDArray[np.int64]:
        """Places of the pairs of batch ``number``, counted from 0 through all epochs."""
        start, left, chosen = number * self._size, self._size, []
        while left:
            epoch, offset = divmod(start, len(self._pairs))
            part = self._epoch_order(epoch)[offset : offset + left]
            chosen.append(part)
            start, left = start + len(part), left - len(part)
        return np.concatenate(chosen)

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            rank = np.random.default_rng([self._seed, 2, epoch]).permutation(len(self._pairs.texts))
            self._epoch, self._order = epoch, np.argsort(rank[self._pairs.left], kind="stable")
        return self._order


@dataclass(frozen=True)
class _Part:
    """Rows of one shard: places of the left and right texts (-1: none), and labels and teacher scores (NaN: none)."""

    sides: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    values: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def _read_shard(
    location: Location,
    shard: Shard,
    columns: Sequence[str],
    names: tuple[str, str],
    label: str | None,
    has_scores: bool,
    places: dict[str, int],
) -> _Part:
    """Reads one shard; its new texts are added to ``places``."""
    with ShardReader(location, shard) as reader:
        reader.check_columns(
            columns, "--left-text, --right-text and --label-column name columns; flipkd-batch teach writes all of them"
        )
        rows = reader.row_group_rows
        whole = (0, len(rows))
        table = pa.concat_tables(reader.batches(columns, _BATCH_ROWS, row_groups=whole, skip_rows=0, rows=sum(rows)))
    sides = []
    for name in names:
        texts, indices = distinct_texts(table.column(name), name)
        own = [-1 if text is None else places.setdefault(text, len(places)) for text in texts.values.to_pylist()]
        sides.append(np.array(own, np.int64)[indices])
    nothing = np.full(table.num_rows, np.nan, np.float32)
    labels, scores = nothing, nothing
    if label is not None:
        labels = read_labels(table.column(label), label, location.naming(shard.name), allows_null=True).to_numpy()
    if has_scores:
        scores = table.column(TEACHER_SCORE).cast(pa.float32()).to_numpy()
    return _Part((sides[0], sides[1]), (labels, scores))


def _similarities(scores: npt.NDArray[Any], facts: TeacherFacts | None) -> npt.NDArray[np.float32]:
    """Teacher scores as similarities of at most 1: cosines and probabilities as they are, a logit's sigmoid."""
    values = scores.astype(np.float32)
    if facts is not None and facts.scale == "logit":
        values = sigmoid(values).astype(np.float32)
    return values


def _teacher_vectors(location: Location, texts: Sequence[str]) -> npt.NDArray[np.float32] | None:
    folder = location.child(TEACHER_VECTORS)
    if not location.is_local or read_json(folder, "store.json") is None:
        return None
    manifest = read_json(location, MANIFEST, fingerprint=str)
    if manifest is None:
        raise InputError(f"{location.uri} holds teacher vectors but no {MANIFEST}: run teach again, it goes on")
    store = VectorStore.open(folder.path)
    try:
        key = bytes.fromhex(manifest["fingerprint"])
    except ValueError:
        raise InputError(f"{location.uri}/{MANIFEST} is damaged: its fingerprint is no hexadecimal number") from None
    digests = pa.chunked_array([text_digests(pa.array(texts, pa.large_string()), key)])
    rows = store.index.look_up(digests, column="text", threads=1)
    if len(rows) and rows.min() < 0:
        raise InputError(f"{folder.uri} lacks the vectors of {int((rows < 0).sum())} texts: run teach again")
    return np.asarray(store.rows.values[rows], np.float32)
