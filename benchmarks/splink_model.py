"""Splink, the peer that compares columns: probabilistic record linkage (Fellegi and Sunter) over DuckDB."""

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


def connect(threads: int | None = None) -> Any:
    """DuckDB in memory; None for all cores."""
    import duckdb

    return duckdb.connect(config={"threads": threads} if threads else {})


def train_splink(connection: Any, records: Any, matches: Any, columns: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """A model, as Splink saves it.

    Names are compared by Jaro-Winkler similarity with its adjustment for frequent values, dates of birth (``date_*``)
    by their distance: its ready-made comparisons. What share of matches reaches each level is counted on the known
    matches, what share of others on random pairs of records.

    Args:
        connection: of DuckDB.
        records: Arrow table or relation: ``unique_id`` and the columns.
        matches: Arrow table or relation: ``unique_id_l``, ``unique_id_r``.
        columns: those to compare.
        seed: of the random pairs.
    """
    import splink.comparison_library as comparisons
    from splink import DuckDBAPI, Linker, SettingsCreator

    def compared(column: str) -> Any:
        if column.startswith("date_"):
            return comparisons.DateOfBirthComparison(column, input_is_string=True, datetime_format=_DATE_FORMAT)
        return comparisons.NameComparison(column).configure(term_frequency_adjustments=True)

    settings = SettingsCreator("dedupe_only", [compared(column) for column in columns], retain_matching_columns=False)
    api = DuckDBAPI(connection)
    linker = Linker(api.register(records), settings, log_level=None)
    linker.training.estimate_u_using_random_sampling(_RANDOM_PAIRS, seed=seed)
    linker.training.estimate_m_from_pairwise_labels(api.register(matches))
    trained: dict[str, Any] = linker.misc.save_model_to_json()
    return trained


def predict_splink(connection: Any, records: Any, pairs: Any, trained: dict[str, Any]) -> Any:
    """Splink's frame of ``unique_id_l``, ``unique_id_r`` and ``match_weight``: each given pair once, in any order.

    Args:
        connection: of DuckDB.
        records: Arrow table or relation: ``unique_id`` and the columns.
        pairs: Arrow table or relation: ``match_key`` (any string), ``join_key_l``, ``join_key_r``.
        trained: by ``train_splink``.
    """
    from splink import DuckDBAPI, Linker

    api = DuckDBAPI(connection)
    linker = Linker(api.register(records), trained, log_level=None)
    linker.table_management.register_blocked_pairs_for_predict(api.register(pairs))
    return linker.inference.predict()


def splink_scores(train: PairSet, columns: Sequence[str], seed: int, threads: int | None) -> Score:
    """Scores pairs by the match weight of a model of the training pairs' records and labels.

    Args:
        train: pairs with labels.
        columns: what the texts hold, in this order.
        seed: of the random pairs.
        threads: of DuckDB; None for all cores.
    """
    lefts, rights = _names(train)
    known = np.flatnonzero(train.label).tolist()
    matches = pa.table({"unique_id_l": [lefts[row] for row in known], "unique_id_r": [rights[row] for row in known]})
    trained = train_splink(connect(threads), _records(train, columns), matches, columns, seed)

    def score(pairs: PairSet) -> Scores:
        lefts, rights = _names(pairs)
        given = pa.table({"match_key": ["0"] * len(pairs), "join_key_l": lefts, "join_key_r": rights})
        found = predict_splink(connect(threads), _records(pairs, columns), given, trained).as_pyarrow_table()
        names = zip(found["unique_id_l"].to_pylist(), found["unique_id_r"].to_pylist(), strict=True)
        weights = dict(zip(names, found["match_weight"].to_pylist(), strict=True))
        return np.array([weights[each] for each in zip(lefts, rights, strict=True)], np.float64)

    return score


def _records(pairs: PairSet, columns: Sequence[str]) -> pa.Table:
    """The records of the pairs, each once."""
    lefts, rights = _names(pairs)
    texts = dict(zip([*lefts, *rights], [*pairs.left_text, *pairs.right_text], strict=True))
    values = zip(*(text.split(SEPARATOR) for text in texts.values()), strict=True)
    table = {name: [each or None for each in column] for name, column in zip(columns, values, strict=True)}
    return pa.table({"unique_id": list(texts), **table})


def _names(pairs: PairSet) -> tuple[list[str], list[str]]:
    """Names of the left and of the right records; a name may stand on both sides."""
    return [f"left {each}" for each in pairs.left_id], [f"right {each}" for each in pairs.right_id]
