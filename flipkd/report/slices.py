"""The same metrics by the values of a column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.report.metrics import Ranked, measured
from flipkd.report.pairs import LabelledPairs

# Values with fewer labelled pairs are shown together: their figures would say nothing, and a value that stands on one
# or two rows may tell who they are. Our choice, as are the other numbers.
LEAST_PAIRS = 10
MOST_SLICES = 30
_RESAMPLES = 200
_FIGURES = ("roc_auc", "average_precision")


def slice_rows(
    pairs: LabelledPairs, column: str, threshold: float, resamples: int, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Figures per value of a slice column, the most frequent values first.

    Args:
        pairs: with the slice.
        column: its name.
        threshold: score at which precision and recall are taken.
        resamples: for the intervals, 200 at most.
        generator: of random numbers.

    Returns:
        Rows of ``value`` (None for null), ``values`` (how many are shown together, where several are), ``pairs``,
        ``matches``, ``weight``, ``precision``, ``recall``, and ``metrics``; the last is None, and ``note`` says why,
        where the slice holds one class only.
    """
    values = pairs.slices[column]
    found = sorted(pc.value_counts(values).to_pylist(), key=lambda entry: (-entry["counts"], str(entry["values"])))
    shown = [entry["values"] for entry in found if entry["counts"] >= LEAST_PAIRS or entry["values"] is None]
    shown = shown[:MOST_SLICES]
    rows, rest = [], np.ones(len(pairs), np.bool_)
    for value in shown:
        same = values.is_null() if value is None else pc.fill_null(pc.equal(values, pa.scalar(value)), False)
        inside = np.asarray(same)
        rest &= ~inside
        rows.append({"value": value, **_row(pairs.take(inside), threshold, resamples, generator)})
    if rest.any():
        others = len(found) - len(shown)
        rows.append({"value": None, "values": others, **_row(pairs.take(rest), threshold, resamples, generator)})
    return rows


def _row(pairs: LabelledPairs, threshold: float, resamples: int, generator: np.random.Generator) -> dict[str, Any]:
    taken = pairs.score >= np.float32(threshold)
    found, true = pairs.weight[taken].sum(), pairs.weight[taken & pairs.label].sum()
    matches = pairs.weight[pairs.label].sum()
    row: dict[str, Any] = {
        "pairs": len(pairs),
        "matches": int(np.count_nonzero(pairs.label)),
        "weight": float(pairs.weight.sum()),
        "precision": float(true / found) if found else None,
        "recall": float(true / matches) if matches else None,
        "metrics": None,
        "note": None,
    }
    if not pairs.has_both_classes:
        row["note"] = "only matches" if row["matches"] else "no match"
        return row
    metrics = measured(pairs, min(resamples, _RESAMPLES), generator)["metrics"]
    row["metrics"] = {name: metrics[name] for name in _FIGURES}
    row["best_f1"] = float(Ranked(pairs.score, pairs.label).curve(pairs.weight).f1.max())
    return row
