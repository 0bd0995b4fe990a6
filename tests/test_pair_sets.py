from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.demo.banks import bank_pairs
from flipkd.demo.icd10 import Inclusion, icd10_pairs
from flipkd.demo.names import company_names, sec_name_pairs
from flipkd.demo.pair_sets import SPLITS, PairSet, PairSplits, icd9_pairs, pair_set, split_of, write_pairs
from flipkd.demo.persons import COLUMNS, SEPARATOR, person_pairs, person_records

SETS: dict[str, Callable[[int], PairSplits]] = {
    "icd9": icd9_pairs,
    "icd10": icd10_pairs,
    "sec": sec_name_pairs,
    "persons": person_pairs,
}


@pytest.fixture(scope="module", params=sorted(SETS))
def splits(request: pytest.FixtureRequest) -> PairSplits:
    return SETS[request.param](0)


def parts(splits: PairSplits) -> list[PairSet]:
    return [getattr(splits, name) for name in SPLITS]


def facts(pairs: PairSet) -> tuple[object, ...]:
    return pairs.left_id, pairs.right_id, pairs.left_text, pairs.right_text, pairs.label.tolist(), pairs.group


def test_no_text_and_no_group_is_in_two_splits(splits: PairSplits) -> None:
    sets = parts(splits)
    for first in range(3):
        for second in range(first + 1, 3):
            one, other = sets[first], sets[second]
            assert not set(one.group) & set(other.group)
            assert not {*one.left_text, *one.right_text} & {*other.left_text, *other.right_text}


def test_both_sides_are_in_lower_case_and_no_pair_says_nothing(splits: PairSplits) -> None:
    for pairs in parts(splits):
        texts = [*pairs.left_text, *pairs.right_text]
        assert texts == [text.lower() for text in texts]
        assert all(left != right for left, right in zip(pairs.left_text, pairs.right_text, strict=True))


def test_one_pair_of_texts_has_one_label_and_stands_once(splits: PairSplits) -> None:
    for pairs in parts(splits):
        both = list(zip(pairs.left_text, pairs.right_text, strict=True))
        assert len(both) == len(set(both))


def test_both_labels_are_common_and_the_splits_have_their_shares(splits: PairSplits) -> None:
    sets = parts(splits)
    total = sum(map(len, sets))
    for pairs, share in zip(sets, (0.7, 0.1, 0.2), strict=True):
        assert 0.15 < pairs.label.mean() < 0.5
        assert pairs.label.dtype == np.int8
        assert share - 0.05 < len(pairs) / total < share + 0.05


def test_one_id_stands_for_one_text_on_its_side(splits: PairSplits) -> None:
    for pairs in parts(splits):
        for ids, texts in ((pairs.left_id, pairs.left_text), (pairs.right_id, pairs.right_text)):
            known: dict[str, str] = {}
            assert all(known.setdefault(name, text) == text for name, text in zip(ids, texts, strict=True))


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_seed_gives_one_split_and_another_seed_another(name: str) -> None:
    first, again, other = SETS[name](0), SETS[name](0), SETS[name](1)
    for split in SPLITS:
        assert facts(getattr(first, split)) == facts(getattr(again, split))
    assert set(first.test.group) != set(other.test.group)


def test_icd9_positives_are_one_code_and_negatives_neighbours_of_the_split() -> None:
    rows = [(f"0{n:02}", f"Long {n}", f"short {n}") for n in range(60)]
    splits = icd9_pairs(0, rows)
    for name, pairs in zip(SPLITS, parts(splits), strict=True):
        own = [code for code, _, _ in rows if split_of(code, 0) == name]
        assert len(own) > 2
        expected = [(code, code, 1) for code in own]
        expected += [(left, right, 0) for left, right in itertools.pairwise(own)]
        expected += [(right, left, 0) for left, right in itertools.pairwise(own)]
        assert sorted(zip(pairs.left_id, pairs.right_id, pairs.label.tolist(), strict=True)) == sorted(expected)


def test_a_text_of_two_categories_is_left_out() -> None:
    rows = [("0011", "One", "a"), ("0012", "Two", "SAME"), ("0021", "Three", "same"), ("0022", "Four", "d")]
    splits = icd9_pairs(0, rows)
    assert not any("same" in pairs.right_text for pairs in parts(splits))
    assert {text for pairs in parts(splits) for text in pairs.left_text} == {"one", "four"}


def test_a_negative_that_contradicts_a_positive_is_left_out() -> None:
    rows = [("1", "1", "a", "x", 1, "g"), ("1", "2", "a", "x", 0, "g"), ("2", "2", "b", "x", 1, "g")]
    rows += [("3", "3", "c", "c", 1, "g"), ("2", "4", "b", "x", 1, "g")]
    pairs = pair_set(rows)
    assert list(zip(pairs.left_text, pairs.right_text, pairs.label.tolist(), strict=True)) == [
        ("a", "x", 1),
        ("b", "x", 1),
    ]


