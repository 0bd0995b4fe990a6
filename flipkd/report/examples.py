"""The worst errors with all their columns, for ``--show-examples``: read again by row number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.data.columns import take_rows
from flipkd.data.find import Shard
from flipkd.data.location import Location
from flipkd.report.pairs import LabelledPairs
from flipkd.report.scan import RowCounts, column_names, scan

_MOST_CHARACTERS = 300


def worst_errors(pairs: LabelledPairs, count: int) -> dict[str, npt.NDArray[np.int64]]:
    """Row numbers of the others with the highest scores, and of the matches with the lowest."""
    order = np.argsort(pairs.score, kind="stable")
    return {
        "false_matches": pairs.row[order[~pairs.label[order]][::-1][:count]],
        "missed_matches": pairs.row[order[pairs.label[order]][:count]],
    }


def read_examples(
    location: Location, shards: Sequence[Shard], score_column: str, chosen: dict[str, npt.NDArray[np.int64]]
) -> dict[str, Any]:
    """The rows' values as text.

    Args:
        location: root of the table whose rows are numbered.
        shards: its files.
        score_column: name of the score.
        chosen: per kind of error its row numbers.
    """
    columns = column_names(location, shards)
    wanted = np.unique(np.concatenate(list(chosen.values())))
    values: dict[int, list[str]] = {}
    for batch in scan(location, shards, score_column, columns, RowCounts()):
        inside = wanted[(wanted >= batch.first_row) & (wanted < batch.first_row + batch.table.num_rows)]
        rows = take_rows(batch.table.select(columns), inside - batch.first_row).to_pylist()
        for row, place in zip(rows, inside.tolist(), strict=True):
            values[place] = [_text(row[name]) for name in columns]
    found: dict[str, Any] = {kind: [values[row] for row in rows.tolist()] for kind, rows in chosen.items()}
    return {"columns": columns, **found}


def _text(value: Any) -> str:
    text = "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "…"
