"""Training pairs: which rows are taken, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flipkd.data.teacher_scores import TeacherFacts
from flipkd.distill.training_pairs import BatchOrder, TrainingPairs, _similarities, hold_out, read_training_pairs
from flipkd.errors import ConfigError, InputError

WriteParquet = Callable[..., Path]


def pairs_with(write_parquet: WriteParquet, **columns: object) -> str:
    texts = {"left_text": ["a b", "c d", "e f"], "right_text": ["a", "c", "e"]}
    return str(write_parquet("pairs/part-0.parquet", {**texts, **columns}).parent)


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1, 0, 1], pa.int64()),
        pa.array([1.0, 0.0, 1.0]),
        pa.array([True, False, True]),
        pa.array(["1", "0", "1"]),
        pa.array(["1", "0", "1"]).dictionary_encode(),
        pa.array([Decimal(1), Decimal(0), Decimal(1)], pa.decimal128(3, 0)),
    ],
)
def test_labels_of_any_type(write_parquet: WriteParquet, labels: pa.Array) -> None:
    """transformers#27707."""
    found = read_training_pairs(pairs_with(write_parquet, label=labels))
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, np.array([1, 0, 1], np.float32))
    assert found.teacher is None


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (pa.array([1, 0, 2]), "is neither 0 nor 1 in row 2"),
        (pa.array(["1", "yes", "0"]), "is neither 0 nor 1 in row 1"),
    ],
)
def test_bad_labels_are_named_by_file_and_row(write_parquet: WriteParquet, labels: pa.Array, what: str) -> None:
    """transformers#27707."""
    path = pairs_with(write_parquet, label=labels)
    with pytest.raises(InputError, match=rf"part-0.parquet .*'label' {what}"):
        read_training_pairs(path)


def test_a_null_label_is_an_unlabelled_pair(write_parquet: WriteParquet) -> None:
    """As ``teach`` and ``evaluate`` take it."""
    scores = pa.array([0.9, 0.2, 0.4], pa.float32())
    path = pairs_with(write_parquet, label=pa.array([1, None, 0], pa.int64()), teacher_score=scores)
    found = read_training_pairs(path).labels
    assert found is not None
    np.testing.assert_array_equal(found, np.array([1, np.nan, 0], np.float32))
    nothing = pa.nulls(3, pa.int64())
    assert read_training_pairs(pairs_with(write_parquet, label=nothing, teacher_score=scores)).labels is None
    with pytest.raises(InputError, match="column 'label' is null in every row, and there are no teacher scores"):
        read_training_pairs(pairs_with(write_parquet, label=nothing))


def test_a_label_column_of_a_nested_type_is_refused(write_parquet: WriteParquet) -> None:
    with pytest.raises(ConfigError, match="'label' has type list"):
        read_training_pairs(pairs_with(write_parquet, label=pa.array([[1], [0], [1]])))


def test_neither_label_nor_score_is_refused(write_parquet: WriteParquet) -> None:
    with pytest.raises(ConfigError, match="neither a column 'label' nor 'teacher_score'"):
        read_training_pairs(pairs_with(write_parquet))


def test_labels_do_not_stand_in_for_scores_where_they_are_not_read(write_parquet: WriteParquet) -> None:
    path = pairs_with(write_parquet, label=[1, 0, 1])
    with pytest.raises(
        ConfigError, match=r"no column 'teacher_score', .*: run flipkd-batch teach on them first$"
    ) as told:
        read_training_pairs(path, ignores_labels=True)
    assert "--label-column" not in str(told.value)  # it would lead nowhere


def test_a_named_column_must_be_there(write_parquet: WriteParquet) -> None:
    path = pairs_with(write_parquet, label=[1, 0, 1])
    with pytest.raises(ConfigError, match=r"no column 'gold'.*--label-column name columns"):
        read_training_pairs(path, label_column="gold")


def test_texts_are_normalised_and_stand_once(write_parquet: WriteParquet) -> None:
    """NFC and NFD of one name are one text, as in scoring; blank and null texts drop their pair, counted.

    transformers#5738, sentence-transformers#782.
    """
    columns = {
        "left_text": ["Nguyễn", "Nguyê\u0303n ", None, "x"],
        "right_text": ["y", "y", "y", "  "],
        "teacher_score": pa.array([0.5, 0.25, 0.5, 0.5], pa.float32()),
    }
    found = read_training_pairs(str(write_parquet("pairs/p.parquet", columns).parent))
    assert len(found) == 2
    assert [found.texts[place] for place in found.left] == ["Nguyễn", "Nguyễn"]
    assert found.left[0] == found.left[1]
    assert found.skipped == {"missing_or_invalid_text": 2}


