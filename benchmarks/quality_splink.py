"""Splink in ``benchmarks.quality``: probabilistic record linkage (Fellegi and Sunter), which compares columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.quality_scores import Score, Scores
from flipkd.demo.pair_sets import PairSet
from flipkd.demo.persons import SEPARATOR

_RANDOM_PAIRS = 1e7  # what its documentation calls adequate while one tries out models
_DATE_FORMAT = "%Y%m%d"


def splink_scores(train: PairSet, columns: Sequence[str], seed: int, threads: int | None) -> Score:
    """Scores pairs by Splink's match weight.

    Names are compared by Jaro-Winkler similarity with its adjustment for frequent values, dates of birth (``date_*``)
    by their distance: its ready-made comparisons. What share of matches reaches each level is counted on the training
    pairs' labels, what share of others on random pairs of their records.

    Args:
        train: pairs with labels.
        columns: what the texts hold, in this order.
        seed: of the random pairs.
        threads: of DuckDB; None for all cores.
    """
    import splink.comparison_library as comparisons
    from splink import SettingsCreator

    def compared(column: str) -> Any:
        if column.startswith("date_"):
            return comparisons.DateOfBirthComparison(column, input_is_string=True, datetime_format=_DATE_FORMAT)
        return comparisons.NameComparison(column).configure(term_frequency_adjustments=True)

    settings = SettingsCreator("dedupe_only", [compared(column) for column in columns], retain_matching_columns=False)
    linker, api = _linker(train, columns, settings, threads)
    linker.training.estimate_u_using_random_sampling(_RANDOM_PAIRS, seed=seed)
    matches = train.take(np.flatnonzero(train.label))
    pairs = pa.table({"unique_id_l": _lefts(matches), "unique_id_r": _rights(matches)})
    linker.training.estimate_m_from_pairwise_labels(api.register(pairs))
    trained = linker.misc.save_model_to_json()

    def score(pairs: PairSet) -> Scores:
        linker, api = _linker(pairs, columns, trained, threads)
        given = {"match_key": ["0"] * len(pairs), "join_key_l": _lefts(pairs), "join_key_r": _rights(pairs)}
        linker.table_management.register_blocked_pairs_for_predict(api.register(pa.table(given)))
        found = linker.inference.predict().as_pyarrow_table()
        names = zip(found["unique_id_l"].to_pylist(), found["unique_id_r"].to_pylist(), strict=True)
        weights = dict(zip(names, found["match_weight"].to_pylist(), strict=True))
        both = zip(given["join_key_l"], given["join_key_r"], strict=True)
        return np.array([weights[each] for each in both], np.float64)

    return score


def _linker(pairs: PairSet, columns: Sequence[str], settings: Any, threads: int | None) -> tuple[Any, Any]:
    """Splink over the records of the pairs, each once."""
    import duckdb
    from splink import DuckDBAPI, Linker

    texts = dict(zip([*_lefts(pairs), *_rights(pairs)], [*pairs.left_text, *pairs.right_text], strict=True))
    values = zip(*(text.split(SEPARATOR) for text in texts.values()), strict=True)
    table = {name: [each or None for each in column] for name, column in zip(columns, values, strict=True)}
    api = DuckDBAPI(duckdb.connect(config={"threads": threads} if threads else {}))
    return Linker(api.register(pa.table({"unique_id": list(texts), **table})), settings, log_level=None), api


def _lefts(pairs: PairSet) -> list[str]:
    return [f"left {each}" for each in pairs.left_id]


def _rights(pairs: PairSet) -> list[str]:
    return [f"right {each}" for each in pairs.right_id]