def test_company_names_are_of_one_company_each_and_positives_differ() -> None:
    names = company_names()
    by_text: dict[str, set[str]] = {}
    for company, registered, listed in names.joined:
        for name in (registered, listed):
            by_text.setdefault(name, set()).add(company)
    assert all(len(companies) == 1 for companies in by_text.values())
    assert {"inc", "corp", "corporation"} <= names.frequent
    positives = {each for split in parts(sec_name_pairs(0)) for each in _texts(split, 1)}
    negatives = {each for split in parts(sec_name_pairs(0)) for each in _texts(split, 0)}
    assert len(positives) > 1000
    company_of = {name: next(iter(companies)) for name, companies in by_text.items()}
    company_of |= dict(names.registered)
    assert all(company_of[left] == company_of[right] for left, right in positives)
    assert all(company_of[left] != company_of[right] for left, right in negatives)


def _texts(pairs: PairSet, label: int) -> list[tuple[str, str]]:
    rows = np.flatnonzero(pairs.label == label).tolist()
    return [(pairs.left_text[row], pairs.right_text[row]) for row in rows]


def test_written_pairs_have_the_columns_of_teach_and_equal_bytes_stay(tmp_path: Path) -> None:
    pairs = icd9_pairs().validation.first(100)
    path = tmp_path / "pairs" / "part-0.parquet"
    write_pairs(pairs, path)
    table = pq.read_table(path)
    assert table.schema.names == ["left_text", "right_text", "label", "group"]
    assert table.schema.field("label").type == pa.int8()
    assert table["left_text"].to_pylist() == list(pairs.left_text)
    assert table["label"].to_pylist() == pairs.label.tolist()
    before = path.stat()
    assert before.st_mode & 0o077 == 0
    write_pairs(pairs, path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    write_pairs(pairs.first(50), path)
    assert pq.read_table(path).num_rows == 50
    assert list(path.parent.iterdir()) == [path]


def test_icd10_negatives_are_the_next_terms_of_sibling_codes() -> None:
    rows = [Inclusion(f"a0{n}.{m}", f"a0{n}", f"code {n} {m}", f"term {n} {m}") for n in range(9) for m in range(4)]
    for pairs in parts(icd10_pairs(0, rows)):
        for left, right, label in zip(pairs.left_text, pairs.right_text, pairs.label.tolist(), strict=True):
            (_, category, place), (_, other, other_place) = left.split(), right.split()
            assert category == other
            assert label == (place == other_place)
            assert (int(other_place) - int(place)) % 4 in (0, 1, 2)
        assert len(pairs) == 3 * int(pairs.label.sum())


def test_a_bank_has_one_full_and_one_short_name() -> None:
    pairs = bank_pairs()
    assert len(pairs) > 1500
    assert 0.3 < pairs.label.mean() < 0.4
    partners: dict[str, set[str]] = {}
    for left, right in _texts(pairs, 1):
        partners.setdefault(left, set()).add(right)
        assert left != right
    assert all(len(rights) == 1 for rights in partners.values())
    assert not set(_texts(pairs, 0)) & set(_texts(pairs, 1))


def test_records_of_persons_keep_leading_zeros_and_the_truth() -> None:
    records = person_records()
    assert len(records) == 20_000
    assert sum(each.is_original for each in records) == 11_000
    assert len({each.person for each in records}) == 11_000
    assert len({each.record for each in records}) == 20_000
    assert all(value == value.strip() for each in records for value in each.values)
    born = [each.values[COLUMNS.index("date_of_birth")] for each in records]
    assert sum(len(each) == 8 and each.isdigit() for each in born) > 19_000


def test_negatives_of_persons_agree_in_most_columns() -> None:
    pairs = person_pairs().test
    rows = list(
        zip(pairs.left_id, pairs.right_id, pairs.left_text, pairs.right_text, pairs.label.tolist(), strict=True)
    )
    rights = dict(zip(pairs.right_id, pairs.right_text, strict=True))

    def agreeing(left: str, right: str) -> int:
        both = zip(left.split(SEPARATOR), right.split(SEPARATOR), strict=True)
        return sum(bool(one) and one == other for one, other in both)

    for left_id, right_id, left, right, label in rows:
        assert label == (left_id.partition(":")[0] == right_id.partition(":")[0])
        assert label or agreeing(left, right)
    left_id, _, left, _, _ = rows[0]
    taken = [
        (right_id, agreeing(left, right)) for name, right_id, _, right, label in rows if name == left_id and not label
    ]
    others = [
        agreeing(left, text) for name, text in rights.items() if name.partition(":")[0] != left_id.partition(":")[0]
    ]
    assert [count for _, count in taken] == sorted(others, reverse=True)[: len(taken)]
    assert len(taken) == 3
