"""Pairs of ICD-10-CM: what a code is called, and a term that is included in it.

The codes come from ``simple-icd-10-cm==1.5.0`` (MIT licence, copyright Stefano Travasci), fetched by hash and not
installed: the tabular list of ICD-10-CM of April 2026 (a work of the US government).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from flipkd.assets import Asset, fetch
from flipkd.demo.pair_sets import SPLITS, PairSet, PairSplits, Row, pair_set, split_of

_TABULAR = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"

ICD10 = Asset(
    package="simple-icd-10-cm",
    version="1.5.0",
    wheel="simple_icd_10_cm-1.5.0-py3-none-any.whl",
    sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    members=(_TABULAR, "simple_icd_10_cm-1.5.0.dist-info/licenses/LICENSE"),
)
# Descriptions with these words say what a code is not.
_EMPTY_WORDS = re.compile(r"\b(other|unspecified|nos|classified)\b")


@dataclass(frozen=True)
class Inclusion:
    """A term that is included in a code.

    Args:
        code: such as ``A00.1``.
        parent: the code or section above it.
        description: of the code, in lower case.
        term: in lower case.
    """

    code: str
    parent: str
    description: str
    term: str

    @property
    def category(self) -> str:
        """The first three characters of the code."""
        return self.code[:3]


def icd10_pairs(seed: int = 0, inclusions: Sequence[Inclusion] | None = None) -> PairSplits:
    """Is a term included in a code of ICD-10-CM, given the code's description?

    Positives: a code's description and each of its inclusion terms, both without "other", "unspecified", "NOS" and
    "classified". Negatives: for each positive two more terms of sibling codes (those of the same parent), the next ones
    in the order of the classification; a description without as many such siblings has fewer. The group is the
    category; a text that stands in two categories is left out.

    Args:
        seed: of the split.
        inclusions: in the order of the classification; None for all.

    Raises:
        InputError: the list cannot be fetched.
    """
    rows = list(icd10_inclusions()) if inclusions is None else inclusions
    categories: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for text in (row.description, row.term):
            categories[text].add(row.category)
    kept = [row for row in rows if len(categories[row.description]) == len(categories[row.term]) == 1]
    return PairSplits(*(_pairs([row for row in kept if split_of(row.category, seed) == name]) for name in SPLITS))


def icd10_inclusions() -> Iterator[Inclusion]:
    """All inclusion terms that say something, in the order of the classification."""
    root = ElementTree.parse(fetch(ICD10) / _TABULAR).getroot()

    def below(element: ElementTree.Element, parent: str) -> Iterator[Inclusion]:
        code, description = element.findtext("name", ""), element.findtext("desc", "").lower()
        for note in element.findall("inclusionTerm/note"):
            term = " ".join((note.text or "").lower().split())
            if term and not _EMPTY_WORDS.search(description) and not _EMPTY_WORDS.search(term):
                yield Inclusion(code, parent, description, term)
        for child in element.findall("diag"):
            yield from below(child, code)

    for section in root.findall("chapter/section"):
        for element in section.findall("diag"):
            yield from below(element, section.get("id", ""))


def _pairs(inclusions: Sequence[Inclusion]) -> PairSet:
    families: dict[str, list[Inclusion]] = defaultdict(list)
    for row in inclusions:
        families[row.parent].append(row)
    rows: list[Row] = []
    for family in families.values():
        for place, row in enumerate(family):
            rows.append(_row(row, row))
            others = [other for other in (*family[place + 1 :], *family[:place]) if other.code != row.code]
            before = sum(other.code == row.code for other in family[:place])
            rows += [_row(row, others[(2 * before + step) % len(others)]) for step in range(2) if others]
    return pair_set(rows)


def _row(left: Inclusion, right: Inclusion) -> Row:
    label = int(left.code == right.code)
    return left.code, f"{right.code}:{right.term}", left.description, right.term, label, left.category
