"""Labelled pairs of real texts, split so that nothing leaks: what the demo and the quality benchmark learn from.

Both texts of a pair are in lower case: where one source writes in capitals, the case alone would give the label away.
A split is a function of a pair's group (a keyed hash of it), so all pairs of one group are on one side, and a text that
stands in two groups is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.assets import icd9_descriptions
from flipkd.data.commit import make_private_folder
from flipkd.errors import OutputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Of the groups, not of the pairs; our choice.
_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}

Description = tuple[str, str, str]  # code, long, short
Row = tuple[str, str, str, str, int, str]  # left id, right id, left text, right text, label, group


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs of texts with labels; the n-th entries of all fields are one pair.

    Args:
        left_id, right_id: names of the two records, unique on their side.
        left_text, right_text: in lower case.
        label: [N] int8; 1 for the same thing, 0 for another one.
        group: what a split keeps together; the left record's for a negative.
    """

    left_id: tuple[str, ...]
    right_id: tuple[str, ...]
    left_text: tuple[str, ...]
    right_text: tuple[str, ...]
    label: npt.NDArray[np.int8]
    group: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label)

    def first(self, count: int) -> PairSet:
        """The first ``count`` pairs."""
        return self.take(np.arange(min(count, len(self))))

    def take(self, rows: npt.ArrayLike) -> PairSet:
        """The pairs of these rows, in this order."""
        places = np.asarray(rows, np.int64).tolist()

        def part(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[place] for place in places)

        return PairSet(
            left_id=part(self.left_id),
            right_id=part(self.right_id),
            left_text=part(self.left_text),
            right_text=part(self.right_text),
            label=self.label[places],
            group=part(self.group),
        )


@dataclass(frozen=True, eq=False)
class PairSplits:
    """One data set: what to learn from, what to choose a threshold on, and what to report."""

    train: PairSet
    validation: PairSet
    test: PairSet


def icd9_pairs(seed: int = 0, descriptions: Sequence[Description] | None = None) -> PairSplits:
    """ICD-9-CM: do a long and a short description belong to one diagnosis code?

    Positives are the two descriptions of one code, negatives those of neighbouring codes of the split, in both
    directions; the group is the category (the code's first three characters). 12,924 codes of 999 categories, of which
    12,920 are used. A negative whose two texts are also a positive's (codes with one short description) is left out.

    Args:
        seed: of the split.
        descriptions: (code, long, short) in order of code; None for all of them.

    Raises:
        InputError: the descriptions cannot be fetched.
    """
    rows = icd9_descriptions() if descriptions is None else descriptions
    lowered = [(code, long.lower(), short.lower()) for code, long, short in rows]
    categories: dict[str, set[str]] = defaultdict(set)
    for code, long, short in lowered:
        categories[long].add(code[:3])
        categories[short].add(code[:3])
    kept = [row for row in lowered if len(categories[row[1]]) == len(categories[row[2]]) == 1]
    return PairSplits(*(_neighbours([row for row in kept if split_of(row[0][:3], seed) == name]) for name in SPLITS))


def split_of(group: str, seed: int) -> Split:
    """The side on which a group stands: 70 % train, 10 % validation, 20 % test, by a keyed hash of its name."""
    digest = hashlib.blake2b(group.encode(), digest_size=8, key=f"flipkd split {seed}".encode()).digest()
    place = int.from_bytes(digest, "big") / 2**64
    edge = 0.0
    for name in SPLITS:
        edge += _SHARES[name]
        if place < edge:
            return name
    return SPLITS[-1]


def pair_set(rows: Iterable[Row]) -> PairSet:
    """A set of the rows, without those that say nothing or contradict another.

    Left out: pairs of equal texts, a second pair of the same two texts and the same label, and negatives whose two
    texts are also a positive's.
    """
    rows = list(rows)
    positives = {(left, right) for _, _, left, right, label, _ in rows if label}
    seen: set[tuple[str, str, int]] = set()
    kept: list[Row] = []
    for row in rows:
        _, _, left, right, label, _ = row
        if left == right or (left, right, label) in seen or (not label and (left, right) in positives):
            continue
        seen.add((left, right, label))
        kept.append(row)
    columns: list[tuple[str, ...]] = [tuple(str(row[place]) for row in kept) for place in (0, 1, 2, 3, 5)]
    left_id, right_id, left_text, right_text, group = columns
    return PairSet(left_id, right_id, left_text, right_text, np.array([row[4] for row in kept], np.int8), group)


def neighbour_rows(count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each row of a list with itself, the one before and the one after: left and right rows, [P] each."""
    rows = np.repeat(np.arange(count), 3)
    others = rows + np.tile([0, -1, 1], count)
    inside = (others >= 0) & (others < count)
    return rows[inside], others[inside]


def pair_table(pairs: PairSet) -> pa.Table:
    """``left_text``, ``right_text``, ``label`` int8, ``group``."""
    text = pa.string()
    columns = {"left_text": pa.array(pairs.left_text, text), "right_text": pa.array(pairs.right_text, text)}
    return pa.table({**columns, "label": pa.array(pairs.label), "group": pa.array(pairs.group, text)})


def write_pairs(pairs: PairSet, path: Path) -> None:
    """Writes ``pair_table`` as one file; see ``write_table``."""
    write_table(pair_table(pairs), path)


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file atomically; one of the same bytes stays, since jobs know their input by size and time.

    Raises:
        OutputError: the file cannot be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    try:
        make_private_folder(str(path.parent))
        if path.exists() and path.read_bytes() == data:
            return
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        temporary.chmod(0o600)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be written ({error.strerror}); choose another --output") from error


def _neighbours(descriptions: Sequence[Description]) -> PairSet:
    """Pairs of one split's descriptions."""
    lefts, rights = neighbour_rows(len(descriptions))
    return pair_set(
        (
            descriptions[left][0],
            descriptions[right][0],
            descriptions[left][1],
            descriptions[right][2],
            int(left == right),
            descriptions[left][0][:3],
        )
        for left, right in zip(lefts.tolist(), rights.tolist(), strict=True)
    )