def test_a_teachers_logit_becomes_its_sigmoid() -> None:
    """Also one so low that exp overflows."""
    facts = TeacherFacts("logit", None, "", "cross-encoder", ("left_text", "right_text"), None)
    found = _similarities(np.array([-1e4, -2, 0, 3, 1e4], np.float32), facts)
    expected = np.array([0, 1 / (1 + math.exp(2)), 0.5, 1 / (1 + math.exp(-3)), 1], np.float32)
    np.testing.assert_array_equal(found, expected)


def test_pairs_without_a_score_are_counted_and_dropped(write_parquet: WriteParquet) -> None:
    found = read_training_pairs(pairs_with(write_parquet, teacher_score=pa.array([0.5, None, 0.1], pa.float32())))
    assert found.skipped == {"no_teacher_score": 1}
    assert found.teacher is not None
    np.testing.assert_allclose(found.teacher, [0.5, 0.1])


def test_shards_of_other_string_types_give_the_same(write_parquet: WriteParquet) -> None:
    """arrow#47177, ray#33279, for training."""
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        texts = {name: pa.array(["a", "b"]).cast(kind) for name in ("left_text", "right_text")}
        write_parquet(f"pairs/part-{number}.parquet", {**texts, "label": [1, 0]})
    found = read_training_pairs(str(write_parquet("pairs/part-9.parquet", {**texts, "label": [1, 0]}).parent))
    assert found.texts == ["a", "b"]
    assert found.left.tolist() == [0, 1] * 4


def test_every_epoch_has_every_pair_once_and_left_texts_together(pairs_dir: Path) -> None:
    pairs = read_training_pairs(str(pairs_dir))
    order = BatchOrder(pairs, 10, seed=3)
    seen = np.concatenate([order.batch(number) for number in range(2 * len(pairs) // 10 + 1)])
    for epoch in range(2):
        part = seen[epoch * len(pairs) : (epoch + 1) * len(pairs)]
        assert sorted(part.tolist()) == list(range(len(pairs)))
        lefts = pairs.left[part]
        assert np.count_nonzero(lefts[1:] != lefts[:-1]) == len(np.unique(lefts)) - 1
    assert not np.array_equal(seen[: len(pairs)], seen[len(pairs) : 2 * len(pairs)])
    np.testing.assert_array_equal(BatchOrder(pairs, 10, seed=3).batch(20), order.batch(20))
    whole = BatchOrder(pairs, 10**9, seed=3)  # it would fill memory with copies of the same pairs
    for number in range(3):
        np.testing.assert_array_equal(np.sort(whole.batch(number)), np.arange(len(pairs)))


def test_held_out_pairs_share_no_left_text(pairs_dir: Path) -> None:
    pairs = read_training_pairs(str(pairs_dir))
    train, held = hold_out(pairs, 0.2, seed=0)
    assert held is not None
    assert len(train) + len(held) == len(pairs)
    lefts = [{part.texts[place] for place in part.left} for part in (train, held)]
    assert not lefts[0] & lefts[1]
    assert hold_out(pairs, 0.0, seed=0)[1] is None


PLACES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40)


def over_letters(places: list[tuple[int, int]], letters: str) -> TrainingPairs:
    left, right = np.array(places, np.int64).T
    return TrainingPairs(list(letters), left, right, None, np.arange(len(places), dtype=np.float32), None)


def unordered(pairs: TrainingPairs) -> list[frozenset[str]]:
    return [
        frozenset((pairs.texts[left], pairs.texts[right])) for left, right in zip(pairs.left, pairs.right, strict=True)
    ]


@given(PLACES, PLACES)
def test_a_pair_is_known_in_either_order(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    pairs, others = over_letters(one, "abcdefghij"), over_letters(other, "fghijklmno")
    assert pairs.is_among(others).tolist() == [pair in set(unordered(others)) for pair in unordered(pairs)]


@given(PLACES, st.floats(0, 0.9), st.integers(0, 5))
def test_no_pair_is_learned_and_held_out_in_the_other_order(
    places: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    pairs = over_letters(places, "abcdefghij")
    train, held = hold_out(pairs, fraction, seed)
    if held is None:
        assert train is pairs
        return
    assert train.teacher is not None
    assert held.teacher is not None
    rows = {name: set(part.teacher.astype(int).tolist()) for name, part in (("train", train), ("held", held))}
    missing = set(range(len(places))) - rows["train"] - rows["held"]
    assert len(train)
    assert not rows["train"] & rows["held"]
    assert not set(unordered(train)) & set(unordered(held))
    assert not {train.texts[place] for place in train.left} & {held.texts[place] for place in held.left}
    # No more than those is left out, and a run without any is the one that it was.
    assert {unordered(pairs)[row] for row in missing} <= set(unordered(held))
    assert (train.fingerprint == held.fingerprint == pairs.fingerprint) == (not missing)
