"""Pairs of bank names, out of domain for models that learned company names: the full and the short name of one bank.

The names come from ``schwifty==2026.10.1`` (MIT licence, copyright Martin Domke), fetched by hash and not installed:
the registers of the German and the Spanish central bank. Italy's register holds almost no short name that differs.
"""

from __future__ import annotations

import json
from collections import defaultdict

from flipkd.assets import Asset, fetch
from flipkd.demo.pair_sets import PairSet
from flipkd.demo.similar_names import frequent_words, lower, name_pairs, plain

_REGISTERS = ("schwifty/bank_registry/generated_de.json", "schwifty/bank_registry/generated_es.json")

BANKS = Asset(
    package="schwifty",
    version="2026.10.1",
    wheel="schwifty-2026.10.1-py3-none-any.whl",
    sha256="96e2396fbd1dcbd42f27243b4383c93fca3f96f35bddf3cf7ab573457ae5ead0",
    members=(*_REGISTERS, "schwifty-2026.10.1.dist-info/licenses/LICENSE"),
)


def bank_pairs() -> PairSet:
    """Do a full and a short name mean one bank?

    Positives: the two names of a bank, unless they are equal but for case, punctuation and blanks; names that stand
    with several others (a bank's many branches) are left out. Negatives (``name_pairs``): the most similar names of
    other banks. All pairs are for testing.

    Raises:
        InputError: the registers cannot be fetched.
    """
    both = {
        (lower(str(bank["name"])), lower(str(bank["short_name"])))
        for register in _REGISTERS
        for bank in json.loads((fetch(BANKS) / register).read_text(encoding="utf-8"))
    }
    partners: dict[str, set[str]] = defaultdict(set)
    for full, short in both:
        partners[plain(full)].add(plain(short))
        partners[plain(short)].add(plain(full))
    # A name may be both the full and the short one: others than itself must be one at most.
    banks = sorted(each for each in both if all(len(partners[plain(name)] - {plain(name)}) <= 1 for name in each))
    # A bank is known by its full name.
    names = [((full, plain(full)), (short, plain(full))) for full, short in banks]
    positives = [(left, right) for left, right in names if plain(left[0]) != plain(right[0])]
    frequent = frequent_words(name for each in banks for name in each)
    return name_pairs(positives, [left for left, _ in names], [right for _, right in names], frequent)
