"""Pairs of names: those of one owner, and for each name the one of another owner that looks most like it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from flipkd.demo.pair_sets import PairSet, Row, pair_set

Name = tuple[str, str]  # text in lower case, and whose name it is

# The most frequent words of the names ("inc", "corporation", "fund", "energy", ...) say nothing; our choice.
_FREQUENT_WORDS = 60
# "/DE/", "/NEW": the SEC's way to tell two registrants apart, not a part of the name.
_SUFFIX = re.compile(r"\s*/[a-z]{2,3}/?\s*$")


def name_pairs(
    positives: Sequence[tuple[Name, Name]], lefts: Sequence[Name], rights: Sequence[Name], frequent: frozenset[str]
) -> PairSet:
    """The positives, and as negatives to each of their names the most similar one of another owner on the other side.

    Of the names that share a word that is not a frequent one (of all names, where none does). Similar by rapidfuzz's
    token_set_ratio: so the negatives are those that this very measure finds hardest, and its own figures on such a set
    are lower for that reason.

    Args:
        positives: (left, right) names of one owner.
        lefts: names that a negative's left one is taken from; ``rights`` likewise.
        frequent: words that say nothing.
    """
    wanted_left, wanted_right = (sorted({pair[side] for pair in positives}) for side in (0, 1))
    rows = [_row(left, right) for left, right in positives]
    rows += [
        _row(left, right) for left, right in zip(wanted_left, _most_similar(wanted_left, rights, frequent), strict=True)
    ]
    rows += [
        _row(left, right)
        for right, left in zip(wanted_right, _most_similar(wanted_right, lefts, frequent), strict=True)
    ]
    return pair_set(rows)


def frequent_words(names: Iterable[str]) -> frozenset[str]:
    """The words that stand in most names."""
    counts = Counter(word for name in names for word in set(words(name)))
    return frozenset(word for word, _ in counts.most_common(_FREQUENT_WORDS))


def lower(name: str) -> str:
    """In lower case, with single blanks."""
    return " ".join(name.lower().split())


def words(name: str) -> list[str]:
    """Words of letters and digits, without the SEC's suffix; "a.g." and "ag" are one word."""
    without = _SUFFIX.sub("", name).replace(".", "").replace("'", "")
    return re.findall(r"[^\W_]+", without)


def plain(name: str) -> str:
    """Letters and digits alone."""
    return "".join(words(name))


def _row(left: Name, right: Name) -> Row:
    return f"{left[1]}:{left[0]}", f"{right[1]}:{right[0]}", left[0], right[0], int(left[1] == right[1]), left[1]


def _most_similar(names: Sequence[Name], others: Sequence[Name], frequent: frozenset[str]) -> list[Name]:
    """To each name the most similar other of another company; the first in order where several are."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.process import extractOne

    others_words = [words(name) for name, _ in others]
    places: dict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(others_words):
        for word in set(each) - frequent:
            places[word].append(place)
    texts = [" ".join(each) for each in others_words]
    found = []
    for name, company in names:
        sharing = {place for word in words(name) for place in places.get(word, ())}
        block = [place for place in sorted(sharing) if others[place][1] != company]
        block = block or [place for place in range(len(others)) if others[place][1] != company]
        best = extractOne(" ".join(words(name)), [texts[place] for place in block], scorer=token_set_ratio)
        found.append(others[block[best[2]]])
    return found
