"""The data sets of ``benchmarks.quality``: labelled pairs with hard negatives, and pairs without labels.

| name | pairs | split by | unlabelled texts |
|---|---|---|---|
| ``icd9`` | long and short descriptions of ICD-9-CM | category | descriptions and terms of ICD-10-CM |
| ``icd10`` | descriptions and inclusion terms of ICD-10-CM | category | descriptions of ICD-9-CM |
| ``sec_names`` | company names of two lists | company | names of registered companies of the training split |
| ``persons`` | person records (FEBRL): given name, surname and date of birth in two files | person | |
| ``banks`` | full and short names of banks; tested with the models and the threshold of ``sec_names`` | | |

To the negatives of each set (``flipkd.demo``) come nearest neighbours: to each left text the right text of another
owner that is closest under all-MiniLM-L6-v2 as it is. Unlabelled pairs hold no text of validation or test pairs: to
each of up to 12,000 texts one that is near (one of its five nearest neighbours under the same model) and one at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from flipkd.assets import icd9_descriptions
from flipkd.demo.banks import bank_pairs
from flipkd.demo.icd10 import icd10_inclusions, icd10_pairs
from flipkd.demo.names import company_names, sec_name_pairs
from flipkd.demo.pair_sets import PairSet, PairSplits, Row, icd9_pairs, pair_set, split_of
from flipkd.demo.persons import COLUMNS, person_pairs

Encode = Callable[[list[str]], npt.NDArray[np.float32]]

_UNLABELLED_TEXTS = 12_000
_NEAR = 5
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Args:
        splits: makes its labelled pairs.
        unlabelled_texts: makes more texts of its domain.
        trained_on: the data set whose models and validation pairs are used; None for its own.
        columns: what its texts hold, between ``SEPARATOR``; none for one column.
    """

    splits: Callable[[], PairSplits]
    unlabelled_texts: Callable[[], Sequence[str]]
    trained_on: str | None = None
    columns: tuple[str, ...] = ()


def _icd10_texts() -> list[str]:
    return [text for row in icd10_inclusions() for text in (row.description, row.term)]


def _icd9_texts() -> list[str]:
    return [long.lower() for _, long, _ in icd9_descriptions()]


def _registered_names() -> list[str]:
    return [name for name, company in company_names().registered if split_of(company, 0) == "train"]


def _banks() -> PairSplits:
    trained = sec_name_pairs()
    return replace(trained, test=bank_pairs())


DATASETS = {
    "icd9": DataSet(icd9_pairs, _icd10_texts),
    "icd10": DataSet(icd10_pairs, _icd9_texts),
    "sec_names": DataSet(sec_name_pairs, _registered_names),
    "persons": DataSet(person_pairs, list, columns=COLUMNS),
    "banks": DataSet(_banks, list, trained_on="sec_names"),
}


def with_nearest(pairs: PairSet, encode: Encode) -> PairSet:
    """The pairs, and to each left text the nearest right text of another owner as one more negative.

    An owner is what stands before the colon of an id.
    """
    lefts = dict(zip(pairs.left_id, pairs.left_text, strict=True))
    rights = dict(zip(pairs.right_id, pairs.right_text, strict=True))
    groups = dict(zip(pairs.left_id, pairs.group, strict=True))
    owners = np.array([name.partition(":")[0] for name in rights])
    right_ids, right_vectors = list(rights), encode(list(rights.values()))
    found: list[Row] = []
    left_ids, left_vectors = list(lefts), encode(list(lefts.values()))
    for start in range(0, len(left_ids), _BLOCK_ROWS):
        block = left_ids[start : start + _BLOCK_ROWS]
        scores = left_vectors[start : start + _BLOCK_ROWS] @ right_vectors.T
        own = np.array([name.partition(":")[0] for name in block])
        scores[own[:, None] == owners[None, :]] = -np.inf
        for left, place in zip(block, scores.argmax(axis=1).tolist(), strict=True):
            right = right_ids[place]
            found.append((left, right, lefts[left], rights[right], 0, groups[left]))
    return pair_set([*_rows(pairs), *found])


def some_pairs(pairs: PairSet, count: int) -> PairSet:
    """Some pairs of both classes, whatever their order."""
    return pairs.take(np.random.default_rng(0).permutation(len(pairs))[:count])


def some_groups(pairs: PairSet, share: float) -> PairSet:
    """The pairs of some groups; a smaller share is part of a larger one."""
    groups = sorted(set(pairs.group))
    order = np.random.default_rng(0).permutation(len(groups))
    chosen = {groups[place] for place in order[: max(1, round(share * len(groups)))]}
    return pairs if share >= 1 else pairs.take([row for row, group in enumerate(pairs.group) if group in chosen])


def read_pairs(path: Path) -> PairSet:
    """What ``write_pairs`` wrote; it leaves out ids, so texts stand in their place."""
    columns = pq.read_table(path).to_pydict()
    left, right = tuple(columns["left_text"]), tuple(columns["right_text"])
    return PairSet(left, right, left, right, np.array(columns["label"], np.int8), tuple(columns["group"]))


def unlabelled_pairs(texts: Sequence[str], splits: PairSplits, encode: Encode, seed: int) -> PairSet:
    """Pairs of texts, of the training pairs and of others; all labels are 0 and mean nothing.

    Args:
        texts: more texts of the domain.
        splits: the labelled pairs.
        encode: texts to unit rows.
        seed: of the choice.
    """
    held_out = {text for part in (splits.validation, splits.test) for text in (*part.left_text, *part.right_text)}
    known = dict.fromkeys([*splits.train.left_text, *splits.train.right_text, *texts])
    wanted = [text for text in known if text and text not in held_out]
    random = np.random.default_rng(seed)
    chosen = [wanted[place] for place in random.permutation(len(wanted))[:_UNLABELLED_TEXTS]]
    vectors = encode(chosen)
    rows: list[Row] = []
    for start in range(0, len(chosen), _BLOCK_ROWS):
        scores = vectors[start : start + _BLOCK_ROWS] @ vectors.T
        size = len(scores)
        scores[np.arange(size), np.arange(start, start + size)] = -np.inf
        near = np.argpartition(-scores, _NEAR, axis=1)[:, :_NEAR]
        near_one = near[np.arange(size), random.integers(0, _NEAR, size)]
        far_one = random.integers(0, len(chosen), size)
        for left, others in enumerate(np.stack([near_one, far_one], axis=1).tolist(), start):
            rows += [
                (str(left), str(right), chosen[left], chosen[right], 0, "unlabelled")
                for right in others
                if right != left
            ]
    return pair_set(rows)


def _rows(pairs: PairSet) -> list[Row]:
    columns = (pairs.left_id, pairs.right_id, pairs.left_text, pairs.right_text, pairs.label.tolist(), pairs.group)
    return list(zip(*columns, strict=True))
